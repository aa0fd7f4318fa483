"""Compare libraries that compute COCO's metrics: their numbers, time, memory and what they need.

    python benchmarks/bench_coco.py

evaluates the same made-up detections with each: noisy copies of the objects, others of wrong classes, and equal scores.
torchmetrics keeps masks as tensors, and needs 12 MB for each image.
"""

import argparse
import contextlib
import io
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import make_parser
from util import cli, hardware
from util.data.sources.coco import mask_library

LIBRARIES = {  # the name of each module
    "pycocotools": "pycocotools",
    "faster-coco-eval": "faster_coco_eval",
    "torchmetrics": "torchmetrics",  # with faster-coco-eval, which does most of the work
}
KINDS = {"box": "bbox", "mask": "segm"}
CLASSES, HEIGHT, WIDTH, CORNERS = 80, 480, 640, 16
STATS = "map map_50 map_75 map_small map_medium map_large mar_1 mar_10 mar_100 mar_small mar_medium mar_large".split()


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    numbers = {
        "images": (1000, f"of {WIDTH} x {HEIGHT} pixels"),
        "objects": (7, "in an image"),
        "detections": (20, "in an image"),
        "rounds": (2, "evaluations by each library"),
    }
    return make_parser("bench_coco.py", __doc__, numbers, device=False)


def shape(rng: np.random.Generator, centre: np.ndarray, radius: float) -> dict:
    """Return box, area and mask of a polygon around a point (x, y)."""
    angles = np.sort(rng.random(CORNERS)) * 2 * np.pi
    points = centre + (radius * (0.6 + 0.4 * rng.random(CORNERS)) * [np.cos(angles), np.sin(angles)]).T
    (mask,) = mask_library().frPyObjects([points.clip(0, (WIDTH, HEIGHT)).ravel().tolist()], HEIGHT, WIDTH)
    box, area = mask_library().toBbox(mask).tolist(), float(mask_library().area(mask))
    return {"bbox": box, "area": area, "segmentation": mask | {"counts": mask["counts"].decode()}}


def make(images: int, objects: int, detections: int) -> tuple[dict, list[dict]]:
    """Return annotations and detections in COCO's format."""
    rng = np.random.default_rng(0)
    truth: list[dict] = []
    found: list[dict] = []
    for image_id in range(1, images + 1):
        centres = rng.random((objects, 2)) * (WIDTH, HEIGHT)
        radii = np.exp(rng.uniform(np.log(8), np.log(150), objects))
        for centre, radius in zip(centres, radii, strict=True):
            about = {"id": len(truth) + 1, "image_id": image_id, "category_id": int(rng.integers(1, CLASSES + 1))}
            truth.append(about | {"iscrowd": int(rng.random() < 0.02)} | shape(rng, centre, radius))
        for number in range(detections):
            like = number % objects
            noise = 1 + 0.15 * rng.standard_normal(3)
            category = truth[like - objects]["category_id"] if rng.random() < 0.7 else int(rng.integers(1, CLASSES + 1))
            made = shape(rng, centres[like] + radii[like] * (noise[:2] - 1), radii[like] * noise[2])
            score = float(np.float32(round(rng.random(), 2)))  # with float32, as models give it
            found.append({"image_id": image_id, "category_id": category, "score": score, **made})
    content = {
        "images": [{"id": number, "height": HEIGHT, "width": WIDTH} for number in range(1, images + 1)],
        "categories": [{"id": number, "name": str(number)} for number in range(1, CLASSES + 1)],
        "annotations": [row for row in truth if row["area"]],
    }
    return content, [row for row in found if row["area"]]


def evaluation(library: str, kind: str, truth: dict, found: list[dict]) -> Callable[[], list[float]]:
    """Return a function that evaluates once, and returns the numbers of `STATS`."""
    own = "bbox" if kind == "box" else "segmentation"  # with both, a library would take the box for the size of a mask
    records = [{key: row[key] for key in ("image_id", "category_id", "score", own)} for row in found]
    if library == "torchmetrics":
        return lambda: by_torchmetrics(kind, truth, records)
    if library == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

    def evaluate() -> list[float]:
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        metric = COCOeval(coco, coco.loadRes([dict(row) for row in records]), KINDS[kind])  # it adds to them
        metric.evaluate()
        metric.accumulate()
        metric.summarize()
        return [float(value) for value in metric.stats]

    return evaluate


def by_torchmetrics(kind: str, truth: dict, records: list[dict]) -> list[float]:
    """Evaluate image by image, with masks as tensors, as it is used."""
    from torchmetrics.detection import MeanAveragePrecision

    # those of COCO; its own are rounded to float32
    thresholds = {
        "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
        "rec_thresholds": np.linspace(0, 1, 101).tolist(),
    }
    metric = MeanAveragePrecision("xywh", KINDS[kind], backend="faster_coco_eval", **thresholds)
    metric.warn_on_many_detections = False
    rows: dict[int, tuple[list, list]] = {image["id"]: ([], []) for image in truth["images"]}
    for place, part in enumerate((records, truth["annotations"])):
        for row in part:
            rows[row["image_id"]][place].append(row)
    for own in rows.values():
        found, there = (tensors(kind, part) for part in own)
        metric.update([found], [there])
    result = metric.compute()
    return [result[name].item() for name in STATS]


def tensors(kind: str, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return an image's objects or detections as torchmetrics takes them."""
    columns = {"labels": torch.tensor([row["category_id"] for row in rows], dtype=torch.int64)}
    if kind == "box":
        columns["boxes"] = torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4)  # also if there are none
    else:
        masks = [mask_library().decode(row["segmentation"]) for row in rows]
        columns["masks"] = torch.tensor(np.array(masks, bool).reshape(-1, HEIGHT, WIDTH))  # also if there are none
    for name in ("score", "iscrowd", "area"):
        if rows and name in rows[0]:
            columns["scores" if name == "score" else name] = torch.tensor([row[name] for row in rows])
    return columns


def measure(library: str, kind: str, numbers: list[int], rounds: int) -> dict:
    """Return seconds and numbers of a library, and by how much the memory of this process grew."""
    evaluate = evaluation(library, kind, *make(*numbers))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, stats = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            stats = evaluate()
        seconds.append(time.perf_counter() - began)
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "more_megabytes": megabytes, "stats": dict(zip(STATS, stats, strict=True))}


def apart(call: Callable[[], dict]) -> dict:
    """Return what a function returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call).result()


def main(args: argparse.Namespace) -> None:
    """Evaluate by every library, print a line for each, write everything as JSON."""
    numbers = [args.images, args.objects, args.detections]
    settings = {"images": args.images, "objects": args.objects, "detections": args.detections}
    report = hardware.Report("coco-metrics", torch.device("cpu"), args.output, **settings)
    for kind in KINDS:
        expected: dict[str, float] = {}
        for library, module in LIBRARIES.items():
            work = partial(apart, partial(measure, library, kind, numbers, args.rounds))
            about = {"library": library, "kind": kind}
            row = report.add(f"{library}, {kind}", about, work if find_spec(module) else f"pip install {library}")
            if row is None:
                continue
            expected = expected or row["stats"]
            row["differs_at_most"] = max(abs(row["stats"][name] - expected[name]) for name in STATS)
            row |= {"version": version(library), "needs": [n for n in requires(library) or [] if "extra ==" not in n]}
            report.save()
            seconds = min(row["seconds"])
            print(
                f"{f'{library}, {kind}':<{hardware.WIDTH}}{seconds:>8.2f} s{row['more_megabytes']:>8.0f} MB, AP "
                f"{100 * row['stats']['map']:.2f}, differs by {row['differs_at_most']:.0e}",
                flush=True,
            )
    report.close()


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
