"""Draw the predictions of a pretrained model on images.

    python tools/visualize.py ./out_b/checkpoint-1599.pth photo.jpg other.png --output sheets

writes sheets/photo-sheet.png and sheets/other-sheet.png. A sheet shows the input, its clusters in the order of
prediction, each cluster as predicted from the true clusters before it, and the loss of each patch. Images of any size
and mode are resized and cropped to the model's input.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util import arguments, cli
from util.checkpoints.hub import locate
from util.data.arrays import check_format
from util.data.decode import BrokenImage
from util.distributed.processes import init_device
from util.errors import RunError, UserError, as_user_error
from util.files import figure_of, open_regular, output_file, printable, save_figure
from util.seeding import seed_everything

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.

TITLE = "ARM predictions"  # in the metadata of a sheet
MAX_BYTES = 2**30  # of an image file


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("visualize.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="checkpoint of pretraining")
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    folder = "folder (default: the current)"
    parser.add_argument("--output", type=arguments.nonempty, default=".", metavar="DIR", help=folder)
    arguments.add_ignore_keys(parser)
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


def targets(args: argparse.Namespace) -> list[Path]:
    """Return the path of each image's sheet; sheets of images with the same name get numbers.

    Raises:
        UserError: a file cannot be written, or is no sheet, or is the checkpoint or one of the images.
    """
    with as_user_error(OSError, ValueError, prefix=f"--output {printable(args.output)}: "):
        Path(args.output).mkdir(parents=True, exist_ok=True)
    seen: Counter[str] = Counter()
    paths = []
    for path in args.images:
        seen[path.stem] += 1
        number = f"-{seen[path.stem]}" if seen[path.stem] > 1 else ""
        target = Path(args.output, f"{path.stem}-sheet{number}.png")
        paths.append(output_file(target, figure_of(TITLE), args.checkpoint, *args.images))
    return paths


def main(args: argparse.Namespace) -> None:
    """Write one sheet for each image.

    Raises:
        UserError: the checkpoint or an image cannot be read, or the folder cannot be written; nothing is written then.
        RunError: a sheet cannot be written.
    """
    images = [read_image(path) for path in args.images]
    sheets = targets(args)
    device = init_device(args.device)
    locate(args.checkpoint)

    import pretrained
    from models_pretrain import PretrainModel
    from util.tracking import prediction_figures

    found = pretrained.read(args.checkpoint, ignore_keys=args.ignore_keys)
    if not found.has_decoder:
        what = "has no decoder" if found.is_pretraining else "is of a classifier"
        raise UserError(f"{found.name} {what}: only a pretraining checkpoint predicts images")
    model = cast(PretrainModel, found.load_model().to(device))
    seed_everything(0)  # the same hidden patches and the same random order in each call
    imgs = []
    for path, image in zip(args.images, images, strict=True):
        with as_user_error(BrokenImage, prefix=f"{printable(path)}: "):
            imgs.append(found.read_image(image, "shorter")[None])  # (1, C, H, W)
    for img, target in zip(imgs, sheets, strict=True):
        (figure,) = prediction_figures.draw_sheets(model, img.to(device), found.pixels)
        try:
            save_figure(figure, target, TITLE)
        except OSError as error:
            raise RunError(f"--output {printable(target)} cannot be written: {error.strerror}") from error
        print(printable(target))


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
