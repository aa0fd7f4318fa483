"""Registers, spills and instructions of the Triton kernels on GPUs that need not be there.

    python benchmarks/kernel_resources.py

Compiles each kernel exactly as a training run launches it (ARM-base: pretraining, 128 tokens in one direction;
finetuning, 197 tokens in four; bfloat16 under autocast) for compute capabilities 8.0, 9.0 and 10.0, and disassembles
the result with the tools that Triton brings along. Instructions are counted per step: one token of one warp's channels
(32 channels of 16 states in the scan, 128 channels in the convolution), from the longest loop. Divided by what a GPU
issues (4 a cycle and multiprocessor) they bound the kernel's time from below. Expected on 9.0: about 185 and 515
instructions for the scan's forward and backward pass, 255 registers in the latter and next to no spills.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: an interpreted kernel cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ops import triton_backend
from util import cli

CAPABILITIES = (80, 90, 100)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Launch(NamedTuple):
    """What the host code hands to a kernel."""

    kernel: triton.JITFunction
    args: tuple
    constants: dict


class Resources(NamedTuple):
    """Of one kernel on one generation; `spilled` is the stack in bytes per thread, `instructions` are per step."""

    kernel: str
    capability: int
    directions: int
    tokens: int
    registers: int
    spilled: int
    instructions: float


def launches(K: int, batch: int, L: int, width: int, N: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Every launch of both ops, forward and backward, as the backend's host code makes them.

    The host code runs on tensors without memory, with what starts a kernel replaced by a note of it.
    """
    seen: list[Launch] = []
    start, triton_backend._launch = (
        triton_backend._launch,
        lambda kernel, paths, *args, **constants: seen.append(Launch(kernel, args, constants)),
    )
    try:
        with torch.device("meta"):
            rank = width // 16
            projected = torch.empty(K, batch, L, rank + 2 * N, dtype=dtype)
            _, B, C = projected.split([rank, N, N], dim=-1)  # views, as the mixer has them
            x = torch.empty(batch, L, 2 * width, dtype=dtype).chunk(2, dim=-1)[0]
            u = dt = dy = torch.empty(K, batch, L, width, dtype=dtype)
            A, D, weight = torch.empty(K, width, N), torch.empty(K, width), torch.empty(K, width, 4)
            order = None if K == 1 else torch.empty(K, L, dtype=torch.int64)
            _, states = triton_backend.scan_forward(u, dt, A, B, C, D, D, order, True)
            triton_backend.scan_backward(dy, u, dt, A, B, C, D, D, order, states)
            triton_backend.conv_forward(x, weight, D, order)
            triton_backend.conv_backward(dy, x, weight, D, order)
    finally:
        triton_backend._launch = start
    return seen


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """The kernel as Triton's runtime would specialise and compile it for these arguments."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = launch.constants[name] if name in launch.constants else launch.args[i]
        aligned = False
        if name in launch.constants or value is None:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0 and name not in ("batch", "length")
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})


def disassemble(kernel: CompiledKernel) -> tuple[int, int, list[list[str]]]:
    """Registers, spilled bytes, and the instructions of every loop."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])

        def tool(name: str, *flags: str) -> str:
            path = getattr(triton.knobs.nvidia, name).path
            return subprocess.run([path, *flags, str(cubin)], capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage"))
        listing = tool("nvdisasm", "-c")
    return int(usage[1]), int(usage[2]), list(_loops(listing))


def _loops(listing: str) -> Iterator[list[str]]:
    labels, body = {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(body)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            body.append(instruction[1])
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            if target and labels.get(target[1], len(body)) < len(body) - 1:
                yield body[labels[target[1]] :]


def per_step(launch: Launch, lengths: list[int]) -> float:
    """Instructions per step, from the lengths of a kernel's loops.

    The convolution has one loop, over tokens. The scan's outer loop is over chunks (forward) or over blocks of T tokens
    (backward), its inner one over the blocks of a chunk, or over those between a stored state and the present block.
    """
    if "CHUNK" not in launch.constants:
        return max(lengths)
    outer, inner = max(lengths), min(lengths)
    chunk, block = launch.constants["CHUNK"], launch.constants["T"]
    forward = "TRAINS" in launch.constants
    rounds = chunk / block if forward else (chunk / block - 1) / 2  # of the inner loop, on average
    return (outer - inner + rounds * inner) / (chunk if forward else block)


def measure(capability: int, K: int, L: int) -> Iterator[Resources]:
    """Resources of the four kernels of one setting of ARM-base."""
    for launch in launches(K, 2, L, 768):
        registers, spilled, loops = disassemble(compile_launch(launch, capability))
        steps = per_step(launch, [len(loop) for loop in loops])
        yield Resources(launch.kernel.__name__, capability, K, L, registers, spilled, steps)


def main(args: argparse.Namespace, show: Callable[[str], None] = print) -> list[Resources]:
    """Print a table, or JSON."""
    rows = [row for c in args.capabilities for K, L in ((1, 128), (4, 197)) for row in measure(c, K, L)]
    if args.json:
        show(json.dumps([row._asdict() for row in rows]))
        return rows
    show(f"triton {triton.__version__}")
    show(f"{'kernel':<22}{'sm':>5}{'K':>3}{'L':>5}{'registers':>11}{'spilled B':>11}{'instructions':>14}")
    for row in rows:
        name = row.kernel.removesuffix("_kernel")
        numbers = f"{row.capability:>5}{row.directions:>3}{row.tokens:>5}{row.registers:>11}{row.spilled:>11}"
        show(f"{name:<22}{numbers}{row.instructions:>14.0f}")
    return rows


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser("kernel_resources.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--capabilities",
        type=int,
        nargs="+",
        choices=CAPABILITIES,
        default=CAPABILITIES,
        help="80 is 8.0 (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    return parser


if __name__ == "__main__":
    cli.run(main, get_args_parser())
