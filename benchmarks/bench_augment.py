"""Time the training device's share of augmentation in finetuning: RandAugment, flip, normalisation, erasing.

    python benchmarks/bench_augment.py

Runs the recipe's policy with and without random erasing, which starts three small operators for each erased image. The
torch form of RandAugment is compared with the Triton kernels (`--fused_ops augment`) where these work; if their images
differ, the benchmark ends. Rounds interleave, and the median is reported: wall clock until the device has finished; on
a GPU also host time until the call returns, and time between two CUDA events. Measured on an H200: 0.06 ms an image for
the torch form, wall clock. Expected of the Triton kernels, not yet measured: below 0.02.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import make_parser
from ops import BackendUnavailable, fused, kernel_choice
from util import arguments, cli, hardware
from util.data.transforms import finetune_transform
from util.data.uint8_transform import Uint8Transform
from util.distributed.processes import init_device
from util.seeding import seed_everything

POLICY = "rand-m9-mstd0.5-inc1"
RECIPE = {"scale": [0.08, 1.0], "hflip": 0.5, "color_jitter": None, "aa": POLICY, "remode": "pixel", "recount": 1}
RATES = {"with_erasing": 0.25, "without_erasing": 0.0}
FORMS = {"torch": "none", "triton": "augment"}  # as --fused_ops names them


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    numbers = {"batch_size": (128, "images"), "rounds": (20, "timed calls, after three more")}
    parser = make_parser("bench_augment.py", __doc__, numbers)
    parser.add_argument("--input_size", type=arguments.pixels, default=224, help="(default: %(default)s)")
    return parser


def make_batch(reprob: float, batch: int, size: int) -> tuple[Uint8Transform, Tensor, Tensor]:
    """Return the recipe's transform, ramps under noise (B, H, W, 3) uint8, and each image's random numbers, float64."""
    seed_everything(0)
    transform = Uint8Transform(finetune_transform((size, size), argparse.Namespace(**RECIPE, reprob=reprob)))
    todo = torch.tensor([[number % 2, *transform.drawn(size, size)] for number in range(batch)], dtype=torch.float64)
    ramp = torch.linspace(0, 180, size)
    pixels = torch.randint(0, 70, (batch, size, size, 3)) + (ramp[:, None] + ramp)[:, :, None] / 2
    return transform, pixels.byte(), todo


def forms_of(device: torch.device) -> list[str]:
    """Return the forms that work on the device; print why the kernels do not."""
    try:
        fused.use([FORMS["triton"]], device)
    except BackendUnavailable as error:
        print(error)
        return ["torch"]
    return list(FORMS)


def finish(form: str, transform: Uint8Transform, pixels: Tensor, todo: Tensor, device: torch.device) -> Tensor:
    """Augment a batch on the device by one of `FORMS`: (B, H, W, 3) uint8 -> (B, 3, H, W) float32."""
    fused.use([FORMS[form]], device)
    kernel_choice.fuse_augmentation(transform)
    return transform.finish(pixels, todo, device)


def time_forms(calls: Mapping[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[str, dict]:
    """Return the median times of each form in seconds, by name of the clock."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
    for _ in range(rounds + 3):
        for name, call in calls.items():
            for clock, seconds in clocks(call, device).items():
                times[name].setdefault(clock, []).append(seconds)
    return {name: {clock: statistics.median(s[3:]) for clock, s in found.items()} for name, found in times.items()}


def clocks(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return the seconds of a call on each clock."""
    if device.type != "cuda":
        return {"wall": hardware.time_once(call, device)[0]}
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    returned = time.perf_counter()
    torch.cuda.synchronize(device)
    wall = time.perf_counter()
    return {"wall": wall - start, "host": returned - start, "event": hardware.time_once(call, device)[0]}


def launches(call: Callable[[], Tensor]) -> int:
    """Return the number of kernels that a call starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = (event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)


def main(args: argparse.Namespace) -> None:
    """Compare, time, print a table, write everything as JSON."""
    device = init_device(args.device)
    about = hardware.describe(device)
    output = hardware.result_file("augment", about, args.output)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    forms = forms_of(device)
    results: dict[str, dict[str, dict]] = {name: {} for name in forms}
    for erasing, rate in RATES.items():
        transform, pixels, todo = make_batch(rate, args.batch_size, args.input_size)
        if device.type == "cuda":
            pixels, todo = pixels.pin_memory(), todo.pin_memory()

        calls = {form: partial(finish, form, transform, pixels, todo, device) for form in forms}
        images = {form: call() for form, call in calls.items()}
        if any(not torch.equal(image, images["torch"]) for image in images.values()):
            raise RuntimeError("the two forms of RandAugment differ")
        found = time_forms(calls, device, args.rounds)
        print(f"\n{erasing.replace('_', ' ')}, ms an image")
        for form, seconds in found.items():
            row = {f"{clock}_ms_per_image": 1000 * s / args.batch_size for clock, s in seconds.items()}
            row["ms_per_image"] = row.pop("wall_ms_per_image")
            if device.type == "cuda":
                row["launches"] = launches(calls[form])
            results[form][erasing] = row
            print(f"{form:<8}" + ", ".join(f"{key.removesuffix('_ms_per_image')} {n:.4g}" for key, n in row.items()))
    setting = {"batch_size": args.batch_size, "input_size": args.input_size, "policy": POLICY}
    hardware.write(output, {**about, **setting, "forms": results, "same_bytes": True})


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
