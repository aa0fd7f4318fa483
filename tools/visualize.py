"""Draw the predictions of a pretrained model, a detector or a segmenter on images.

    python tools/visualize.py ./out_b/checkpoint-1599.pth photo.jpg other.png --output sheets
    python tools/visualize.py ./out_detect_b/checkpoint-best.pth photo.jpg coco:/path/to/coco --output sheets

writes sheets/photo-sheet.png and sheets/other-sheet.png. A sheet of a pretrained model shows the input, its clusters in
the order of prediction, each cluster as predicted from the true clusters before it, and the loss of each patch. Images
of any size and mode are resized and cropped to its input. A sheet of a detector shows the whole image with the boxes
and masks that it finds; images of val in a place coco:FOLDER have the true ones beside them. A sheet of
a segmenter shows the whole image, and over it the predicted class of each pixel.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from util import arguments, cli
from util.checkpoints.hub import locate
from util.data.arrays import check_format
from util.data.decode import BrokenImage
from util.data.sources.coco import CocoSource, open_coco
from util.distributed.processes import init_device
from util.errors import RunError, UserError, as_user_error
from util.files import figure_of, open_regular, output_file, printable, save_figure
from util.seeding import seed_everything

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pretrained import Checkpoint

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.

TITLE = "ARM predictions"  # in the metadata of a sheet
MAX_BYTES = 2**30  # of an image file
COUNT = 8  # images of a place


class Shown(NamedTuple):
    """An image to draw: its file, the content of that, and where its objects are known, a source and its number."""

    path: Path
    data: bytes
    annotated: tuple[CocoSource, int] | None = None


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("visualize.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="checkpoint of pretraining, a detector or a segmenter")
    parser.add_argument("images", nargs="+", type=Path, help="image files, or coco:FOLDER")
    folder = "folder (default: the current)"
    parser.add_argument("--output", type=arguments.nonempty, default=".", metavar="DIR", help=folder)
    arguments.add_ignore_keys(parser)
    parser.add_argument("--score", type=arguments.rate, help="least score of a detection (default: 0.5)")
    parser.add_argument("--count", type=arguments.few, metavar="N", help="images of coco:FOLDER (default: 8)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is a GPU)")
    return parser


def read_image(path: Path) -> bytes:
    """Return the content of an image file.

    Raises:
        UserError: the file cannot be read, is no regular file, no image, or is larger than `MAX_BYTES`.
    """
    with as_user_error(OSError, BrokenImage, ValueError, prefix=f"{printable(path)}: "):
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise BrokenImage(f"it is larger than {MAX_BYTES} bytes")
        check_format(data)
        return data


def images_of(path: Path, count: int) -> list[Shown]:
    """Return an image file, or evenly spaced images of val in a place coco:FOLDER, `count` at most; raise UserError."""
    if not str(path).startswith("coco:"):
        return [Shown(path, read_image(path))]
    source = open_coco(str(path), "val")
    indices = range(0, len(source.labels), -(-len(source.labels) // count))
    files = [(Path(source.path(index)), index) for index in indices]
    return [Shown(file, read_image(file), (source, index)) for file, index in files]


def targets(args: argparse.Namespace, images: Sequence[Path]) -> list[Path]:
    """Return the path of each image's sheet; sheets of images with the same name get numbers.

    Raises:
        UserError: a file cannot be written, or is no sheet, or is the checkpoint or one of the images.
    """
    with as_user_error(OSError, ValueError, prefix=f"--output {printable(args.output)}: "):
        Path(args.output).mkdir(parents=True, exist_ok=True)
    seen: Counter[str] = Counter()
    paths = []
    for path in images:
        seen[path.stem] += 1
        number = f"-{seen[path.stem]}" if seen[path.stem] > 1 else ""
        target = Path(args.output, f"{path.stem}-sheet{number}.png")
        paths.append(output_file(target, figure_of(TITLE), args.checkpoint, *images))
    return paths


def draw_predictions(
    found: "Checkpoint", images: Sequence[tuple[str, bytes]], device: torch.device
) -> Iterator["Figure"]:
    """Yield the sheet of each image, a name and the content of a file, for a model of pretraining.

    Raises:
        UserError: the checkpoint predicts no images, or an image cannot be decoded; no sheet is drawn then.
    """
    from models_pretrain import PretrainModel
    from util.tracking import prediction_figures

    if not found.has_decoder:
        what = "has no decoder" if found.is_pretraining else f"is of {found.task}"
        raise UserError(
            f"{found.name} {what}: only checkpoints of pretraining, detection and segmentation can be drawn"
        )
    model = cast(PretrainModel, found.load_model().to(device))
    seed_everything(0)  # the same hidden patches and the same random order in each call
    imgs = []
    for name, image in images:
        with as_user_error(BrokenImage, prefix=f"{name}: "):
            imgs.append(found.read_image(image, "shorter")[None])  # (1, C, H, W)
    for img in imgs:
        yield from prediction_figures.draw_sheets(model, img.to(device), found.pixels)


def main(args: argparse.Namespace) -> None:
    """Write one sheet for each image.

    Raises:
        UserError: the checkpoint or an image cannot be read, or the folder cannot be written; nothing is written then.
        RunError: a sheet cannot be written.
    """
    images = [image for path in args.images for image in images_of(path, args.count or COUNT)]
    sheets = targets(args, [image.path for image in images])
    device = init_device(args.device)
    locate(args.checkpoint)

    import pretrained

    found = pretrained.read(args.checkpoint, ignore_keys=args.ignore_keys)
    named = [(printable(image.path), image.data) for image in images]
    if found.task == "detection":
        from Detection.detection_predict import draw_sheets

        figures = draw_sheets(found, named, [image.annotated for image in images], device, args.score)
    elif args.score is not None:
        raise UserError(f"--score is only for detection, not for {found.task}: leave it out")
    elif found.task == "segmentation":
        from Segmentation.segment_predict import draw_sheets as draw_maps

        figures = draw_maps(found, named, device)
    else:
        figures = draw_predictions(found, named, device)
    for figure, target in zip(figures, sheets, strict=True):
        try:
            save_figure(figure, target, TITLE)
        except OSError as error:
            raise RunError(f"--output {printable(target)} cannot be written: {error.strerror}") from error
        print(printable(target))


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
