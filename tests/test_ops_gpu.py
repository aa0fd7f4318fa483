"""The backends that run on CUDA against the oracle in float64: outputs and every gradient."""

import pytest
import torch

import ops
from test_ops import assert_same, conv_inputs, public, random_order, scan_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# The kernels of mamba-ssm take fast exponentials and add up some gradients in an order of their own.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # those kernels and cuBLAS have no deterministic form
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "mamba_ssm"])
def backend(request):
    if reason := ops.unavailable(request.param):
        pytest.skip(reason)
    return request.param


def on_gpu(leaves):
    return {name: leaf.detach().cuda().requires_grad_() for name, leaf in leaves.items()}


@pytest.mark.parametrize("varying", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "ordered"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize(("L", "D"), [(1, 8), (37, 100), (197, 64)])
def test_scan(backend, L, D, K, ordered, varying):
    order = random_order(K, L, "cuda") if ordered else None
    leaves = on_gpu(scan_inputs(K=K, L=L, D=D, varying=varying))
    assert_same("selective_scan", public("selective_scan", backend), leaves, order, tolerance=TOLERANCE[varying])


@pytest.mark.parametrize("varying", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "ordered"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize(("L", "D", "W"), [(1, 8, 4), (37, 100, 4), (197, 64, 4), (37, 8, 1), (37, 8, 6)])
def test_conv(backend, L, D, W, K, ordered, varying):
    order = random_order(K, L, "cuda") if ordered else None
    leaves = on_gpu(conv_inputs(K=K, L=L, D=D, W=W, varying=varying))
    assert_same("causal_conv1d", public("causal_conv1d", backend), leaves, order, tolerance=TOLERANCE[varying])


@pytest.mark.parametrize("varying", [torch.float32, torch.bfloat16])
def test_views_under_autocast(backend, varying):
    leaves = on_gpu(scan_inputs(D=64, varying=varying))
    leaves["B"] = torch.randn(4, 2, 37, 3 + 16 + 16, device="cuda").to(varying).requires_grad_()

    def views(inputs):
        _, B, C = inputs["B"].split([3, 16, 16], dim=-1)
        return {**inputs, "B": B, "C": C * inputs["C"]}

    def compute(**inputs):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return public("selective_scan", backend)(**inputs)

    order = random_order(4, 37, "cuda")
    assert_same("selective_scan", compute, leaves, order, views, tolerance=TOLERANCE[varying])
