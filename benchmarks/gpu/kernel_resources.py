"""Count registers, spills and instructions of the Triton and CUDA kernels; no GPU is needed.

    python benchmarks/gpu/kernel_resources.py

Compiles each kernel exactly as a training run launches it (ARM-base: pretraining, 128 tokens in one direction;
finetuning, 197 tokens in four; bfloat16 under autocast) for compute capabilities 8.0, 9.0 and 10.0, and disassembles
the result with the tools that come with Triton. "fused" are the kernels of --fused_ops. The scan in CUDA C++ is counted
with chunks of 8 and of 4 tokens, also on 8.6 and 8.9; the counts decide where it is offered. "default" marks the chunk
that is used, "not used" a capability where it is not offered.

Instructions are counted per step, from the longest loop: one token of one warp's channels (32 channels of 16 states in
the scan, 128 channels in the convolution; in the other fused operators a warp's share of a row). Divided by what a GPU
issues (4 a cycle and multiprocessor) they are a lower bound of the kernel's time. "warps" is how many fit into the
registers and the shared memory of a multiprocessor. Expected on 9.0: about 185 and 515 instructions for the scan's
forward and backward pass in Triton, 131 and 339 in CUDA.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: an interpreted kernel cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ops import fused
from ops.backends import cuda_backend, triton_backend
from ops.fused import triton_fused
from util import cli
from util.files import json_with, output_file, write_json

BACKENDS = ("triton", "fused", "cuda")
CAPABILITIES = (80, 90, 100)
CUDA_CAPABILITIES = {80: (80, 86, 89), 90: (90,), 100: (100,)}  # counted for each of the above
SHARED_KB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228}  # shared memory of a multiprocessor; a block takes 1 KB more
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64}  # of a multiprocessor at most
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Launch(NamedTuple):
    """A kernel and the arguments that the host code launches it with."""

    kernel: triton.JITFunction
    args: tuple
    constants: dict
    warps: int


class Resources(NamedTuple):
    """Counts of one kernel on one capability; `spilled`: bytes of stack per thread, `instructions`: per step."""

    kernel: str
    capability: int
    directions: int
    tokens: int
    registers: int
    spilled: int
    instructions: float
    warps: int
    variant: str


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Run host code on meta tensors; collect the launches in the list instead of starting kernels."""
    seen: list[Launch] = []

    def note(kernel: triton.JITFunction, paths: int, *args: object, **constants: object) -> None:
        seen.append(Launch(kernel, args, constants, 1))

    def note_fused(kernel: triton.JITFunction, programs: int, warps: int, *args: object, **constants: object) -> None:
        seen.append(Launch(kernel, args, constants, warps))

    starts = patch.object(triton_backend, "_launch", note), patch.object(triton_fused, "_launch", note_fused)
    with starts[0], starts[1], torch.device("meta"):
        yield seen


def launches(K: int, batch: int, L: int, width: int, N: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Return every launch of scan and convolution, forward and backward, as the backend's host code makes them."""
    with noted_launches() as seen:
        rank = width // 16
        projected = torch.empty(K, batch, L, rank + 2 * N, dtype=dtype)
        _, B, C = projected.split([rank, N, N], dim=-1)  # views, as the mixer has them
        x = torch.empty(batch, L, 2 * width, dtype=dtype).chunk(2, dim=-1)[0]
        u = dt = dy = torch.empty(K, batch, L, width, dtype=dtype)
        A, D, weight = torch.empty(K, width, N), torch.empty(K, width), torch.empty(K, width, 4)
        order = None if K == 1 else torch.empty(K, L, dtype=torch.int64)
        _, states = triton_backend.scan_forward((u, dt, A, B, C, D, D), order, True)
        assert states is not None  # it was asked for
        triton_backend.scan_backward(dy, (u, dt, A, B, C, D, D), order, states)
        triton_backend.conv_forward(x, weight, D, order)
        triton_backend.conv_backward(dy, x, weight, D, order)
    return seen


def fused_launches(K: int, batch: int, L: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Return every launch of the fused operators with kernels of their own; of drop path too if K is 4."""
    fused.use(["none"], torch.device("cpu"))
    with noted_launches() as seen:
        h, branch = torch.empty(batch, L, width), torch.empty(batch, L, width, dtype=dtype)
        pre = torch.empty(batch, L, 16 * width // 3, dtype=dtype)  # 8 / 3 of the width, twice
        keep, weight = None if K == 1 else torch.empty(batch), torch.empty(width)
        triton_fused.swiglu_forward(pre)
        triton_fused.swiglu_backward(pre[..., : pre.shape[-1] // 2].contiguous(), pre)
        total, statistics = triton_fused.norm_forward(h, branch, keep, weight, weight, 1e-5, torch.empty_like(branch))
        triton_fused.norm_backward(branch, total, total, keep, weight, statistics, dtype)
    with patch.object(fused, "uses", lambda name: name == "conv"):
        return seen + [launch for launch in launches(K, batch, L, width) if "AHEAD" in launch.constants]


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile a kernel as Triton's runtime specialises it for these arguments."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = launch.constants[name] if name in launch.constants else launch.args[i]
        aligned: object = False
        if name in launch.constants or value is None:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0 and name not in launch.kernel.do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})


def disassemble(cubin: bytes, kernel: str) -> tuple[int, int, list[list[str]]]:
    """Return registers, spilled bytes, and the instructions of every loop of a kernel, or of all of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)

        def tool(name: str, *flags: str) -> str:
            path = getattr(triton.knobs.nvidia, name).path
            return subprocess.run([path, *flags, str(file)], capture_output=True, text=True, check=True).stdout

        usage = re.search(rf"Function {kernel}:\s+REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage"))
        listing = tool("nvdisasm", "-c").partition(f".text.{kernel}")[2].partition("//-")[0]
    assert usage is not None, f"cuobjdump does not list {kernel}"
    return int(usage[1]), int(usage[2]), _loops(listing)


def _loops(listing: str) -> list[list[str]]:
    """Return the instructions of every loop in a listing of nvdisasm, or all of them if there is no loop."""
    labels: dict[str, int] = {}
    body: list[str] = []
    found: list[list[str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(body)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            body.append(instruction[1])
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            if target and labels.get(target[1], len(body)) < len(body) - 1:
                found.append(body[labels[target[1]] :])
    return found or [body]


def per_step(launch: Launch, lengths: list[int]) -> float:
    """Return the instructions per step, from the lengths of a kernel's loops.

    The convolution has one loop, over tokens, AHEAD at a time; the other fused operators have one, or none, over rows.
    The scan's outer loop is over chunks (forward) or over blocks of T tokens (backward), its inner one over the blocks
    of a chunk, or over those between a stored state and the present block.
    """
    if "CHUNK" not in launch.constants:
        return max(lengths) / launch.constants.get("ROWS", launch.constants.get("AHEAD", 1))
    outer, inner = max(lengths), min(lengths)
    chunk, block = launch.constants["CHUNK"], launch.constants["T"]
    forward = "TRAINS" in launch.constants
    rounds = chunk / block if forward else (chunk / block - 1) / 2  # of the inner loop, on average
    return (outer - inner + rounds * inner) / (chunk if forward else block)


def resident_warps(capability: int, registers: int, warps: int, shared: int) -> int:
    """Return the warps that fit on a multiprocessor, in blocks of `warps` with `shared` bytes of shared memory."""
    of_registers = 65536 // (-(-registers // 8) * 8 * 32)  # allocated by 8 a thread
    blocks = min(of_registers, WARPS[capability]) // warps
    return warps * min(blocks, SHARED_KB[capability] * 1024 // (shared + 1024))


def measure_triton(capability: int, K: int, L: int, variant: str) -> Iterator[Resources]:
    """Yield the counts of the four Triton kernels, or of the fused operators, in one setting of ARM-base."""
    for launch in launches(K, 2, L, 768) if variant == "triton" else fused_launches(K, 2, L, 768):
        kernel, name = compile_launch(launch, capability), launch.kernel.__name__
        registers, spilled, loops = disassemble(kernel.asm["cubin"], name)
        steps = per_step(launch, [len(loop) for loop in loops])
        resident = resident_warps(capability, registers, launch.warps, kernel.metadata.shared)
        yield Resources(name, capability, K, L, registers, spilled, steps, resident, variant)


def measure_cuda(capability: int, K: int, L: int, backend: str) -> Iterator[Resources]:
    """Yield the counts of the scan in CUDA C++ with either chunk, in one setting of ARM-base; 80 stands for all 8.x."""
    warps = cuda_backend.block_warps(768)
    for one, chunk in itertools.product(CUDA_CAPABILITIES[capability], (8, 4)):
        version = divmod(one, 10)
        variant = cuda_backend.Variant(warps, chunk, K > 1)
        cubin = cuda_backend.compile_kernels(version, variant)
        used = cuda_backend.CHUNKS.get(version)
        label = f"cuda chunk {chunk}" + ("" if used else ", not used") + (", default" if chunk == used else "")
        for name in cuda_backend.KERNELS:
            registers, spilled, loops = disassemble(cubin, name)
            resident = resident_warps(one, registers, warps, variant.shared_bytes(name))
            yield Resources(name, one, K, L, registers, spilled, max(map(len, loops)) / chunk, resident, label)


def main(args: argparse.Namespace) -> None:
    """Count, print a table, and write it as JSON if asked.

    Raises:
        UserError: the JSON file cannot be written.
    """
    if args.json:
        output_file(args.json, json_with(rows=list), flag="--json")
    measure = {"triton": measure_triton, "fused": measure_triton, "cuda": measure_cuda}
    settings = itertools.product(args.backends, args.capabilities, ((1, 128), (4, 197)))
    rows = [row for backend, capability, (K, L) in settings for row in measure[backend](capability, K, L, backend)]
    if args.json:
        write_json(args.json, {"rows": [row._asdict() for row in rows]})
    compilers = ["NVRTC" if backend == "cuda" else "triton" for backend in args.backends]
    versions = {name: cuda_backend.nvrtc_version() if name == "NVRTC" else triton.__version__ for name in compilers}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    columns = f"{'registers':>11}{'spilled B':>11}{'instructions':>14}{'warps':>7}"
    print(f"{'kernel':<22}{'sm':>5}{'K':>3}{'L':>5}{columns}  variant")
    for row in rows:
        name = row.kernel.removesuffix("_kernel")
        numbers = f"{row.capability:>5}{row.directions:>3}{row.tokens:>5}{row.registers:>11}{row.spilled:>11}"
        print(f"{name:<22}{numbers}{row.instructions:>14.0f}{row.warps:>7}  {row.variant}")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("kernel_resources.py", description=__doc__.splitlines()[0])
    text = "80 is 8.0 (default: all)"
    parser.add_argument("--capabilities", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES, help=text)
    text = "fused: of --fused_ops (default: all)"
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON, too")
    return parser


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
