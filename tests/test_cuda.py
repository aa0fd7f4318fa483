"""The CUDA kernels of the scan without a GPU: emulated against the oracle, compiled and counted, and their host code.

test_ops_gpu.py runs them where there is one.
"""

import ctypes
import importlib.util
import shutil
import subprocess
from functools import cache

import pytest
import torch

import ops
from conftest import REPOSITORY
from mamba import scan_orders
from ops import cuda_backend, naive, operators
from ops.cuda_backend import Args, Variant
from test_ops import random_order, run, scan_inputs, threads

# Of the largest number: bfloat16 results are rounded to 8 bits, products of tensor cores (dB, dC) count to 10.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 2e-6}
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def _poisoned_memory():
    """Fill torch.empty with NaN, so that a result left unwritten or a read of one shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """Return a function of a variant that compiles the kernels for this CPU."""

    @cache
    def compiled(variant):
        library = tmp_path_factory.mktemp("emulation") / "kernels.so"
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *variant.definitions()]
        subprocess.run([*command, REPOSITORY / "tests" / "cuda_emulation.cpp", "-o", library], check=True)
        return ctypes.CDLL(library)

    return compiled


@pytest.fixture
def emulate(emulator, monkeypatch, _poisoned_memory):
    """Let CPU tensors reach the kernels; returns a function that sets the tokens of a chunk, 8 at first."""

    def start(kernel, variant, blocks, args, device):
        emulator(variant).run(kernel == "scan_forward", blocks, ctypes.byref(args))

    def chunk_of(tokens):
        monkeypatch.setattr(cuda_backend, "_chunk", lambda device: tokens)

    chunk_of(8)
    monkeypatch.setattr(cuda_backend, "_start", start)
    return chunk_of


def scan(*, order=None, **tensors):
    return operators.selective_scan(*tensors.values(), order, "cuda", True)[0]


def check(order=None, views=lambda inputs: inputs, grad=torch.randn, **sizes):
    """Compare y and all seven gradients with those of the oracle in float64."""
    leaves = scan_inputs(**sizes, varying=torch.bfloat16)
    dy = grad(leaves["u"].shape).bfloat16()
    got = run(scan, leaves, order, views, dy)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    with threads(1):
        want = run(naive.selective_scan, exact, order, views, dy)
    for name, like, g, w in zip(["y", *leaves], [leaves["u"], *leaves.values()], got, want, strict=True):
        assert g.dtype == like.dtype, name
        assert g.shape == w.shape, name
        error = ((g - w).abs().max() / w.abs().max().clamp(min=1e-30)).item()
        assert error < TOLERANCE[g.dtype], f"{name} differs by {error:.1e}"


# ---- values and gradients ----


@needs_gxx
@pytest.mark.parametrize(
    ("chunk", "D", "ordered"),
    [(8, 64, False), (8, 64, True), (4, 64, True), (8, 96, False), (4, 32, False), (8, 128, True)],
)
def test_directions_chunks_and_warps(chunk, D, ordered, emulate):
    emulate(chunk)
    check(random_order(2, 21) if ordered else None, K=2, L=21, D=D)


@needs_gxx
@pytest.mark.parametrize("L", [1, 7, 8, 9, 16])
def test_lengths(L, emulate):
    check(random_order(1, L), K=1, L=L, D=64)


@needs_gxx
def test_the_four_orders_of_the_classifier(emulate):
    check(scan_orders((3, 4)), K=4, batch=1, L=13, D=64)
