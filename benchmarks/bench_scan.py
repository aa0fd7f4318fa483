"""Time forward and backward of the selective scan: our backends and those of others, on the same inputs in one run.

    python benchmarks/bench_scan.py

Every contestant computes y and all seven gradients from the same u, dt, A, B, C, D, dt_bias; one that is wrong is not
timed. Rounds interleave, and the median is reported. On a GPU, times are between two CUDA events, in bfloat16, and the
yardstick are mamba-ssm's kernels (requirements-cuda.txt), one call per direction. Our kernels run with stored states 8
tokens apart and 4 tokens apart; the name shows the one that is not the default ("triton chunk 4"). On a CPU the
yardstick is mambapy (`pip install mambapy`), in float32; expected on 2 cores of an AMD EPYC (Zen 4): the reference loop
0.1 to 0.4 times its speed, torch 3 to 9 times, cpu 15 to 60 times; the larger size gains most.
"""

import argparse
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ops
from benchmarks.command_line import make_parser
from ops import naive
from util import arguments, cli, hardware
from util.distributed.processes import init_device
from util.errors import UserError

NAMES = ("u", "dt", "A", "B", "C", "D", "dt_bias")
# K, B, D, L, N. On a GPU: a block of ARM-base in pretraining and in finetuning, of ARM-huge in pretraining.
SIZES = {
    "cpu": [(1, 32, 192, 64, 16), (1, 8, 768, 128, 16)],
    "cuda": [(1, 256, 768, 128, 16), (4, 128, 768, 197, 16), (1, 128, 1536, 128, 16)],
}
YARDSTICK = {"cpu": "mambapy", "cuda": "mamba_ssm"}
ERROR = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # limit, relative to the largest value
Scan = Callable[..., Tensor]


def size(text: str) -> tuple[int, ...]:
    """Parse "K,B,D,L,N"."""
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) != 5 or min(numbers) < 1 or math.prod(numbers) > 2**40:
        raise argparse.ArgumentTypeError(f"{text!r} is not K,B,D,L,N, five positive numbers of a product up to {2**40}")
    return numbers


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser("bench_scan.py", __doc__, {"repetitions": (11, "timed rounds, after three more")})
    parser.add_argument(
        "--contestants", type=arguments.nonempty, nargs="+", metavar="NAME", help="default: all that run here"
    )
    parser.add_argument("--sizes", type=size, nargs="+", metavar="K,B,D,L,N", help="default: those of ARM's blocks")
    return parser


def reference_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Compute mamba-ssm's reference: a loop over steps, channels first, on slices of (B, D, L, N) tensors.

    Arguments and result are one direction of those of `ops.selective_scan`: u is (B, L, D), A (D, N), B (B, L, N).
    """
    u, delta = u.mT, F.softplus(dt + dt_bias).mT  # (B, D, L)
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    inputs = torch.einsum("bdl,bln,bdl->bdln", delta, B, u)
    h = A.new_zeros(len(u), *A.shape)
    ys = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + inputs[:, :, t]
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return (torch.stack(ys, dim=2) + u * D[:, None]).mT


def mambapy_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Compute mambapy's parallel scan; for arguments and result see `reference_scan`."""
    from mambapy.pscan import pscan

    delta = F.softplus(dt + dt_bias)[..., None]  # (B, L, D, 1)
    h = pscan(torch.exp(delta * A), delta * B[:, :, None] * u[..., None])  # (B, L, D, N)
    return (h @ C[..., None]).squeeze(-1) + D * u


def with_chunks(backend: str, device: torch.device) -> dict[str, Scan]:
    """Return the scans of "triton" or "cuda" with 8 and with 4 tokens between two stored states.

    The one with the default is last, so that the default is set after every round.
    """
    compute: Scan = partial(ops.selective_scan, backend=backend)
    module: Any = ops.backends.backend_module(backend)
    holder: dict[Any, int] = vars(module) if backend == "triton" else module.CHUNKS
    key = "CHUNK" if backend == "triton" else torch.cuda.get_device_capability(device)
    default = holder[key]

    def scan(chunk: int, *inputs: Tensor) -> Tensor:
        holder[key] = chunk  # also for the backward pass, which runs before the next contestant
        return compute(*inputs)

    return {f"{backend} chunk {12 - default}": partial(scan, 12 - default), backend: partial(scan, default)}


def contestants(inputs: list[Tensor]) -> dict[str, Scan | str]:
    """Return the scans by name; instead of one that does not compute these inputs here, the reason."""

    def one_direction(scan: Scan) -> Scan:
        return lambda *inputs: torch.stack([scan(*(x[k] for x in inputs)) for k in range(len(inputs[0]))])

    found: dict[str, Scan | str] = {}
    u, A = inputs[0], inputs[2]
    if u.device.type == "cpu":
        found |= {"reference loop": one_direction(reference_scan), "mambapy": "not installed: pip install mambapy"}
        if importlib.util.find_spec("mambapy"):
            found["mambapy"] = one_direction(mambapy_scan)
    for backend in [name for name, kinds in reversed(ops.BACKENDS.items()) if u.device.type in kinds]:
        if reason := ops.unavailable(backend):
            found[backend] = reason
        elif problem := ops.backends.backend_module(backend).misfit(u.device, u.dtype, u.shape[-1], A.shape[-1]):
            found[backend] = f"does not compute {problem}"
        elif backend in ("triton", "cuda"):
            found |= with_chunks(backend, u.device)
        else:
            found[backend] = partial(ops.selective_scan, backend=backend)
    return found


def make_inputs(sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Return u, dt, A, B, C, D, dt_bias as a freshly initialised mixer has them under autocast."""
    K, batch, width, L, N = sizes
    varying = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    u, dt, B, C = (torch.randn(K, batch, L, n, generator=generator).to(varying) for n in (width, width, N, N))
    A = -torch.arange(1.0, N + 1).repeat(K, width, 1)  # (K, D, N)
    dt_bias = torch.empty(K, width).uniform_(-6.9, -2.3, generator=generator)  # softplus: 0.001 to 0.1
    inputs = (u, dt, A, B, C, torch.ones(K, width), dt_bias)
    return [x.to(device).requires_grad_() for x in inputs]


def check(scans: dict[str, Scan], inputs: list[Tensor], images: int = 4) -> dict[str, str]:
    """Compare y and every gradient of each contestant with `ops.naive`, on the first images.

    Returns:
        By name, a line for each contestant that fails or differs by more than `ERROR`.
    """
    few = [x.detach()[:, :images] if x.ndim == 4 else x.detach() for x in inputs]
    few = [x.requires_grad_() for x in few]
    y = naive.selective_scan(*few)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    expected = [y.detach(), *torch.autograd.grad(y, few, dy)]
    wrong = {}
    for name, scan in scans.items():
        try:
            y = scan(*few)
            found = (y, *torch.autograd.grad(y, few, dy))
        except Exception as error:  # of one kernel: the others can still be timed
            wrong[name] = f"{name} is not timed, it fails: {hardware.failure(error)}"
            continue
        for label, got, want in zip(("y", *NAMES), found, expected, strict=True):
            difference = ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
            if not difference < ERROR[inputs[0].dtype]:
                wrong.setdefault(name, f"{name} is wrong, so it is not timed: {label} differs by {difference:.1e}")
    return wrong


def time_scans(scans: dict[str, Scan], inputs: list[Tensor], repetitions: int) -> dict[str, dict[str, float]]:
    """Return the median microseconds of forward, backward and both passes, by name."""
    dy = torch.randn_like(inputs[0])
    times = hardware.time_rounds(
        {name: partial(scan, *inputs) for name, scan in scans.items()},
        lambda y: partial(torch.autograd.grad, y, inputs, dy),
        inputs[0].device,
        repetitions,
    )
    return {name: {key: statistics.median(us) for key, us in parts.items()} for name, parts in times.items()}


def main(args: argparse.Namespace) -> None:
    """Check, time, print a table per size, write everything as JSON."""
    args.device = init_device(args.device)
    report = hardware.Report("scan", args.device, args.output)
    yardstick = YARDSTICK[args.device.type]
    for sizes in args.sizes or SIZES[args.device.type]:
        inputs = make_inputs(sizes, args.device)
        found = contestants(inputs)
        if unknown := set(args.contestants or ()) - found.keys():
            raise UserError(f"--contestants {' '.join(sorted(unknown))}: there are {', '.join(found)}")
        found = {name: scan for name, scan in found.items() if name in (args.contestants or found)}
        scans = {name: scan for name, scan in found.items() if callable(scan)}
        wrong = check(scans, inputs)
        found |= wrong
        report.problems += wrong.values()
        scans = {name: scan for name, scan in scans.items() if name not in wrong}
        usable = hardware.answers(args.device)
        us = time_scans(scans, inputs, args.repetitions) if usable else {}
        ratio = {name: us[yardstick]["both"] / t["both"] for name, t in us.items()} if yardstick in us else {}
        label = dict(zip("KBDLN", sizes, strict=True))
        dtype = str(inputs[0].dtype).removeprefix("torch.")
        left_out = {
            name: "it is right, but the GPU is lost" if callable(reason) else reason
            for name, reason in found.items()
            if name not in us
        }
        row = {"size": label, "dtype": dtype, "microseconds": us, f"times_faster_than_{yardstick}": ratio}
        report.rows.append({**row, "wrong": wrong, "left_out": left_out})
        report.save()
        print(f"\n{args.device.type}, {dtype}, " + " ".join(f"{key} {n}" for key, n in label.items()))
        print(f"{'µs':<16}{'forward':>12}{'backward':>12}{'both':>12}" + (f"{'x ' + yardstick:>14}" if ratio else ""))
        for name in found:
            text = left_out.get(name) or "".join(f"{us[name][part]:>12.1f}" for part in ("forward", "backward", "both"))
            print(f"{name:<16}{text}" + (f"{ratio[name]:>14.1f}" if name in ratio else ""))
        if not usable:
            break
    report.close()


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
