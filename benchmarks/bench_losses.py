"""Losses and gradient norms of the first updates with each switch beside those without, from the same seed and data.

    python benchmarks/bench_losses.py

What a kernel may change is rounding. How much that is at most is measured too: "again" repeats the form without a
switch, and differs only where PyTorch's own kernels do; "eager" does not compile it, so that both are right and round
otherwise. CUDA graphs may differ from no switch `TIMES` as much as "again" does, not at all where that is equal; every
other form `TIMES` as much as "eager", or `FLOOR`.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_train import CASES, KERNELS, Case, Composition, add_without, epoch_runner, switched
from util import arguments, cli, hardware
from util.distributed.processes import init_device
from util.errors import RunError
from util.tracking.run_log import Log
from util.training import loop

FORMS = ("none", "again", "eager", *KERNELS, "all")
TIMES = 2.0
FLOOR = 1e-6  # where "eager" is no other form: on a CPU
LR = 1e-4


class Losses(Log):
    """A log that keeps the loss and the gradient norm of each update."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.grad_norm: list[float] = []

    def scalars(self, step: int, **values: float) -> None:
        self.loss.append(values["train_loss"])
        self.grad_norm.append(values["grad_norm"])


def losses_of(case: Case, how: Composition, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Train `steps` updates; return the loss and the gradient norm before each."""
    log = Losses()
    with patch.object(loop, "LOG_EVERY", 1):
        epoch_runner(case, how, steps, device, LR, log)()
    return {"loss": log.loss, "grad_norm": log.grad_norm}


def difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, float]:
    """Return the largest relative difference of a loss and of a gradient norm."""
    return {
        key: max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(one[key], other[key], strict=True)) for key in other
    }


def verdict(form: str, found: dict[str, dict]) -> bool | None:
    """Return whether a form is equal to none but for rounding; None where nothing says how much that is."""
    bound, floor = ("again", 0.0) if form == "cuda_graph" else ("eager", FLOOR)
    if bound not in found or form not in found:
        return None
    return all(found[form][key] <= max(floor, TIMES * found[bound][key]) for key in ("loss", "grad_norm"))


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    cpu = hardware.default_device().type == "cpu"
    cases = ["pretrain_toy", "finetune_toy"] if cpu else ["pretrain_base", "finetune_base"]
    parser = cli.Parser("bench_losses.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=arguments.nonempty, help="cuda or cpu (default: cuda where there is a GPU)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=cases, help="default: %(default)s")
    parser.add_argument("--forms", nargs="+", choices=FORMS[1:], default=FORMS[1:], help="default: %(default)s")
    add_without(parser)
    parser.add_argument("--batch_size", type=arguments.batch, help="instead of the recipe's")
    parser.add_argument("--steps", type=arguments.positive, default=50, help="updates (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results/)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Train every case in every form, print the differences, write everything as JSON."""
    device = init_device(args.device)
    about = hardware.describe(device)
    output = hardware.result_file("losses", about, args.output)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'case':<16}{'form':<14}{'loss':>12}{'gradient':>12}")
    report = {**about, "steps": args.steps, "lr": LR, "results": []}
    failed, lost = [], None
    for name in args.cases:
        case, curves, found = CASES[name], {}, {}
        case = case._replace(batch_size=args.batch_size or case.batch_size)
        for form in ("none", *args.forms):
            compiled = device.type == "cuda" and form != "eager"
            how = lost or switched("none" if form in ("again", "eager") else form, device, compiled, args.without)
            row = {"case": name, "form": form}
            report["results"].append(row)
            if isinstance(how, str):
                row["left_out"] = how
                print(f"{name:<16}{form:<14}left out: {how}", flush=True)
                continue
            try:
                curves[form] = losses_of(case, how, args.steps, device)
            except Exception as error:  # of one kernel: the others can still be compared
                row["failed"] = hardware.failure(error)
                failed.append(f"{name}, {form}: {row['failed']}")
                print(f"{name:<16}{form:<14}failed: {row['failed']}", flush=True)
                if not hardware.answers(device):
                    lost = f"{name}, {form} has lost the GPU"
                continue
            row |= {**how._asdict(), **curves[form]}
            if "none" in curves:
                found[form] = difference(curves[form], curves["none"])
                row["difference"], row["within_rounding"] = found[form], verdict(form, found)
                numbers = "".join(f"{found[form][key]:>12.1e}" for key in ("loss", "grad_norm"))
                print(f"{name:<16}{form:<14}{numbers}", flush=True)
            hardware.write(output, report, quiet=True)  # what is measured stays, whatever comes
    hardware.write(output, report)
    if failed:
        raise RunError("; ".join(failed))


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
