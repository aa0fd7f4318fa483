"""Cut the annotated photographs of a package into a COCO data set of trees, to train and measure a detector on.

    pip install --no-deps deepforest
    python demo/trees.py trees

writes trees/train/*.png, trees/val/*.png and trees/annotations/instances_*.json: the aerial photographs that
come with deepforest (MIT), cut into tiles that do not overlap, with the boxes that people have drawn around 951 trees.
Two photographs are to train, two to evaluate. trees/train is also a folder of images to pretrain on.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from demo.photographs import AERIAL, in_package
from util import arguments, cli
from util.errors import as_user_error
from util.files import printable, write_json

PHOTOGRAPHS = {"train": (AERIAL[0], "OSBS_029"), "val": (AERIAL[1], "SOAP_061")}
SIDE = 256  # pixels of a tile, about: each photograph is divided evenly
VISIBLE = 0.4  # least share of a box that lies in a tile; smaller parts are slivers, and are dropped


def boxes_of(path: Path) -> np.ndarray:
    """Return the boxes of a file in the XML format of Pascal VOC: x1, y1, x2, y2 in pixels, (m, 4) int64."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    found = [[int(box.findtext(key, "")) for key in corners] for box in ElementTree.parse(path).iter("bndbox")]
    return np.array(found, np.int64).reshape(-1, 4)


def edges(pixels: int) -> list[int]:
    """Return where a side of a photograph is cut, from 0 to its end."""
    return [round(edge) for edge in np.linspace(0, pixels, max(1, round(pixels / SIDE)) + 1)]


def inside(boxes: np.ndarray, tile: tuple[int, int, int, int]) -> np.ndarray:
    """Return the boxes that lie in a tile, in the tile's pixels and clipped, without slivers: (n, 4) int64."""
    left, top, right, bottom = tile
    clipped = boxes.clip([left, top, left, top], [right, bottom, right, bottom])
    area, seen = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, clipped))
    return clipped[(seen > 0) & (seen >= VISIBLE * area)] - [left, top, left, top]


def cut(pictures: list[Path], folder: Path) -> tuple[dict[str, list[dict]], int]:
    """Write the tiles of photographs, whose boxes lie beside them, to a new folder; raises OSError.

    Returns:
        What the tiles hold in COCO's format, and the number of boxes in the photographs.
    """
    images: list[dict] = []
    objects: list[dict] = []
    trees = 0
    folder.mkdir(parents=True)
    for picture in pictures:
        boxes = boxes_of(picture.with_suffix(".xml"))
        trees += len(boxes)
        with Image.open(picture) as opened:
            photograph = opened.convert("RGB")
        columns, rows = edges(photograph.width), edges(photograph.height)
        for row, (top, bottom) in enumerate(pairwise(rows)):
            for column, (left, right) in enumerate(pairwise(columns)):
                name, number = f"{picture.stem}_{row:02d}_{column:02d}.png", len(images) + 1
                photograph.crop((left, top, right, bottom)).save(folder / name)
                images.append({"id": number, "file_name": name, "width": right - left, "height": bottom - top})
                for x1, y1, x2, y2 in inside(boxes, (left, top, right, bottom)).tolist():
                    size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                    objects.append({"id": len(objects) + 1, "image_id": number, "category_id": 1, "iscrowd": 0, **size})
    return {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "tree"}]}, trees


def main(args: argparse.Namespace) -> None:
    """Write both splits, and print what they hold.

    Raises:
        UserError: deepforest is not installed, or the folder exists or cannot be written.
    """
    folder = Path(args.folder)
    pictures = {
        split: [in_package("deepforest", f"data/{name}.png") for name in names] for split, names in PHOTOGRAPHS.items()
    }
    with as_user_error(OSError, prefix=f"{printable(folder)}: "):
        (folder / "annotations").mkdir(parents=True)
        for split, paths in pictures.items():
            found, trees = cut(paths, folder / split)
            write_json(folder / "annotations" / f"instances_{split}.json", found)
            counts = f"{len(found['images'])} tiles with {len(found['annotations'])} boxes"
            print(f"{printable(folder / split)}: {counts}, of {trees} trees in {len(paths)} photographs")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("trees.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=arguments.nonempty, metavar="FOLDER", help="new folder of the data set")
    return parser


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
