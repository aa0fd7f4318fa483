"""Evaluate a detector's checkpoint, and write a report: its detections, numbers as JSON and CSV, a page."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from Detection.coco_metrics import Results, is_detections
from Detection.detection_data import DetectionDataset, Fit
from Detection.detection_results import describe, evaluate
from Detection.models_detect import Detector
from Evaluation.features import hash_of
from Evaluation.tables import csv_text, escaped, report_folder, starts_with, table
from pretrained import Checkpoint
from util import arguments, hardware
from util.checkpoints import checkpoint_file
from util.data.loaders import eval_loader
from util.data.pixels import Pixels
from util.data.sources.coco import CocoSource
from util.distributed.processes import on_main
from util.errors import RunError
from util.files import json_with, printable, write_json, write_text
from util.tracking.run_log import Log
from util.training.run_state import fingerprint

PAGE = "report.md"
MARK = "<!-- ARM detection -->\n"  # at the head of the page
CLASSES = ("weights", "class", "objects", "box_ap", "mask_ap")
ROWS = {
    "ap": "AP", "ap50": "AP at IoU 0.5", "ap75": "AP at IoU 0.75", "ap_small": "AP, small objects",
    "ap_medium": "AP, medium objects", "ap_large": "AP, large objects", "ar": "AR",
}  # fmt: skip
EXPLAINED = """
- AP is the mean precision over 101 recalls, classes and the IoU thresholds 0.50, 0.55 to 0.95, of up to 100 detections
  of each class in an image; AR is the highest recall, averaged over classes and thresholds (Lin et al. 2014).
- Small objects have up to 32 x 32 pixels, medium ones up to 96 x 96, by the areas that the annotations give.
- Broken images have no detections: their objects count as not found.
"""


def evaluate_checkpoint(
    args: argparse.Namespace, found: Checkpoint, model: Detector, val: CocoSource, device: torch.device, log: Log
) -> None:
    """Print the average precision of a checkpoint's weights and of their EMA, or of `args.model_key` alone.

    The report holds the detections of each, too.

    Raises:
        UserError: the checkpoint does not fit the model, or the report cannot be written.
        RunError: see `evaluate`; or the report cannot be written after all.
    """
    keys = [args.model_key] if args.model_key else checkpoint_file.weight_keys(found.content)
    folder = report_folder(args.output, found.name, report_files(keys or ["weights"]))
    size = arguments.image_size(args)
    loader = eval_loader(DetectionDataset(val, Fit(size), Pixels.of(args)), args, device)
    model.to(device)
    if args.compile:
        model.compile()
    objects = np.bincount(val.label_of[val.rows["category"]], minlength=len(val.classes)).tolist()
    about = (
        f"{len(val.labels)} images with {len(val.rows)} objects of {sum(map(bool, objects))} classes, fitted into "
        f"{' x '.join(map(str, size))} pixels"
    )
    log.say(about)
    rows = {}
    for key in keys or [None]:  # a bare state dict
        name = key or "weights"
        Checkpoint(found.name, found.content, key).load_into(cast(Any, model))
        results = Results(val, not args.boxes_only)
        result = evaluate(model, loader, results, device, log)
        log.say(f"{name}: {describe(result)}")
        rows[name] = {"weights": hash_of(cast(Any, model)), **result}
        with writing(folder):
            on_main(lambda: results.write(folder / f"detections-{name}.json"))  # noqa: B023
    content = {
        "checkpoint": printable(found.name),
        "about": about,
        "data": {"root": val.root, "images": len(val.labels), "fingerprint": fingerprint(val)},
        "class_names": val.classes,
        "objects": objects,
        "machine": hardware.describe(device),
        "results": rows,
        "args": {k: printable(v) if isinstance(v, (str, Path)) else v for k, v in vars(args).items()},
    }

    def write() -> None:
        write_json(folder / "report.json", content)
        write_text(folder / "classes.csv", csv_text([CLASSES, *class_rows(content)]))
        write_text(folder / PAGE, page(content))

    with writing(folder):
        on_main(write)
    log.say(f"report: {printable(folder / PAGE)}")


def report_files(keys: Sequence[str]) -> dict[str, Callable[[Path], bool]]:
    """Return the files of a report, and what tells that one in its place is of an earlier report."""
    return {
        PAGE: starts_with(MARK),
        "report.json": json_with(checkpoint=str, results=dict, class_names=list, objects=list, args=dict),
        "classes.csv": starts_with(csv_text([CLASSES])),
        **{f"detections-{key}.json": is_detections for key in keys},
    }


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of the system into one line about the report."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{printable(folder)} cannot be written: {error.strerror}") from error


def class_rows(content: dict) -> Iterator[Sequence]:
    """Yield the rows of classes.csv: every class for all weights; AP is empty for a class without objects."""
    for key, row in content["results"].items():
        for name, count in zip(content["class_names"], content["objects"], strict=True):
            precisions = [row.get(f"{kind}_ap/{name}", math.nan) for kind in ("box", "mask")]
            yield key, name, count, *(None if math.isnan(value) else value for value in precisions)


def page(content: dict) -> str:
    """Return the page, in Markdown."""
    rows = content["results"]
    kinds = [kind for kind in ("box", "mask") if all(f"{kind}_ap" in row for row in rows.values())]
    head = ["measure", *(escaped(f"{kind}, {key}") for key in rows for kind in kinds)]
    body = [
        [words, *(percent(row[f"{kind}_{name}"]) for row in rows.values() for kind in kinds)]
        for name, words in ROWS.items()
    ]
    classes = [
        [escaped(str(cell)) if place < 2 else percent(cell) if place > 2 else cell for place, cell in enumerate(row)]
        for row in class_rows(content)
    ]
    facts = {**content["machine"], "fingerprint of the images": content["data"]["fingerprint"]}
    facts |= {f"SHA-256 of {key}": row["weights"] for key, row in rows.items()}
    lines = [
        f"# Evaluation of {escaped(content['checkpoint'])}",
        f"{escaped(content['about'])}. The objects are those of {escaped(content['data']['root'])}.",
        table(head, *body),
        "All numbers: [JSON](report.json), [classes](classes.csv).",
        "## Classes",
        table([*CLASSES[:3], "box AP", "mask AP"], *classes),
        "## How the numbers are computed",
        EXPLAINED.strip(),
        "## Run",
        table(["what", "value"], *([name, escaped(str(value))] for name, value in facts.items())),
    ]
    return MARK + "\n\n".join(lines) + "\n"


def percent(value: float | None) -> str:
    """Return a value in percent as a cell of a table; empty for one that is unknown."""
    return "" if value is None or math.isnan(value) else f"{value:.2f} %"
