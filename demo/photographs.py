"""Cut the photographs of three packages into tiles: a flat folder without labels, and a table with the labels of some.

    pip install scikit-image scikit-learn
    pip install --no-deps deepforest
    python demo/photographs.py own_photos

writes own_photos/tiles/*.png without labels, own_photos/held_out/*.png, and own_photos/cover.csv: for the tiles of two
aerial photographs of Yellowstone, how much of the ground is covered by trees. These labels follow from the boxes of 853
trees that come with deepforest.
"""

import argparse
import csv
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from util import arguments, cli
from util.errors import UserError, as_user_error
from util.files import printable

SIDE = 64  # pixels of a tile
AERIAL = "2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop"
TRAINED = 2 / 3  # of the height of each, from the top; the rest is held out
COVER = {"open": 0.0, "scattered": 0.05, "forest": 0.35}  # least share of a tile that crowns cover
# Colour photographs, by the module of the package that contains them.
OTHERS = {
    "deepforest": ["data/SOAP_031.png", "data/SOAP_061.png", "data/OSBS_029.png"],
    "skimage": [f"data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg",
                                            "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}  # fmt: skip


def in_package(package: str, name: str) -> Path:
    """Return the path of a package's file, without importing the package; raise UserError if it is missing."""
    spec = find_spec(package)
    folders = (spec and spec.submodule_search_locations) or [""]
    path = Path(folders[0], name)
    if not path.is_file():
        raise UserError(f"{package} with {name} is not installed: the head of the script says how")
    return path


def tiles(path: Path) -> dict[tuple[int, int], Image.Image]:
    """Return the tiles of a photograph, RGB, by row and column; what is left at the right and the bottom is cut off."""
    with Image.open(path) as opened:
        photograph = opened.convert("RGB")
    rows, columns = photograph.height // SIDE, photograph.width // SIDE
    places = [(row, column) for row in range(rows) for column in range(columns)]
    return {(r, c): photograph.crop((SIDE * c, SIDE * r, SIDE * (c + 1), SIDE * (r + 1))) for r, c in places}


def covered(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return which pixels lie in the box of a crown: (height, width) bool.

    Args:
        path: boxes of a photograph, in the XML format of Pascal VOC.
        size: width and height of the photograph.
    """
    ground = np.zeros(size[::-1], bool)
    for box in ElementTree.parse(path).iter("bndbox"):
        left, top, right, bottom = (max(0, int(box.findtext(k, ""))) for k in ("xmin", "ymin", "xmax", "ymax"))
        ground[top:bottom, left:right] = True
    return ground


def main(args: argparse.Namespace) -> None:
    """Write the tiles and the table.

    Raises:
        UserError: a package is not installed, or the folder exists or cannot be written.
    """
    others = [in_package(package, name) for package, names in OTHERS.items() for name in names]
    aerial = [in_package("deepforest", f"data/{name}.png") for name in AERIAL]
    folder, counts = Path(args.folder), {"tiles": 0, "held_out": 0}
    with as_user_error(OSError, prefix=f"{printable(folder)}: "):
        for name in counts:
            (folder / name).mkdir(parents=True)
        for path in others:
            for (row, column), tile in tiles(path).items():
                tile.save(folder / "tiles" / f"{path.stem}_{row:02d}_{column:02d}.png")
                counts["tiles"] += 1
        with (folder / "cover.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "label", "split"])
            for path in aerial:
                cut = tiles(path)
                with Image.open(path) as photograph:
                    ground = covered(path.with_suffix(".xml"), photograph.size)
                last = TRAINED * (ground.shape[0] // SIDE)
                for (row, column), tile in cut.items():
                    kind = "tiles" if row < last else "held_out"
                    name = f"{kind}/{path.stem}_{row:02d}_{column:02d}.png"
                    share = ground[SIDE * row : SIDE * (row + 1), SIDE * column : SIDE * (column + 1)].mean()
                    tile.save(folder / name)
                    label = max((least, label) for label, least in COVER.items() if share >= least)[1]
                    table.writerow([name, label, "train" if kind == "tiles" else "val"])
                    counts[kind] += 1
    print(f"{printable(folder)}: {counts['tiles']} tiles without labels, {counts['held_out']} held out, and cover.csv")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("photographs.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=arguments.nonempty, metavar="FOLDER", help="new folder of the tiles")
    return parser


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
