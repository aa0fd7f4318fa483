"""Forward and backward of the selective scan: our backends beside mamba-ssm's reference loop and mambapy.

    python benchmarks/bench_scan.py

Every contestant starts from the same u, dt, A, B, C, D, dt_bias and ends with y and all seven gradients; one that is
wrong is not timed. mambapy (`pip install mambapy`) is the yardstick. Expected on 2 cores of an AMD EPYC (Zen 4): the
reference loop 0.1 to 0.4 times its speed, torch 4 to 8 times, cpu 20 to 45 times; the larger size gains most.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ops
from ops import naive

NAMES = ("u", "dt", "A", "B", "C", "D", "dt_bias")
Scan = Callable[..., Tensor]


def size(text: str) -> tuple[int, ...]:
    """Parse "B,D,L,N"."""
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) != 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,D,L,N, four positive numbers")
    return numbers


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("bench_scan.py", description=__doc__.splitlines()[0])
    default = [(32, 192, 64, 16), (8, 768, 128, 16)]
    parser.add_argument(
        "--sizes", type=size, nargs="+", default=default, metavar="B,D,L,N", help="default: 32,192,64,16 8,768,128,16"
    )
    parser.add_argument(
        "--repetitions", type=int, default=7, help="timed rounds, after two more (default: %(default)s)"
    )
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/<device>-<date>.json)")
    return parser


def reference_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """The loop that mamba-ssm ships as its reference: channel-first, one slice of the whole (B, D, L, N) per step.

    Args:
        u: (B, L, D).
        dt: (B, L, D).
        A: (D, N).
        B: (B, L, N).
        C: (B, L, N).
        D: (D,).
        dt_bias: (D,).

    Returns:
        (B, L, D).
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
    """mambapy's parallel scan; arguments and result as in `reference_scan`."""
    from mambapy.pscan import pscan

    delta = F.softplus(dt + dt_bias)[..., None]  # (B, L, D, 1)
    h = pscan(torch.exp(delta * A), delta * B[:, :, None] * u[..., None])  # (B, L, D, N)
    return (h @ C[..., None]).squeeze(-1) + D * u


def contestants(device: str) -> dict[str, Scan | str]:
    """Return the scans for K = 1 by name; one that cannot run here is the line that says why."""

    def one_direction(scan: Scan) -> Scan:
        return lambda *inputs: scan(*(x[0] for x in inputs))[None]

    found = {"reference loop": one_direction(reference_scan), "mambapy": one_direction(mambapy_scan)}
    try:
        import mambapy  # noqa: F401
    except ImportError:
        found["mambapy"] = "not installed: pip install mambapy"
    for backend in ("torch", "cpu" if device == "cpu" else "mamba_ssm"):
        found[backend] = ops.unavailable(backend) or (
            lambda *inputs, backend=backend: ops.selective_scan(*inputs, backend=backend)
        )
    return found


def make_inputs(sizes: tuple[int, ...], device: str) -> list[Tensor]:
    """Return u, dt, A, B, C, D, dt_bias of one direction as a freshly initialised mixer has them."""
    batch, width, L, N = sizes
    generator = torch.Generator().manual_seed(0)
    u, dt, B, C = (torch.randn(1, batch, L, n, generator=generator) for n in (width, width, N, N))
    A = -torch.arange(1.0, N + 1).repeat(1, width, 1)  # (1, D, N)
    dt_bias = torch.empty(1, width).uniform_(-6.9, -2.3, generator=generator)  # softplus: 0.001 to 0.1
    inputs = (u, dt, A, B, C, torch.ones(1, width), dt_bias)
    return [x.to(device).requires_grad_() for x in inputs]


def check(name: str, scan: Scan, inputs: list[Tensor], dy: Tensor, expected: list[Tensor]) -> None:
    """Raise RuntimeError unless y and every gradient agree with the oracle's to 0.1 % of their largest number."""
    y = scan(*inputs)
    for label, got, want in zip(("y", *NAMES), (y, *torch.autograd.grad(y, inputs, dy)), expected, strict=True):
        error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
        if not error < 1e-3:
            raise RuntimeError(f"{name} is wrong, so it is not timed: {label} differs by {error:.1e}")


def time_scans(scans: dict[str, Scan], inputs: list[Tensor], dy: Tensor, repetitions: int) -> dict[str, float]:
    """Return the median milliseconds of forward and backward; rounds interleave, so that noise hits all alike."""
    wait = torch.cuda.synchronize if dy.is_cuda else lambda: None
    times = {name: [] for name in scans}
    for _ in range(repetitions + 2):
        for name, scan in scans.items():
            wait()
            start = time.perf_counter()
            torch.autograd.grad(scan(*inputs), inputs, dy)
            wait()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(measured[2:]) for name, measured in times.items()}


def cpu_model() -> str:
    """Name the CPU."""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def main(args: argparse.Namespace) -> None:
    """Check, time, print a table per device and size, write everything as JSON."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    date = datetime.date.today().isoformat()
    machine = {"date": date, "torch": torch.__version__, "cpu": cpu_model(), "threads": torch.get_num_threads()}
    if "cuda" in devices:
        machine["gpu"] = torch.cuda.get_device_name()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results = []
    for device in devices:
        for sizes in args.sizes:
            inputs = make_inputs(sizes, device)
            y = naive.selective_scan(*inputs)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
            expected = [y.detach(), *torch.autograd.grad(y, inputs, dy)]
            found = contestants(device)
            scans = {name: scan for name, scan in found.items() if callable(scan)}
            for name, scan in scans.items():
                check(name, scan, inputs, dy, expected)
            ms = time_scans(scans, inputs, dy, args.repetitions)
            ratio = {name: ms["mambapy"] / t for name, t in ms.items()} if "mambapy" in ms else {}
            label = dict(zip("BDLN", sizes, strict=True))
            results.append({"device": device, "size": label, "milliseconds": ms, "times_faster_than_mambapy": ratio})
            print(f"\n{device}, " + " ".join(f"{key} {n}" for key, n in label.items()))
            print(f"{'forward + backward, float32':<28}{'ms':>10}{'x mambapy':>12}")
            for name, scan in found.items():
                row = scan if name not in ms else f"{ms[name]:>10.2f}" + (f"{ratio[name]:>12.1f}" if ratio else "")
                print(f"{name:<28}{row}")
    output = Path(args.output or Path(__file__).parent / "results" / f"{devices[-1]}-{date}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
