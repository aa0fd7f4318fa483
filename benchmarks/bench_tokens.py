"""Compare time and memory of the encoder with those of a ViT of the same width and depth, over the size of the images.

    OMP_NUM_THREADS=1 python benchmarks/bench_tokens.py --plot tokens.png
    python benchmarks/bench_tokens.py --device cuda --width base

Both compute features of random images with patches of 16 pixels: ARM's encoder with four directions (as finetuned) and
with one (as pretrained), and timm's ViT, whose attention is torch's `scaled_dot_product_attention`. The scan is linear
in the number of tokens, attention quadratic. "train" is a forward and a backward pass to all parameters. Rounds
interleave the models, and the median is reported. On a GPU, times are between two CUDA events, under bfloat16 autocast,
with compiled blocks, and memory is the peak that torch has allocated. On a CPU, times are CPU time, which other
processes disturb less than wall clock, in float32; memory is the peak that is resident in a fresh process for each
pass. Memory is counted above weights and images.
"""

import argparse
import ctypes
import gc
import math
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models_arm
from benchmarks.command_line import make_parser
from models_classifier import ARMClassifier
from ops import fused
from util import arguments, cli, hardware
from util.distributed.processes import init_device
from util.errors import UserError
from util.files import figure_of, output_file, save_figure

MODELS = ("ARM, 4 directions", "ARM, 1 direction", "ViT")
WIDTHS = ("tiny", "small", "base")
PASSES = ("forward", "train")
PIXELS = (224, 384, 512, 768, 1024, 1280, 1536)
PATCH = 16
TITLE = "ARM tokens"  # of the figure


def build(name: str, width: str, pixels: int, device: torch.device) -> nn.Module:
    """Build the model of a name of `MODELS`, without a head, for images of `pixels` a side."""
    torch.manual_seed(0)
    with device:
        if name == "ViT":
            return timm.create_model(f"vit_{width}_patch{PATCH}_224", img_size=pixels, num_classes=0)
        directions = int(name.split()[1])
        return models_arm.create_classifier(
            f"arm_{width}_pz{PATCH}", img_size=pixels, num_classes=0, directions=directions
        )


def blocks_of(model: nn.Module) -> Iterable[nn.Module]:
    """Return the blocks of ARM's encoder or of the ViT."""
    return cast(Iterable[nn.Module], model.layers if isinstance(model, ARMClassifier) else model.blocks)


def run_pass(model: Any, images: Tensor, kind: str) -> None:
    """Compute features of images, and for "train" all gradients, which are dropped."""
    half = torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext()
    try:
        with half, torch.set_grad_enabled(kind == "train"):
            loss = model.forward_features(images).float().square().mean()
        if kind == "train":
            loss.backward()
    finally:  # also where memory does not suffice
        model.zero_grad()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes: on a GPU by CUDA events, otherwise of the CPU, all threads together."""
    if device.type == "cuda":
        return hardware.time_once(call, device)[0]
    began = time.process_time()
    call()
    return time.process_time() - began


def resident() -> dict[str, int]:
    """Return the bytes of memory that this process holds now (VmRSS), and has held at most (VmHWM); Linux only."""
    status = Path("/proc/self/status").read_text()
    return {key: 1024 * int(kilobytes) for key, kilobytes in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.M)}


def resident_peak(name: str, width: str, pixels: int, batch: int, kind: str) -> int:
    """Return the bytes that a pass on the CPU needs at most, in a process that does nothing else before or beside."""
    cpu = torch.device("cpu")
    run_pass(build(name, width, 2 * PATCH, cpu), torch.randn(1, 3, 2 * PATCH, 2 * PATCH), kind)  # loads what it calls
    model, images = build(name, width, pixels, cpu), torch.randn(batch, 3, pixels, pixels)
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc: gives back what is free
        trim(0)
    before = resident()["VmRSS"]
    run_pass(model, images, kind)
    return resident()["VmHWM"] - before


def allocated_peak(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that a pass on a GPU needs at most."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def time_passes(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float] | None]:
    """Return the seconds of each call in each round, after one more; None for a call that runs out of memory."""
    times: dict[str, list[float] | None] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            of_name = times[name]
            if of_name is None:
                continue
            try:
                of_name.append(seconds_of(call, device))
            except torch.OutOfMemoryError:
                times[name] = None
                gc.collect()
                torch.cuda.empty_cache()
    return {name: seconds and seconds[1:] for name, seconds in times.items()}


def measure(pixels: int, args: argparse.Namespace) -> dict[str, dict]:
    """Return, for each model and pass, the seconds and the peak bytes of an image, or `out_of_memory`."""
    gpu = args.device.type == "cuda"
    torch._dynamo.reset()
    images = torch.randn(args.batch_size, 3, pixels, pixels, device=args.device)
    models = {name: build(name, args.width, pixels, args.device) for name in args.models}
    found: dict[str, dict[str, dict]] = {name: {} for name in models}
    if gpu and not args.no_compile:
        for model in models.values():
            for block in blocks_of(model):
                block.compile(**fused.compile_options())
    for kind in PASSES:
        calls = {name: partial(run_pass, model, images, kind) for name, model in models.items()}
        for name, times in time_passes(calls, args.rounds, args.device).items():
            if times is None:
                found[name][kind] = {"out_of_memory": True}
                continue
            sizes = (name, args.width, pixels, args.batch_size, kind)
            peak = allocated_peak(calls[name], args.device) if gpu else in_fresh_process(resident_peak, *sizes)
            times = [seconds / args.batch_size for seconds in times]
            row = {"seconds": statistics.median(times), "seconds_of_rounds": times}
            found[name][kind] = row | {"peak_bytes": peak and peak / args.batch_size}
    return {"models": found}


def in_fresh_process(function: Callable[..., int], *words: object) -> int | None:
    """Return what a function returns in a process of its own; None where processes do not tell their memory."""
    if not Path("/proc/self/status").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"benchmarks.{Path(__file__).stem}"])  # imported once, not for each pass
    with context.Pool(1) as pool:
        return pool.apply(function, words)


def show(row: dict) -> None:
    """Print the lines of an image size."""
    for name, passes in row["models"].items():
        cells = []
        for found in (passes[kind] for kind in PASSES):
            if "out_of_memory" in found:
                cells += ["memory", "-", "-"]
                continue
            peak = found["peak_bytes"]
            cells += [f"{found['seconds']:.4f}", f"{1e6 * found['seconds'] / row['tokens']:.1f}"]
            cells.append(f"{peak / 1e6:.0f}" if peak else "-")
        print(
            f"{row['pixels']:>6}{row['tokens']:>7}  {name:<18}" + "".join(f"{cell:>10}" for cell in cells), flush=True
        )


def growth(rows: list[dict]) -> None:
    """Print how time and memory have grown from the smallest to the largest images, as a power of the tokens."""
    first, last = rows[0], rows[-1]
    ratio = math.log(last["tokens"] / first["tokens"])
    print(f"\npower of the tokens with which it grows, {first['pixels']} to {last['pixels']} pixels:")
    for name in first["models"]:
        ends = [[row["models"][name][kind] for row in (first, last)] for kind in PASSES]
        cells = [
            f"{key} {kind} {math.log(end[key] / start[key]) / ratio:.2f}"
            for key in ("seconds", "peak_bytes")
            for kind, (start, end) in zip(PASSES, ends, strict=True)
            if start.get(key) and end.get(key)
        ]
        print(f"  {name:<18}" + ", ".join(cells).replace("_bytes", ""))


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Draw time and memory over the tokens, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = dict(zip(MODELS, ("tab:orange", "tab:green", "tab:blue"), strict=True))
    scales = (("seconds", 1, "seconds an image"), ("peak_bytes", 1e6, "peak memory, MB an image"))
    for axis, (key, unit, label) in zip(axes, scales, strict=True):
        for name in rows[0]["models"]:
            for kind, style in zip(PASSES, ("--", "-"), strict=True):
                points = [(row["tokens"], row["models"][name][kind].get(key)) for row in rows]
                drawn = [(tokens, value / unit) for tokens, value in points if value]
                shown = f"{name}, {'forward' if kind == 'forward' else 'forward and backward'}"
                if drawn:
                    axis.loglog(*zip(*drawn, strict=True), style, color=colours[name], marker=".", label=shown)
        axis.set_xticks([row["tokens"] for row in rows], [f"{row['pixels']}²\n{row['tokens']:,}" for row in rows])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set(xlabel="pixels, tokens", ylabel=label)
        axis.tick_params(axis="x", labelsize=7)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, TITLE, dpi=120)


def main(args: argparse.Namespace) -> None:
    """Measure each image size, print a table, write everything as JSON, and draw it if asked to."""
    args.device = init_device(args.device)
    gpu = args.device.type == "cuda"
    args.width, args.batch_size = args.width or ("base" if gpu else "tiny"), args.batch_size or (8 if gpu else 1)
    if wrong := [size for size in args.pixels if size % PATCH or size < 2 * PATCH]:
        raise UserError(f"--pixels {wrong[0]}: it does not divide into two or more patches of {PATCH} pixels")
    if args.plot is not None:
        if args.plot.suffix.lower() != ".png":
            raise UserError(f"--plot {args.plot}: it has to end in .png")
        output_file(args.plot, figure_of(TITLE), flag="--plot")
    settings = {"width": args.width, "batch_size": args.batch_size, "compiled": gpu and not args.no_compile}
    report = hardware.Report("tokens", args.device, args.output, **settings, clock="cuda events" if gpu else "cpu time")
    print(f"{'':<33}{'forward: s':>10}{'us/token':>10}{'MB':>10}{'train: s':>10}{'us/token':>10}{'MB':>10}")
    rows = []
    for pixels in sorted(args.pixels):
        row: dict = {"pixels": pixels, "tokens": (pixels // PATCH) ** 2}
        if report.add(f"{pixels} pixels", row, partial(measure, pixels, args)):
            show(row)
            rows.append(row)
    if len(rows) > 1:
        growth(rows)
    if args.plot is not None and rows:
        about = hardware.describe(args.device)
        title = f"ARM and ViT of the same width ({args.width}) and depth, {about.get('gpu', about['cpu'])}"
        draw(rows, title if gpu else f"{title}, {about['threads']} thread{'s' * (about['threads'] != 1)}", args.plot)
        print(f"drawn to {args.plot}")
    report.close()


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    numbers = {
        "batch_size": (None, "images (default: 1 on a CPU, 8 on a GPU)"),
        "rounds": (3, "timed passes of each model, after one more"),
    }
    parser = make_parser("bench_tokens.py", __doc__, numbers)
    parser.add_argument("--width", choices=WIDTHS, help="of the models (default: tiny on a CPU, base on a GPU)")
    text = "a side of the images (default: %(default)s)"
    parser.add_argument("--pixels", type=arguments.pixels, nargs="+", default=PIXELS, help=text)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all")
    parser.add_argument("--no_compile", action="store_true", help="run the blocks eagerly on a GPU, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG file to draw")
    return parser


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
