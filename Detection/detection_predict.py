"""Apply a detector to images without annotations: detections for tools/predict.py, pictures for tools/visualize.py."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from Detection.coco_metrics import json_of, to_found, to_records
from Detection.detection_data import Fit, NewImages
from Detection.detection_pictures import SHOWN, draw_detections, true_objects
from Detection.detection_results import detections_of, runs_of
from Detection.models_detect import Detector
from Evaluation.prediction_files import errors_of, list_images, shared, write_lines
from pretrained import Checkpoint
from util import arguments
from util.checkpoints.inspection import is_integer
from util.data.class_names import known_names
from util.data.decode import BrokenImage
from util.data.loaders import eval_loader
from util.data.pixels import Pixels
from util.data.sources.coco import CocoSource
from util.data.sources.image_files import FileList
from util.data.sources.source import Source
from util.distributed.processes import on_main
from util.errors import UserError, as_user_error
from util.files import printable
from util.tracking.run_log import Log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_detections(
    args: argparse.Namespace, found: Checkpoint, model: Detector, source: Source, device: torch.device, log: Log
) -> dict[int, str]:
    """Write the detections in every image as JSON in COCO's format for results, and a list of the images as CSV.

    The id of an image is its number, from 0; each detection also has the name of the file and of the class. The ids of
    the classes are those of the annotations that the detector was trained on, or count from 1 if the file has none.

    Args:
        args: of tools/predict.py.
        found: the checkpoint.
        model: its model, on the device.
        source: the images.
        device: of the model.
        log: of this rank.

    Returns:
        Why images have no result, by their number.

    Raises:
        RunError: no image has a result, or the files cannot be written.
    """
    names, assumed = known_names(found.class_names, model.num_classes, (), found.name)
    if assumed:
        log.say(assumed)
    if args.score is not None:
        model.roi_heads.score_thresh = args.score
    ids = category_ids(found, model.num_classes)
    loader = eval_loader(NewImages(source, Fit(arguments.image_size(args)), Pixels.of(args)), args, device)

    def lines() -> Iterator[tuple[dict[int, str], str]]:
        every = detections_of(model, loader, device, log, "images")
        for number, (target, one) in zip(loader.sampler.indices, every, strict=True):
            errors = errors_of(loader, source, [number], [bool(one["finite"])], "feature maps")
            records = []
            if not errors:
                coded = to_found(one["boxes"], one["scores"], one["labels"] - 1, runs_of(one, target))
                records = to_records(number, coded, ids)
                for record, label in zip(records, coded.labels, strict=True):
                    record |= {"file_name": source.name(number), "category_name": names[label]}
            yield errors, json_of(records) + "\n"

    with shared(args.output.with_suffix(".csv")) as listed:
        errors = write_lines(args, lines(), len(source.labels), joined_lists)
        on_main(lambda: list_images(args.output, listed, source, errors))
    return errors


def category_ids(found: Checkpoint, classes: int) -> np.ndarray:
    """Return the ids (classes,) int64 of a detector's classes in the annotations that it was trained on, else 1, 2 ...

    Raises:
        UserError: the checkpoint has other values.
    """
    saved = found.arguments.get("category_ids")
    if saved is None:
        return np.arange(1, classes + 1)
    if not isinstance(saved, list) or len(saved) != classes or not all(is_integer(number) for number in saved):
        raise UserError(f"{printable(found.name)} is damaged: its category_ids are no numbers of {classes} classes")
    return np.array(saved, np.int64)


def joined_lists(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield one list in JSON from lists, one a line: the elements of each stay on one line."""
    between = b"["
    for line in lines:
        if inner := line.strip()[1:-1]:
            yield between + inner
            between = b",\n"
    yield b"[]\n" if between == b"[" else b"]\n"


@torch.no_grad()
def draw_sheets(
    found: Checkpoint,
    images: Sequence[tuple[str, bytes]],
    annotated: Sequence[tuple[CocoSource, int] | None],
    device: torch.device,
    score: float | None = None,
) -> Iterator[Figure]:
    """Yield a picture of the detections in each image, with the true objects beside them where they are known.

    Args:
        found: the checkpoint.
        images: name and content of each file.
        annotated: of each image the source that knows its objects, and its number there.
        device: to compute on.
        score: least score of a detection that is drawn; None takes `SHOWN`.

    Raises:
        UserError: the checkpoint does not fit, an image cannot be decoded, or its objects are of other classes than the
            detector's; no picture is drawn then.
    """
    model = cast(Detector, found.load_model().to(device))
    least = SHOWN if score is None else score
    model.roi_heads.score_thresh = min(least, model.roi_heads.score_thresh)
    names, _ = known_names(found.class_names, model.num_classes, (), found.name)
    for source in {id(known[0]): known[0] for known in annotated if known is not None}.values():
        source.match(names, found.name)
    dataset = NewImages(FileList([]), Fit(found.input_size), found.pixels)
    samples = []
    for place, (name, data) in enumerate(images):
        with as_user_error(BrokenImage, prefix=f"{name}: "):
            samples.append(dataset.whole(data, place))
    for sample, known in zip(samples, annotated, strict=True):
        batch, targets = dataset.finish(dataset.collate([sample]), device)
        truth = None if known is None else true_objects(*known, model.has_masks)
        yield from draw_detections(model, batch, targets, names, found.pixels, [truth], least)
