"""Lay cut-out pictures on photographs: a data set with exact masks, to train and measure a segmenter on.

    pip install scikit-image
    apt-get install openclipart-png
    python demo/cutouts.py cutouts

writes cutouts/images/{train,val}/*.jpg, cutouts/annotations/{train,val}/*.png and cutouts/classes.txt. A mask has the
line of the class in classes.txt, from 0, in every pixel, and 255 where the edge of a cut-out is half transparent. The
cut-outs are Open Clip Art (public domain) with transparency, by the folder that they lie in; the photographs come with
scikit-image. Training and evaluation have different cut-outs, and different halves of the photographs.
cutouts/images/train is also a folder of images to pretrain on. Debian and Ubuntu have the clip art; without root:

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb clipart
    python demo/cutouts.py cutouts --clipart clipart/usr/share/openclipart/png
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from demo.photographs import in_package
from util import arguments, cli
from util.errors import UserError, as_user_error
from util.files import printable, write_text

CLIPART = "/usr/share/openclipart/png"
CLASSES = {
    "mammal": "animals/mammals", "bird": "animals/birds", "insect": "animals/bugs", "fruit": "food/fruit",
    "house": "buildings/homes", "flower": "plants/flowers", "vehicle": "transportation/vehicles",
}  # fmt: skip
# Pictures in these folders that show something else, or several things.
OTHERS = re.compile(
    r"juice|_bowl|pie_|champignon|gumnut|grenade|straw_tote|turkey|pollo|bat\b|bat_|tree|virus|lumaca|star_thom|sleeping"
    r"|crossroads|curve|cycle_(lane|route)|lighthouse|parking|sign|symbol|egizio|tile_|slate|wing_|cactus|emule|rocket"
    r"|cat_scrat|bouquet|campagna|mirjam|quattro|ragno|crazy_monkey|mostriciattolo|stormo"
)
FILLED = 0.25, 0.92  # share of a picture that is opaque: less are line drawings, more have a background
COLOURED = 12  # least mean difference of the largest and the smallest of red, green, blue: less are silhouettes
ALIKE = 8  # mean difference of small copies, of 255: below it, a picture is a variant of another one, and left out
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "moon.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
COUNTS = {"train": 600, "val": 150}  # images
SIDE = 160  # pixels of an image
SIZES = 0.25, 0.7  # of the longer side of a cut-out, as a part of SIDE
MOST = 5  # cut-outs of an image; the least is one
OPAQUE, IGNORED = (64, 192), 255  # between these values of transparency, a pixel is neither; its mask is IGNORED


def cut_out(path: Path) -> Image.Image | None:
    """Return a picture cut to what is opaque, RGBA, at most SIDE pixels a side; None if it is no filled colour picture.

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(path) as opened:
        if not SIDE / 4 <= min(opened.size) <= max(opened.size) <= 4096:
            return None
        picture = opened.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha >= OPAQUE[1])).getbbox())
    picture.thumbnail((SIDE, SIDE))
    pixels = np.asarray(picture).reshape(-1, 4)  # (height, width, 4) -> (pixels, 4)
    opaque = pixels[pixels[:, 3] >= OPAQUE[1], :3]
    if not FILLED[0] <= len(opaque) / len(pixels) <= FILLED[1]:
        return None
    return picture if (opaque.max(axis=1) - opaque.min(axis=1)).mean() >= COLOURED else None


def distinct(paths: list[Path]) -> list[Image.Image]:
    """Return the cut-outs among some pictures, without those that resemble an earlier one, mirrored or not."""
    found: list[Image.Image] = []
    seen: list[np.ndarray] = []
    for path in paths:
        picture = None if OTHERS.search(path.stem) else cut_out(path)
        if picture is None:
            continue
        small = np.asarray(picture.resize((16, 16))).astype(np.float32)
        small[..., :3] *= small[..., 3:] / 255
        if all(np.abs(other - copy).mean() >= ALIKE for other in seen for copy in (small, small[:, ::-1])):
            found.append(picture)
            seen.append(small)
    return found


def half(path: Path, right: bool) -> Image.Image:
    """Return the left or the right half of a photograph, RGB."""
    with Image.open(path) as opened:
        middle = opened.width // 2
        return opened.convert("RGB").crop((middle if right else 0, 0, opened.width if right else middle, opened.height))


def compose(
    photographs: list[Image.Image], cut_outs: list[list[Image.Image]], rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Lay cut-outs on a part of a photograph.

    Args:
        photographs: RGB.
        cut_outs: RGBA, by class.
        rng: draws the photograph, its part, the classes, the cut-outs, their sizes, places and sides.

    Returns:
        The image, RGB, and its mask of class numbers, 0 for the photograph; both SIDE x SIDE.
    """
    photograph = photographs[rng.integers(len(photographs))]
    side = rng.integers(SIDE, min(photograph.size), endpoint=True)
    left, top = (rng.integers(pixels - side, endpoint=True) for pixels in photograph.size)
    image = photograph.resize((SIDE, SIDE), box=(left, top, left + side, top + side))
    mask = Image.new("L", image.size)
    for _ in range(rng.integers(MOST) + 1):
        label = int(rng.integers(len(cut_outs)))
        picture = cut_outs[label][rng.integers(len(cut_outs[label]))]
        scale = SIDE * rng.uniform(*SIZES) / max(picture.size)
        picture = picture.resize([max(1, round(scale * pixels)) for pixels in picture.size])
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x, y = (int(rng.integers(SIDE)) - pixels // 2 for pixels in picture.size)
        place = (x, y)
        image.paste(picture, place, picture)
        alpha = picture.getchannel("A")
        for least, value in ((OPAQUE[0], IGNORED), (OPAQUE[1], label + 1)):
            mask.paste(value, place, alpha.point(lambda a, least=least: 255 * (a >= least)))
    return image, mask


def main(args: argparse.Namespace) -> None:
    """Write both splits, and print what they hold.

    Raises:
        UserError: a package is not installed, or the folder exists or cannot be written.
    """
    photographs = [in_package("skimage", f"data/{name}") for name in PHOTOGRAPHS]
    folder, clipart = Path(args.folder), Path(args.clipart)
    pictures = [distinct(sorted((clipart / where).rglob("*.png"))) for where in CLASSES.values()]
    if not all(len(found) > 1 for found in pictures):
        raise UserError(f"--clipart {printable(clipart)} has no pictures: the head of the script says how to get them")
    with as_user_error(OSError, prefix=f"{printable(folder)}: "):
        folder.mkdir(parents=True)
        write_text(folder / "classes.txt", "\n".join(("photograph", *CLASSES)) + "\n")
        for number, split in enumerate(COUNTS):
            held_out = split == "val"  # the right half of photographs; every fourth cut-out, and the first
            halves = [half(path, right=held_out) for path in photographs]
            cut_outs = [[p for i, p in enumerate(found) if (i % 4 == 0) == held_out] for found in pictures]
            rng = np.random.default_rng(number)
            for kind in ("images", "annotations"):
                (folder / kind / split).mkdir(parents=True)
            for i in range(COUNTS[split]):
                image, mask = compose(halves, cut_outs, rng)
                image.save(folder / "images" / split / f"{i:04d}.jpg", quality=95)
                mask.save(folder / "annotations" / split / f"{i:04d}.png")
            counts = ", ".join(f"{len(found)} of {name}" for name, found in zip(CLASSES, cut_outs, strict=True))
            print(f"{printable(folder / 'images' / split)}: {COUNTS[split]} images with cut-outs ({counts})")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("cutouts.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=arguments.nonempty, metavar="FOLDER", help="new folder of the data set")
    text = "folder of Open Clip Art's PNG files (default: %(default)s)"
    parser.add_argument("--clipart", type=arguments.nonempty, default=CLIPART, metavar="FOLDER", help=text)
    return parser


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
