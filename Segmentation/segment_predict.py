"""Apply a segmenter to images without masks: label maps for tools/predict.py, pictures for tools/visualize.py."""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image

from Evaluation.prediction_files import all_errors, errors_of, writing
from Evaluation.tables import csv_text
from pretrained import Checkpoint
from Segmentation.models_segment import LinearHead, UperNet
from Segmentation.segment_inference import Inference
from Segmentation.segmentation_data import Sample, SegmentationDataset, WholeImage, normalized
from Segmentation.segmentation_pictures import draw_overlays
from util.data import arrays, decode
from util.data.datasets import named_if_broken
from util.data.decode import BrokenImage, as_broken_image
from util.data.loaders import eval_loader
from util.data.pixels import Pixels
from util.data.sources.mask_folder import CLASSES, IGNORED, MaskFolder
from util.data.sources.source import Source
from util.distributed.processes import on_main
from util.errors import UserError, as_user_error
from util.files import open_regular, printable, replacing, some, write_text
from util.tracking.prediction_figures import visible
from util.tracking.run_log import Log
from util.training.evaluation import batches_of
from util.training.precision import autocast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIST = "maps.csv"  # beside the label maps, what each is of
COLUMNS = ("map", "file", "error")
INVERSE = {6: 8, 8: 6}  # orientations that are turned back by another one; all others by themselves
LETTERS = 200  # bytes of a name


class Unmasked(SegmentationDataset):
    """Whole images of a source without masks; every pixel of their masks is `IGNORED`."""

    def __init__(self, source: Source, transform: WholeImage) -> None:
        super().__init__(cast(MaskFolder, source), transform)
        self.whole = transform

    def sample(self, index: int) -> Sample:
        """Return an image and an empty mask of its size; raise `BrokenImage`, which names the image."""
        with named_if_broken(self.source, index):
            return whole(self.source.read(index), self.whole)


def whole(data: bytes, transform: WholeImage) -> Sample:
    """Return the content of an image file after a transform, and an empty mask (h, w); raise BrokenImage."""
    if transform.pixels.as_stored:
        shape = arrays.crop_of(data, lambda height, width: (0, 0, height, width), transform.pixels).shape[:2]
    else:
        with as_broken_image(), decode.opened(data) as image:
            shape = image.height, image.width
    return transform(data, np.full(shape, IGNORED, np.int16))


def values_of(found: Checkpoint, head: UperNet | LinearHead) -> np.ndarray:
    """Return the value that the masks of the training had for each output, (K,); without such a list its number."""
    outputs = head.num_classes
    saved = found.arguments.get("mask_values")
    values = np.array(saved if isinstance(saved, list) and len(saved) == outputs else range(outputs))
    if values.dtype.kind != "i" or values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise UserError(f"{printable(found.name)} is damaged: mask_values are no values of masks")
    return values.astype(np.uint8 if values.max() <= np.iinfo(np.uint8).max else np.uint16)


def names_of(found: Checkpoint, head: UperNet | LinearHead) -> list[str]:
    """Return the names of the outputs; without names their numbers."""
    return found.class_names or [str(output) for output in range(head.num_classes)]


def map_names(source: Source) -> list[str]:
    """Return the name of each image's label map, its own with the suffix .png; equal ones get numbers."""
    taken: dict[str, int] = {}
    names = []
    for index in range(len(source.labels)):
        stem = PurePath(source.name(index)).stem.encode()[:LETTERS].decode(errors="ignore") or "image"
        name = stem
        while name in taken:
            taken[stem] += 1
            name = f"{stem}-{taken[stem]}"
        taken[name] = 1
        names.append(f"{name}.png")
    return names


def check_folder(folder: Path, names: Sequence[str]) -> set[str]:
    """Create the folder of label maps; return the names of an earlier result's maps in it.

    Raises:
        UserError: it cannot be written, or would replace files that are of no earlier result.
    """
    about = f"--output {printable(folder)}"
    earlier: set[str] = set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LIST).exists():
            with open_regular(folder / LIST) as file:
                rows = [*csv.reader(file.read().decode(errors="replace").splitlines())]
            if rows[:1] != [[*COLUMNS]]:
                raise UserError(f"{about} holds {LIST}, which is no list of label maps: give another folder")
            earlier = {CLASSES, *(row[0] for row in rows[1:] if len(row) == len(COLUMNS))} - {""}
        present = {path.name for path in folder.iterdir()}
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{about} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if others := (present & {*names, CLASSES}) - earlier:
        raise UserError(f"{about} holds files that are no earlier result: {some(sorted(others))}; give another folder")
    return earlier & present


def write_maps(
    args: argparse.Namespace, found: Checkpoint, model: Any, source: Source, device: torch.device, log: Log
) -> dict[int, str]:
    """Write the classes of every image's pixels as a PNG with the values of the training's masks, and their list.

    A map has the size of its image as it is stored in the file. Each process writes those of its share.

    Args:
        args: of tools/predict.py; `output` is the folder.
        found: the checkpoint.
        model: its `Segmenter`, on the device.
        source: the images.
        device: of the model.
        log: of this rank.

    Returns:
        Why images have no map, by their number.

    Raises:
        UserError: the folder cannot be written, or holds other files; nothing is written then.
        RunError: no image has a map, or one cannot be written.
    """
    names, values, pixels = map_names(source), values_of(found, model.head), Pixels.of(args)
    earlier = on_main(lambda: check_folder(args.output, names))
    size = (args.input_size[0], args.input_size[-1])
    loader = eval_loader(Unmasked(source, WholeImage(size, pixels)), args, device)
    inference, seen = Inference(size, batch=args.batch_size), 0
    errors: dict[int, str] = {}
    for images, masks in batches_of(model, loader, log, "images"):
        for index, image, mask in zip(loader.sampler.indices[seen:], images, masks, strict=False):
            with torch.no_grad(), autocast(device):
                answer, finite = inference(model, image[None], (mask.shape[0], mask.shape[1]))
            if found_errors := errors_of(loader, source, [index], finite.tolist(), "logits"):
                errors |= found_errors
                continue
            turn = decode.orientation_of(source.read(index)) if pixels.exif else 1
            write_map(
                args.output / names[index], decode.turned(values[answer[0].cpu().numpy()], INVERSE.get(turn, turn))
            )
        seen += len(images)
    errors = all_errors(errors, len(names))

    def finish() -> None:
        rows = [["" if i in errors else name, source.name(i), errors.get(i, "")] for i, name in enumerate(names)]
        with writing(args.output):
            write_text(args.output / CLASSES, "\n".join(names_of(found, model.head)) + "\n")
            write_text(args.output / LIST, csv_text([COLUMNS, *rows]))
            for name in earlier - {CLASSES, *(row[0] for row in rows)}:
                (args.output / name).unlink(missing_ok=True)

    on_main(finish)
    return errors


def write_map(path: Path, labels: np.ndarray) -> None:
    """Write a label map (H, W) uint8 or uint16 as a PNG of one channel; raise RunError."""
    with writing(path), replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(labels)).save(temporary, "PNG")


def draw_sheets(found: Checkpoint, images: Sequence[tuple[str, bytes]], device: torch.device) -> Iterator[Figure]:
    """Yield a picture of the predicted classes of each image, a name and the content of a file.

    Raises:
        UserError: the checkpoint does not fit, or an image cannot be decoded; no picture is drawn then.
    """
    model: Any = found.load_model().to(device)
    transform = WholeImage(found.input_size, found.pixels)
    names, inference, samples = names_of(found, model.head), Inference(found.input_size), []
    for name, data in images:
        with as_user_error(BrokenImage, prefix=f"{name}: "):
            samples.append(whole(data, transform)[0])
    for sample in samples:
        image = normalized(sample, found.pixels, device)  # (C, h, w)
        with torch.no_grad(), autocast(device):
            answer, _ = inference(model, image[None], (image.shape[1], image.shape[2]))
        yield draw_overlays(visible(image, found.pixels), answer[0].cpu().numpy(), names)
