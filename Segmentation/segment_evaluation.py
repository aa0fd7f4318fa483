"""Evaluate a segmenter: exact counts of pixels over all processes, and a report."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from Evaluation.features import hash_of
from Evaluation.iou import Confusions
from Evaluation.tables import csv_text, escaped, report_folder, starts_with, table
from pretrained import Checkpoint
from Segmentation.segment_inference import RATIOS, Inference
from util import arguments, hardware
from util.checkpoints import checkpoint_file
from util.data.device_loader import DeviceLoader
from util.data.sources.mask_folder import MaskFolder
from util.distributed.processes import gather, on_main, reduce_sum
from util.distributed.signals import StopRequest
from util.errors import RunError
from util.files import json_with, printable, write_json, write_text
from util.tracking.run_log import Log
from util.training.evaluation import SHOWN, batches_of
from util.training.precision import autocast
from util.training.run_state import fingerprint

LOGGER = logging.getLogger("arm")
CLASSES = ("weights", "class", "iou", "acc", "pixels", "predicted")  # columns of classes.csv
FILES = {  # of a report, and what tells that one in its place is of an earlier report
    "report.json": json_with(checkpoint=str, results=dict, class_names=list, args=dict),
    "classes.csv": starts_with(csv_text([CLASSES])),
}
LISTED = 30  # classes that are printed; of more, the best and the worst


def inference_of(args: argparse.Namespace) -> Inference:
    """Return the inference that a command line describes: `inference`, `multi_scale`, `input_size`, `batch_size`."""
    ratios = RATIOS if args.multi_scale else (1.0,)
    return Inference(arguments.image_size(args), args.inference, ratios, args.multi_scale, args.batch_size)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    title: str = "eval",
    stop: StopRequest | None = None,
    *,
    loader: DeviceLoader,
    inference: Inference,
    names: Sequence[str],
    device: torch.device,
    log: Log,
) -> dict:
    """Count the pixels of every image once, in the size of its mask.

    Args:
        model: the bare segmenter, or a sharded one.
        title: of the progress display.
        stop: may end the evaluation.
        loader: of lists of images and masks; see `batches_of`.
        inference: how images pass the model.
        names: of the classes.
        device: of the model.
        log: of this rank.

    Returns:
        See `Confusions.summary`; also `images`, their number, and `nonfinite`, if not 0, that of images with logits
        that are not finite. Their pixels have no answer, and so count as wrong; some of them are logged by name.

    Raises:
        RunError: an image is broken; or no image has finite logits, or no pixel a class.
        Interrupted: `stop` received a signal.
    """
    confusions = Confusions(len(names), device)
    bad = [torch.zeros(0, dtype=torch.bool, device=device)]  # for each image in order, whether its logits are
    for images, masks in batches_of(model, loader, log, title, stop):
        for image, mask in zip(images, masks, strict=True):
            with autocast(device):
                answer, finite = inference(model, image[None], (mask.shape[0], mask.shape[1]))
            confusions.add(answer[0].masked_fill(~finite, -1), mask)
            bad.append(~finite)
    of_images = torch.cat(bad)
    count = reduce_sum(torch.stack([of_images.sum(), of_images.new_tensor(len(of_images), dtype=torch.int64)]))
    nonfinite, images = count.tolist()
    if nonfinite == images:
        raise RunError(f"the logits of all {images} images are not finite: these weights cannot be evaluated")
    if nonfinite:
        places = of_images.nonzero().flatten().tolist()[:SHOWN]
        for name in [name for share in gather(loader.names(places)) for name in share][:SHOWN]:
            LOGGER.warning("logits that are not finite: %s", name)
    result = confusions.summary(names)
    if not result["pixels"]:
        raise RunError(f"no pixel of the {images} masks has a class")
    return result | {"images": images} | ({"nonfinite": nonfinite} if nonfinite else {})


def numbers(result: dict) -> dict[str, float]:
    """Return those of a result's values that are curves in the log of a run."""
    return {name: value for name, value in result.items() if name not in ("classes", "pixels")}


def describe(result: dict) -> str:
    """Return a result of `evaluate` as one line."""
    wrong = f", {result['nonfinite']} of them with logits that are not finite" if "nonfinite" in result else ""
    return (
        f"mIoU {result['miou']:.2f} %, pixel accuracy {result['pixel_acc']:.2f} %, mean class accuracy "
        f"{result['mean_acc']:.2f} % on {result['images']} images{wrong}"
    )


def evaluate_checkpoint(
    args: argparse.Namespace,
    found: Checkpoint,
    model: Any,
    source: MaskFolder,
    loader: DeviceLoader,
    device: torch.device,
    log: Log,
) -> None:
    """Print the numbers of a checkpoint's weights and of their EMA, or of `args.model_key` alone; write the report.

    `model` is a `Segmenter`; `loader` has the images of `source`.

    Raises:
        UserError: the checkpoint does not fit the model, or the report cannot be written.
        RunError: see `evaluate`; or the report cannot be written after all.
    """
    keys = [args.model_key] if args.model_key else checkpoint_file.weight_keys(found.content)
    folder, inference = report_folder(args.output, found.name, FILES), inference_of(args)
    model.to(device)
    if args.compile:
        model.compile()
    about = f"{len(source.labels)} images, {len(source.classes)} classes; {inference}"
    log.say(about)
    rows = {}
    for key in keys or [None]:  # a bare state dict
        Checkpoint(found.name, found.content, key).load_into(model)
        result = evaluate(model, loader=loader, inference=inference, names=source.classes, device=device, log=log)
        log.say(f"{key or 'weights'}: {describe(result)}\n{class_table(result['classes'])}")
        rows[key or "weights"] = {"weights": hash_of(model), **result}
    content = {
        "checkpoint": printable(found.name),
        "about": about,
        "data": {"root": source.root, "images": len(source.labels), "fingerprint": fingerprint(source)},
        "class_names": source.classes,
        "machine": hardware.describe(device),
        "results": rows,
        "args": {k: printable(v) if isinstance(v, (str, Path)) else v for k, v in vars(args).items()},
    }
    on_main(lambda: write_report(folder, content))
    log.say(f"report: {printable(folder)}")


def write_report(folder: Path, content: dict) -> None:
    """Write the files of a report; raise RunError."""
    lines = [
        [key, *(line[column] for column in ("name", *CLASSES[2:]))]
        for key, row in content["results"].items()
        for line in row["classes"]
    ]
    try:
        write_json(folder / "report.json", content)
        write_text(folder / "classes.csv", csv_text([CLASSES, *lines]))
    except OSError as error:
        raise RunError(f"{printable(folder)} cannot be written: {error.strerror}") from error


def class_table(rows: Sequence[dict]) -> str:
    """Return the classes that occur as a table, the highest IoU first; of more than `LISTED`, both ends of it."""
    known = sorted((row for row in rows if row["iou"] is not None), key=lambda row: -row["iou"])
    half = LISTED // 2
    parts = [known] if len(known) <= LISTED else [known[:half], known[-half:]]
    lines: list[list] = [["class", "IoU", "accuracy", "pixels"]]
    for part in parts:
        lines += [["...", "", "", ""]] * (len(lines) > 1)
        for row in part:
            accuracy = "" if row["acc"] is None else f"{row['acc']:.2f} %"
            lines.append([escaped(row["name"]), f"{row['iou']:.2f} %", accuracy, row["pixels"]])
    return table(*lines)
