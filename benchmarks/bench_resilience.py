"""Measure the overhead of fault tolerance: in training steps, compared with a bare loop, and in saving checkpoints.

    python benchmarks/bench_resilience.py
    torchrun --standalone --nproc_per_node 2 benchmarks/bench_resilience.py

The bare loop is forward, backward, clipping and optimizer step. `util.training.loop.train_epoch` adds a seed for every
step, skips updates that are not finite, logs losses and gradient norms, and asks all processes whether one was told to
stop. A checkpoint of ARM-base with AdamW's moments is saved by `CheckpointFolder`, in the background, and for
comparison by torch.save and fsync.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_train import CASES, RandomBatches, build, loop_args
from benchmarks.command_line import fitting, make_parser
from engine_pretrain import loss_of, train_one_epoch
from util import cli, hardware
from util.checkpoints.checkpoint_folder import LAST, CheckpointFolder
from util.distributed.parallel import distribute
from util.distributed.processes import init_device, is_main, on_main, world_size
from util.tracking.run_log import Log
from util.training.precision import autocast
from util.training.run_state import Run


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    numbers = {
        "batch_size": (None, "instead of the recipe's"),
        "steps": (40, "updates in a round"),
        "rounds": (15, "timed rounds, after one more"),
    }
    parser = make_parser("bench_resilience.py", __doc__, numbers, device=False)
    choices = [name for name in CASES if name.startswith("pretrain")]
    parser.add_argument("--case", choices=choices, default=fitting(["pretrain_toy", "pretrain_base"])[0])
    return parser


def step_times(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the seconds of an update in `train_epoch` and in the bare loop, and the median of their ratios."""
    case = CASES[args.case]._replace(batch_size=args.batch_size)
    bare = build(case, "auto", device)
    model = distribute(bare, device)
    batches = RandomBatches(case.batch_size, case.img_size, 1, args.steps, device)
    compute_loss, parameters = loss_of(model), list(bare.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    loop = loop_args(case)
    run = Run(loop, bare, optimizer)

    def watched() -> None:
        run.samples = 0
        train_one_epoch(model, batches, run, device, Log())

    def unwatched() -> None:
        model.train()
        for batch in batches:
            with autocast(device):
                loss = compute_loss(*batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, loop.clip_grad)
            optimizer.step()
            optimizer.zero_grad()

    times: dict[str, list[float]] = {"train_epoch": [], "bare": []}
    for number in range(args.rounds + 1):
        pair = (("train_epoch", watched), ("bare", unwatched))
        for name, function in pair if number % 2 else reversed(pair):
            times[name].append(hardware.time_once(function, device)[0] / args.steps)
    times["ratio"] = [a / b for a, b in zip(*times.values(), strict=True)]
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def save_times(device: torch.device) -> dict[str, float]:
    """Return the seconds of saving ARM-base with the moments of AdamW, and the size of the file."""
    case = CASES["pretrain_base"]
    model = build(case, "auto", device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0, "samples": 0}
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        start = time.perf_counter()
        torch.save(content, Path(temporary, "alone.pth"))
        with Path(temporary, "alone.pth").open("rb") as file:
            os.fsync(file.fileno())
        times = {"torch.save and fsync": time.perf_counter() - start}
        folder = CheckpointFolder(Path(temporary), 2, print)
        for which in ("first", "later"):
            start = time.perf_counter()
            folder.save(content)
            times[f"seen by training, {which}"] = time.perf_counter() - start
            folder.close()
            times[f"until it is written, {which}"] = time.perf_counter() - start
        times["megabytes"] = Path(temporary, LAST).stat().st_size / 1e6
    return times


def main(args: argparse.Namespace) -> None:
    """Measure, print, write everything as JSON."""
    device = init_device(None)
    args.batch_size = args.batch_size or CASES[args.case].batch_size
    about = hardware.describe(device) | {"processes": world_size(), "case": args.case, "batch_size": args.batch_size}
    kind = "resilience" if world_size() == 1 else f"resilience-{world_size()}"
    output = on_main(lambda: hardware.result_file(kind, about, args.output))
    steps = step_times(args, device)
    if not is_main():
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    bare, ours = (1000 * steps[name] for name in ("bare", "train_epoch"))
    print(f"{args.case}: {bare:.3f} ms a step bare, {ours:.3f} ms in train_epoch")
    print(f"ratio of the pairs, median of {args.rounds}: {steps['ratio']:.4f}")
    saves = save_times(device) if world_size() == 1 else {}
    for name, seconds in saves.items():
        print(f"{name}: {seconds:.2f}{'' if name == 'megabytes' else ' s'}")
    hardware.write(output, {**about, "steps": steps, "saves": saves})


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
