"""Detect objects in images: their average precision over a source, and their form in COCO's format for results."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from Detection.coco_metrics import Results, encode
from Detection.models_detect import Detector, paste
from util.data.device_loader import DeviceLoader
from util.distributed.processes import gather
from util.distributed.signals import StopRequest
from util.errors import RunError
from util.tracking.run_log import Log
from util.training.evaluation import SHOWN, batches_of
from util.training.precision import autocast

LOGGER = logging.getLogger("arm")


def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    results: Results,
    device: torch.device,
    log: Log,
    title: str = "eval",
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """Detect objects in every image once, and measure the detections as COCO does.

    Args:
        model: the bare detector, or a sharded one.
        loader: of the images.
        results: gets the detections; its source is that of the images.
        device: of the model.
        log: of this rank.
        title: of the progress display.
        stop: may end the evaluation, see `batches_of`.

    Returns:
        See `Results.summary`; also `nonfinite`, if not 0, the number of images whose feature maps are not finite: they
        have no detections, and some are logged by name.

    Raises:
        RunError: an image is broken and the loader does not allow it, or no image has finite feature maps.
        Interrupted: `stop` received a signal.
    """
    bad = []
    for target, found in detections_of(cast(Detector, model), loader, device, log, title, stop):
        if target["index"] >= 0 and not found["finite"]:
            bad.append(results.source.name(target["index"]))
        results.add(target["index"], found["boxes"], found["scores"], found["labels"] - 1, runs_of(found, target))
    results.collect()
    names = [name for share in gather(bad) for name in share] if loader.sampler.distributed else bad
    for name in names[:SHOWN]:
        LOGGER.warning("feature maps that are not finite, so that nothing is detected: %s", name)
    if len(names) + results.broken == len(results.source.labels):
        what = f"the feature maps of all {len(names)} images are not finite: these weights detect nothing"
        raise RunError(what if names else f"all {results.broken} images are broken")
    return results.summary() | ({"nonfinite": len(names)} if names else {})


@torch.no_grad()
def detections_of(
    model: Detector, loader: DeviceLoader, device: torch.device, log: Log, title: str, stop: StopRequest | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the target of each image, and the detections in it: see `Detector.forward`."""
    for images, targets in batches_of(model, loader, log, title, stop):
        with autocast(device):
            found = model(images, targets)
        yield from zip(targets, found, strict=True)


def runs_of(found: dict[str, Any], target: dict[str, Any]) -> list[dict] | None:
    """Return the masks of detections in the original image as run lengths, None without masks."""
    if "masks" not in found:
        return None
    return [run for masks in paste(found, target["original"]) for run in encode(masks)]


def describe(result: dict[str, float]) -> str:
    """Return a result of `evaluate` as one line, without sizes of which there are no objects."""
    words = []
    for kind in ("box", "mask"):
        if f"{kind}_ap" in result:
            shown = {name: result[f"{kind}_ap{name}"] for name in ("50", "75", "_small", "_medium", "_large")}
            parts = [f"{name.lstrip('_')} {ap:.2f}" for name, ap in shown.items() if not math.isnan(ap)]
            words.append(f"{kind} AP {result[f'{kind}_ap']:.2f} % ({', '.join(parts)})")
    for kind, why in {"broken": "broken", "nonfinite": "with feature maps that are not finite"}.items():
        if kind in result:
            words.append(f"{result[kind]:.0f} images {why}, and so without detections")
    return ", ".join(words)
