"""Inputs of scan and convolution, and comparisons of what backends compute."""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from helpers import REPOSITORY

import ops
from ops import naive

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


KERNELS = [("torch", torch.float64), ("torch", torch.float32), ("cpu", torch.float32)]


def scan_inputs(K=4, batch=2, L=37, D=32, N=16, dtype=torch.float32, varying=None):
    """Leaves of the scan; `varying` is the dtype of the tensors with a time axis."""
    torch.manual_seed(0)
    u, dt, B, C = (torch.randn(K, batch, L, n, dtype=dtype).to(varying or dtype) for n in (D, D, N, N))
    A, skip, bias = -torch.rand(K, D, N, dtype=dtype) * 4 - 0.1, torch.randn(K, D, dtype=dtype), torch.rand(K, D) - 3
    tensors = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": skip, "dt_bias": bias.to(dtype)}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def conv_inputs(K=4, batch=2, L=37, D=32, W=4, dtype=torch.float32, varying=None):
    torch.manual_seed(0)
    x = torch.randn(batch, L, D, dtype=dtype).to(varying or dtype)
    tensors = {"x": x, "weight": torch.randn(K, D, W, dtype=dtype), "bias": torch.randn(K, D, dtype=dtype)}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def random_order(K, L, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(L, generator=generator) for _ in range(K)]).to(device)


@contextlib.contextmanager
def threads(count):
    """Run on `count` threads; the oracle's many small steps are fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def run(compute, leaves, order, views, dy):
    y = compute(**views(leaves), order=order)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))]


def assert_same(op, compute, leaves, order=None, views=lambda inputs: inputs, grad=torch.randn, tolerance=None):
    """Compare `compute` with the float64 oracle `op` on the result and on the gradient of every leaf.

    `views` makes the inputs from the leaves, `grad` the gradient of the result from its shape.
    """
    first = next(iter(leaves.values()))  # u or x
    with torch.no_grad(), torch.device(first.device):  # made there: moving it would make it dense
        dy = grad(compute(**views(leaves), order=order).shape).to(first.dtype)
    got = run(compute, leaves, order, views, dy)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    with threads(1):
        want = run(getattr(naive, op), exact, order, views, dy)
    for name, like, g, w in zip(["result", *leaves], [first, *leaves.values()], got, want, strict=True):
        assert g.dtype == like.dtype, name
        assert g.shape == w.shape, name
        error = ((g - w).abs().max() / w.abs().max().clamp(min=1e-30)).item()
        limit = tolerance or max(TOLERANCE[g.dtype], TOLERANCE[first.dtype])  # a bfloat16 y rounds every gradient
        assert error < limit, f"{op}: {name} differs by {error:.1e}"


def public(op, backend):
    return lambda **inputs: getattr(ops, op)(**inputs, backend=backend)


def kernel_resources(*argv: object) -> tuple[list[dict], str]:
    """Return the rows that benchmarks/gpu/kernel_resources.py counts, and the table that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, REPOSITORY / "benchmarks" / "gpu" / "kernel_resources.py", *argv, "--json", file]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
        return json.loads(file.read_text())["rows"], done.stdout
