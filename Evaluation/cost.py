"""Measure what a model costs: the time of one image and of a batch, and the memory that each needs.

The images are noise and lie on the device: reading, decoding and resizing are not part of it. Memory is measured by
this file as a program of its own, so that nothing else is in the process.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from util.hardware import time_once

if TYPE_CHECKING:
    from Evaluation.opened_models import OpenedModel

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WARM_UP = 3  # rounds that do not count
LEAST = 5  # rounds that do
CALLS = 20  # at most, by which the time of an image is first estimated
NO_PEAK = "this system does not tell the peak memory of a part of a process"


def noise(model: "OpenedModel", images: int) -> Tensor:
    """Return images (images, C, H, W) float32 of noise, on the device of the model."""
    shape = images, model.preparation.pixels.channels, *model.preparation.size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the `median`, the `least` and the `most` of some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def taken(model: "OpenedModel", imgs: Tensor) -> float:
    """Return the seconds that a model takes for images."""
    return time_once(lambda: model.compute(imgs), model.device)[0]


def measure_time(models: Sequence["OpenedModel"], batch: int, rounds: int, limit: float) -> list[dict]:
    """Time one image and a batch; in every round all models take turns, so that other work on the machine meets all.

    Args:
        models: to time.
        batch: images of a batch. It is halved until all rounds of a model take less than `limit` seconds, for all
            models alike.
        rounds: that count.
        limit: seconds for a model; of a single image, rounds are left out instead, down to `LEAST`.

    Returns:
        For each model `latency_ms` of one image and `images_per_second` of a batch, see `spread`; `batch`, and of each
        the number of `rounds`. A model that takes one image at a time has no `images_per_second`.
    """
    ones, seconds = [noise(model, 1) for model in models], []
    for model, one in zip(models, ones, strict=True):
        model.compute(one)  # compiles, and allocates memory
        calls: list[float] = []
        while len(calls) < WARM_UP or (sum(calls) < limit / 10 and len(calls) < CALLS):  # the machine may be busy
            calls.append(taken(model, one))
        seconds.append(min(calls))
    rounds = max(min(rounds, LEAST), min(rounds, int(limit / 4 / max(seconds)) - WARM_UP))
    while batch > 1 and batch * max(seconds) * (rounds + WARM_UP) > limit:
        batch //= 2
    times: list[dict[int, list[float]]] = [{1: [], batch: []} for _ in models]
    inputs = [
        {1: one, batch: noise(model, 1 if model.only_one else batch)} for model, one in zip(models, ones, strict=True)
    ]
    for number in range(rounds + WARM_UP):
        for model, imgs, found in zip(models, inputs, times, strict=True):
            for size in imgs:
                if size == 1 or not model.only_one:
                    value = taken(model, imgs[size])
                    if number >= WARM_UP:
                        found[size].append(value)
    rows = []
    for found in times:
        row: dict = {"latency_ms": spread([1000 * value for value in found[1]]), "batch": batch, "rounds": rounds}
        if found[batch]:
            row["images_per_second"] = spread([batch / value for value in found[batch]])
        rows.append(row)
    return rows


def measure_memory(name: str, batch: int, settings: dict, timeout: float) -> dict:
    """Return the peak memory of a process that opens a model and computes, beyond what it had before it opened it.

    On a GPU it is what torch has allocated there.

    Args:
        name: of the model, see `open_model`.
        batch: images of a batch.
        settings: further arguments of `open_model`, with `device` as text, and the `dtype` of activations.
        timeout: seconds after which the process is ended.

    Returns:
        `memory_mb`: megabytes by number of images, 1 and `batch`; or `memory_reason`: why there are none.
    """
    words = [sys.executable, __file__, json.dumps({"name": name, "batch": batch, **settings})]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout, check=True)
    except subprocess.TimeoutExpired:
        return {"memory_reason": f"it takes longer than {timeout:.0f} s"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return {"memory_reason": f"the process that measures it has failed: {lines[-1][:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def peaks(name: str, batch: int, device: str, dtype: str, **settings: str | None) -> dict:
    """Return in this process what `measure_memory` returns of another."""
    import argparse

    from Evaluation.opened_models import open_model
    from util.training import precision

    where = torch.device(device)
    precision.choose(argparse.Namespace(dtype=dtype), where)
    if Path(name).suffix == ".onnx":
        import onnxruntime  # noqa: F401 (a library's own memory is not the model's)
    on_gpu = where.type == "cuda"
    if not on_gpu and not RESET.exists():
        return {"memory_reason": NO_PEAK}
    before = 0 if on_gpu else resident("VmRSS")
    model = open_model(name, where, **settings)  # type: ignore[arg-type]
    if on_gpu and model.kind == "onnx":
        return {"memory_reason": "onnxruntime does not tell what it allocates on a GPU"}
    found = {}
    for images in dict.fromkeys((1, 1 if model.only_one else batch)):
        imgs = noise(model, images)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(where)
        else:
            RESET.write_text("5")  # VmHWM becomes VmRSS
        model.compute(imgs)
        peak = torch.cuda.max_memory_allocated(where) if on_gpu else resident("VmHWM") - before
        found[images] = peak / 1e6
    return {"memory_mb": found}


def resident(name: str) -> int:
    """Return a number of bytes of /proc/self/status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def measure(models: Sequence["OpenedModel"], batch: int, rounds: int, limit: float, settings: dict) -> list[dict]:
    """Return for each model what `measure_time` and `measure_memory` return together.

    The memory of a model is not measured where `limit` seconds do not suffice for its images.
    """
    rows = measure_time(models, batch, rounds, limit)
    for model, row in zip(models, rows, strict=True):
        expected = row["latency_ms"]["median"] / 1000 * (3 + row["batch"])
        if expected > limit:
            row["memory_reason"] = f"it takes about {expected:.0f} s"
        else:
            row |= measure_memory(model.name, row["batch"], settings, timeout=60 + 3 * limit)
    return rows


if __name__ == "__main__":
    print(json.dumps(peaks(**json.loads(sys.argv[1]))))
