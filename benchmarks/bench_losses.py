"""Compare losses and gradient norms of the first updates with and without each switch, from the same seed and data.

    python benchmarks/bench_losses.py

A kernel may only change the rounding. Two forms measure how much that is: "again" repeats the form without a switch,
and differs only where PyTorch's own kernels do; "eager" does not compile it, and is right but rounds differently. CUDA
graphs may differ from no switch at most `TIMES` as much as "again" does; every other form at most `TIMES` as much as
"eager" does, or `FLOOR`.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_train import CASES, KERNELS, Case, Composition, add_without, epoch_runner, switched
from benchmarks.command_line import fitting, make_parser
from util import cli, hardware
from util.distributed.processes import init_device
from util.tracking.run_log import Log

FORMS = ("none", "again", "eager", *KERNELS, "all")
TIMES = 2.0
FLOOR = 1e-6  # on a CPU, where "eager" is the same form
LR = 1e-4


class Losses(Log):
    """A log that keeps the loss and the gradient norm of each update."""

    every = 1

    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {"loss": [], "grad_norm": []}

    def scalars(self, step: int, **values: float) -> None:
        self.curves["loss"].append(values["train_loss"])
        self.curves["grad_norm"].append(values["grad_norm"])


def losses_of(case: Case, how: Composition, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Train `steps` updates; return the loss and the gradient norm before each."""
    log = Losses()
    epoch_runner(case, how, steps, device, LR, log)()
    return log.curves


def difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, float]:
    """Return the largest relative difference of the losses and of the gradient norms."""
    return {
        key: max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(one[key], other[key], strict=True)) for key in other
    }


def verdict(form: str, found: dict[str, dict]) -> bool | None:
    """Return whether a form differs from none by rounding alone; None if the rounding was not measured."""
    bound, floor = ("again", 0.0) if form == "cuda_graph" else ("eager", FLOOR)
    if bound not in found or form not in found:
        return None
    return all(found[form][key] <= max(floor, TIMES * found[bound][key]) for key in ("loss", "grad_norm"))


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    numbers = {"batch_size": (None, "instead of the recipe's"), "steps": (50, "updates")}
    parser = make_parser("bench_losses.py", __doc__, numbers)
    cases = fitting(["pretrain_toy", "finetune_toy", "pretrain_base", "finetune_base"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=cases, help="default: %(default)s")
    parser.add_argument("--forms", nargs="+", choices=FORMS[1:], default=FORMS[1:], help="default: %(default)s")
    add_without(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Train every case in every form, print the differences, write everything as JSON."""
    device = init_device(args.device)
    report = hardware.Report("losses", device, args.output, steps=args.steps, lr=LR)
    print(f"{'case, form':<{hardware.WIDTH}}{'loss':>12}{'gradient':>12}")
    for name in args.cases:
        case = CASES[name]._replace(batch_size=args.batch_size or CASES[name].batch_size)
        plain: dict[str, list[float]] = {}
        found: dict[str, dict[str, float]] = {}
        for form in ("none", *args.forms):
            compiled = device.type == "cuda" and form != "eager"
            how = switched("none" if form in ("again", "eager") else form, device, compiled, args.without)
            work = how if isinstance(how, str) else partial(losses_of, case, how, args.steps, device)
            settings = {} if isinstance(how, str) else how._asdict()
            row = report.add(f"{name}, {form}", {"case": name, "form": form, **settings}, work)
            if row is None:
                continue
            curves = {key: row[key] for key in ("loss", "grad_norm")}
            if form == "none":
                plain = curves
            if plain:
                found[form] = difference(curves, plain)
                row |= {"difference": found[form], "within_rounding": verdict(form, found)}
                report.save()
                numbers = "".join(f"{found[form][key]:>12.1e}" for key in curves)
                print(f"{f'{name}, {form}':<{hardware.WIDTH}}{numbers}", flush=True)
    report.close()


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
