"""The Triton kernels against the oracle: through Triton's interpreter on CPU tensors, natively where there is a GPU.

Without a GPU the same kernels are also compiled for three generations of them, and held to bounds on registers and
spills.
"""

import os
import subprocess

import pytest
import torch
import triton
from scan_helpers import assert_same, conv_inputs, kernel_resources, public, random_order, run, scan_inputs

import ops
from mamba import scan_orders
from ops import naive, operators
from ops.backends import triton_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = {"selective_scan": public("selective_scan", "triton"), "causal_conv1d": public("causal_conv1d", "triton")}
INPUTS = {"selective_scan": scan_inputs, "causal_conv1d": conv_inputs}
OPS = pytest.mark.parametrize("op", INPUTS)
# Exponentials of GPUs are right to 22 bits, the interpreter's are NumPy's.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2} if DEVICE == "cuda" else {}
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


def on_device(leaves):
    return {name: leaf.detach().to(DEVICE).requires_grad_() for name, leaf in leaves.items()}


def check(op, order=None, views=lambda inputs: inputs, grad=torch.randn, tolerance=None, **sizes):
    order = order if order is None else order.to(DEVICE)
    leaves = on_device(INPUTS[op](**sizes))
    tolerance = tolerance or TOLERANCE.get(next(iter(leaves.values())).dtype)
    assert_same(op, TRITON[op], leaves, order, views, grad, tolerance)


# ---- values and gradients ----


@OPS
@pytest.mark.parametrize("L", [1, 2, 3, 4, 5, 8, 9, 13])
def test_lengths(op, L):
    """Complete and incomplete blocks and chunks of tokens, and a single token."""
    check(op, random_order(2, L), K=2, L=L, D=32)


@OPS
@pytest.mark.parametrize(("K", "ordered"), [(1, False), (1, True), (4, False)])
@pytest.mark.parametrize(("batch", "D"), [(1, 96), (3, 64)])
def test_directions_images_and_widths(op, batch, D, K, ordered):
    check(op, random_order(K, 6) if ordered else None, K=K, batch=batch, L=6, D=D)


@OPS
def test_the_four_orders_of_the_classifier(op):
    check(op, scan_orders((3, 4)), K=4, batch=1, L=13, D=32)


@OPS
def test_more_tokens_than_a_segment(op):
    check(op, random_order(1, 67), K=1, batch=1, L=67, D=32)


@pytest.mark.parametrize("N", [4, 32])
def test_other_numbers_of_states(N):
    check("selective_scan", random_order(2, 6), K=2, L=6, N=N)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("W", [1, 2, 6])
def test_other_numbers_of_taps(W, K):
    check("causal_conv1d", random_order(K, 9), K=K, L=9, W=W)


def test_wide_rows_are_cut_into_blocks():
    check("causal_conv1d", random_order(1, 3), K=1, batch=1, L=3, D=384)
    check("selective_scan", random_order(1, 3), K=1, batch=1, L=3, D=384)


@OPS
@pytest.mark.parametrize("varying", [torch.bfloat16, torch.float16])
def test_activations_of_16_bits_and_float32_parameters(op, varying):
    tolerance = 1e-2 if (DEVICE, varying) == ("cpu", torch.bfloat16) else None  # the interpreter cuts bfloat16 off
    check(op, random_order(2, 9), tolerance=tolerance, K=2, L=9, varying=varying)


@pytest.mark.parametrize("ordered", [False, True])
def test_scan_of_views(ordered):
    """B and C inside one projection, dt time-major, u shared by all directions, A transposed."""
    K, batch, L, D, N, R = 2, 2, 7, 32, 16, 3
    torch.manual_seed(0)
    shapes = {"u": (batch, L, D), "dt": (L, K, batch, D), "projected": (K, batch, L, R + 2 * N), "A": (K, N, D)}
    leaves = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    leaves |= {name: torch.randn(D).requires_grad_() for name in ("D", "dt_bias")}

    def views(x):
        _, B, C = x["projected"].split([R, N, N], dim=-1)
        same = {name: x[name].expand(K, D) for name in ("D", "dt_bias")}
        moved = {"u": x["u"].expand(K, batch, L, D), "dt": x["dt"].permute(1, 2, 0, 3), "A": -x["A"].mT.exp()}
        return {**moved, "B": B, "C": C, **same}

    order = random_order(K, L, DEVICE).T.contiguous().T if ordered else None  # strided too
    assert_same(
        "selective_scan",
        TRITON["selective_scan"],
        on_device(leaves),
        order,
        views,
        tolerance=TOLERANCE.get(torch.float32),
    )


def test_conv_of_a_view():
    def views(leaves):
        return {**leaves, "x": leaves["x"].chunk(2, dim=-1)[1]}

    leaves = on_device(conv_inputs(K=2, L=7, D=128))
    for name in ("weight", "bias"):
        leaves[name] = leaves[name].detach()[:, :64].requires_grad_()
    order, tolerance = random_order(2, 7, DEVICE), TOLERANCE.get(torch.float32)
    assert_same("causal_conv1d", TRITON["causal_conv1d"], leaves, order, views, tolerance=tolerance)


@OPS
@pytest.mark.parametrize(
    "grad",
    [
        lambda shape: torch.randn(1, *shape[1:]).expand(shape),
        lambda shape: torch.randn(*shape[:2], shape[3], shape[2]).mT,
        lambda shape: torch.ones(()).expand(shape),
    ],
    ids=["same in all directions", "transposed", "one number"],
)
def test_gradients_of_results_with_strides(op, grad):
    check(op, random_order(2, 6), grad=grad, K=2, L=6)


@OPS
def test_without_some_or_any_gradients(op):
    leaves, order = on_device(INPUTS[op](K=2, L=6)), random_order(2, 6, DEVICE)
    y = TRITON[op](**leaves, order=order)
    grads = dict(zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True))
    with torch.no_grad():
        assert torch.equal(TRITON[op](**leaves, order=order), y)
    for name, leaf in leaves.items():
        alone = {other: tensor.detach() for other, tensor in leaves.items()} | {name: leaf}
        (grad,) = torch.autograd.grad(TRITON[op](**alone, order=order).sum(), [leaf])
        assert torch.equal(grad, grads[name]), name


@OPS
def test_two_runs_are_equal_bit_for_bit(op):
    leaves, order = on_device(INPUTS[op](K=2, L=9, batch=3)), random_order(2, 9, DEVICE)
    dy = torch.randn(2, 3, 9, 32).to(DEVICE)
    first, second = (run(TRITON[op], leaves, order, lambda x: x, dy) for _ in range(2))
    for name, a, b in zip(["result", *leaves], first, second, strict=True):
        assert torch.equal(a, b), name


def test_softplus_and_its_slope_number_by_number():
    """y = delta where u = D = 1 and C = 0; initial steps are about 0.001, where 1 + e^x would lose digits."""
    x = torch.cat([torch.linspace(-80, 80, 480), torch.linspace(-9, -2, 480)]).to(DEVICE)  # (960,)
    leaf = x[None, None, None].clone().requires_grad_()  # (1, 1, 1, 960)
    zero = torch.zeros(1, 960, device=DEVICE)
    state = torch.eye(16, device=DEVICE)[:1].view(1, 1, 1, 16)
    inputs = {"u": torch.ones_like(leaf), "dt": leaf, "B": state, "C": state, "D": zero, "dt_bias": zero}
    y = TRITON["selective_scan"](**inputs, A=torch.zeros(1, 960, 16, device=DEVICE))  # delta * u
    (slope,) = torch.autograd.grad(y.sum(), [leaf])
    exact = x.double()
    errors = (y.flatten() / torch.nn.functional.softplus(exact, threshold=100) - 1).abs()
    assert errors[exact > -10].max() < 1e-6
    assert errors.max() < 1e-5  # far below, the rounding of an exponent of -100 shows
    assert (slope.flatten() / exact.sigmoid() - 1).abs().max() < 1e-5


def test_extreme_steps_and_not_a_number():
    leaves = {name: leaf.detach() for name, leaf in on_device(scan_inputs(K=1, L=11)).items()}
    leaves["dt"][..., 0], leaves["dt"][..., 1] = 1e4, -1e4  # delta of 1e4 and of 0
    y = TRITON["selective_scan"](**leaves)
    want = naive.selective_scan(**{name: leaf.double() for name, leaf in leaves.items()})
    assert ((y - want).abs().amax((0, 1, 2)) / want.abs().amax((0, 1, 2))).max() < TOLERANCE.get(torch.float32, 1e-5)
    leaves["u"][0, 0, 9, 3] = leaves["dt"][0, 1, 9, 3] = float("nan")
    leaves["A"][0, 4, 2] = float("nan")
    broken = TRITON["selective_scan"](**leaves).isnan()
    assert broken[:, :, 9:, 3].all()  # from the token on, so that training can see it
    assert broken[..., 4].all()
    assert broken.sum() == broken[:, :, 9:, 3].sum() + broken[..., 4].sum()


def test_addresses_beyond_32_bits():
    """Views whose strides reach past 2^31 elements; the memory between the rows is reserved and never touched."""
    stride = 2**31 // 3 + 32
    reserved = torch.empty(0, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # it would fill all of it
    try:
        reserved = torch.empty(3 * stride + 64, dtype=torch.bfloat16, device=DEVICE)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("needs 4 GiB of address space")
    x = reserved.as_strided((1, 4, 32), (1, stride, 1))  # the last token begins behind 2^31
    x.copy_(torch.randn(1, 4, 32))
    assert 3 * stride > 2**31
    conv = {name: leaf.detach().to(DEVICE) for name, leaf in conv_inputs(K=1, batch=1, L=4, D=32).items()}
    conv["x"] = x
    want = naive.causal_conv1d(**{name: tensor.double() for name, tensor in conv.items()})
    assert (TRITON["causal_conv1d"](**conv) - want).abs().max() < 0.02 * want.abs().max()
    scan = {name: leaf.detach().to(DEVICE) for name, leaf in scan_inputs(K=1, batch=1, L=4, D=32).items()}
    scan["u"] = scan["dt"] = x[None]
    want = naive.selective_scan(**{name: tensor.double() for name, tensor in scan.items()})
    leaf, exact = x[None].detach().requires_grad_(), x[None].double().requires_grad_()
    got = TRITON["selective_scan"](**{**scan, "u": leaf, "dt": leaf})
    assert (got - want).abs().max() < 0.02 * want.abs().max()
    (grad,) = torch.autograd.grad(got.float().sum(), [leaf])
    double = {name: tensor.double() for name, tensor in scan.items()} | {"u": exact, "dt": exact}
    (want,) = torch.autograd.grad(naive.selective_scan(**double).sum(), [exact])
    assert (grad - want).abs().max() < 0.02 * want.abs().max()


# ---- arguments ----


@OPS
@pytest.mark.parametrize("token", [9, -1])
@pytest.mark.skipif(DEVICE == "cuda", reason="there the device reports it, and the process is of no use afterwards")
def test_order_out_of_range(op, token):
    order = random_order(2, 9)
    TRITON[op](**INPUTS[op](K=2, L=9), order=order)  # checked, and then changed
    order[1, 5] = token
    with pytest.raises((IndexError, RuntimeError), match="order names a token"):
        TRITON[op](**INPUTS[op](K=2, L=9), order=order)


def test_widths_that_are_no_multiple_of_32():
    with pytest.raises(TypeError, match=r"does not compute 36 channels \(not a multiple of 32\): use backend 'torch'"):
        TRITON["selective_scan"](**on_device(scan_inputs(D=36)))


def test_numbers_of_states_that_are_no_power_of_2():
    with pytest.raises(TypeError, match=r"does not compute 12 states \(not a power of 2\): use backend 'torch'"):
        TRITON["selective_scan"](**on_device(scan_inputs(N=12)))


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_not_available_without_a_gpu(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    triton_backend.load.cache_clear()
    with pytest.raises(ops.BackendUnavailable, match="needs a CUDA GPU"):
        triton_backend.load()


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends to be a GPU")
@pytest.mark.parametrize(
    ("capability", "error", "message"),
    [
        ((7, 5), None, "needs compute capability 8.0, this GPU has 7.5"),
        ((9, 0), RuntimeError("Failed to find C compiler"), "Triton cannot run a kernel: Failed to find C compiler"),
        ((9, 0), subprocess.CalledProcessError(1, ["gcc"]), "Triton cannot run a kernel: .*gcc.*exit status 1"),
        ((9, 0), None, None),
    ],
)
def test_reasons_why_the_kernels_cannot_run(capability, error, message, monkeypatch):
    def first_kernel(*_):
        if error is not None:
            raise error

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(triton_backend, "conv_forward", first_kernel)
    monkeypatch.setattr(triton_backend.torch, "zeros", lambda *shape, device: torch.ones(shape))
    triton_backend.load.cache_clear()
    try:
        if message is None:
            triton_backend.load()
        else:
            with pytest.raises(ops.BackendUnavailable, match=message):
                triton_backend.load()
    finally:
        triton_backend.load.cache_clear()


# ---- as torch operators ----


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_opcheck(backend):
    """Schema, fake tensors, autograd registration and tracing of all four operators."""
    torch.use_deterministic_algorithms(False)  # it compares memory that is not filled in both runs
    device = DEVICE if backend == "triton" else "cpu"
    varying = torch.float32 if backend == "cpu" else torch.bfloat16  # as under autocast: parameters stay in float32
    scan, conv = scan_inputs(K=2, L=6, varying=varying), conv_inputs(K=2, L=6, varying=varying)
    order = random_order(2, 6)

    def tensors(leaves):
        return [leaf.detach().to(device).requires_grad_() for leaf in leaves.values()]

    torch.library.opcheck(operators.selective_scan, (*tensors(scan), order.to(device), backend, True))
    torch.library.opcheck(operators.selective_scan, ([t.detach() for t in tensors(scan)] + [None, backend, False]))
    torch.library.opcheck(operators.causal_conv1d, (*tensors(conv), order.to(device), backend))
    inputs = [t.detach() for t in tensors(scan)]
    y, states = operators.selective_scan(*inputs, None, backend, True)
    torch.library.opcheck(operators.selective_scan_backward, (y, *inputs, None, states, backend))
    inputs = [t.detach() for t in tensors(conv)]
    y = operators.causal_conv1d(*inputs, None, backend)
    torch.library.opcheck(operators.causal_conv1d_backward, (y, *inputs, None, backend))


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_no_gradients_without_trains(backend):
    leaves = on_device(scan_inputs(K=1, L=3)) if backend == "triton" else scan_inputs(K=1, L=3)
    y, states = operators.selective_scan(*leaves.values(), None, backend, False)
    assert states.numel() == 0
    with pytest.raises(RuntimeError, match="trains=False"):
        y.sum().backward()


# ---- machine code ----

# Registers: 255 is all that a thread can have, and leaves 8 warps to a multiprocessor.
BOUNDS = {
    "scan_forward_kernel": {"registers": 128, "instructions": 200},
    "scan_backward_kernel": {"registers": 255, "instructions": 545},
    "conv_forward_kernel": {"registers": 64, "instructions": 105},
    "conv_backward_kernel": {"registers": 112, "instructions": 200},
}
SPILLED = {80: 200, 90: 48, 100: 48}  # bytes a thread, of the scan's backward pass alone


def test_registers_spills_and_instructions():
    """As a training run launches the kernels: one direction of 128 tokens, four of 197."""
    rows, printed = kernel_resources("--backends", "triton")
    settings = [(kernel, capability, d) for capability in (80, 90, 100) for d in (1, 4) for kernel in BOUNDS]
    assert [(row["kernel"], row["capability"], row["directions"]) for row in rows] == settings
    table = [line.split()[:3] for line in printed.splitlines()[2:]]
    assert table == [[kernel.removesuffix("_kernel"), str(c), str(d)] for kernel, c, d in settings]
    for row in rows:
        for name, bound in BOUNDS[row["kernel"]].items():
            assert row[name] <= bound, row
        assert row["spilled"] <= (SPILLED[row["capability"]] if row["kernel"] == "scan_backward_kernel" else 0), row
        assert row["registers"] > 16, row  # something was compiled and found
        assert row["instructions"] > 40, row


def test_interpretation_is_on_where_there_is_no_gpu():
    assert triton.knobs.runtime.interpret == (DEVICE == "cpu")
    assert (os.environ.get("TRITON_INTERPRET") == "1") == (DEVICE == "cpu")


@OPS
@pytest.mark.parametrize("empty", ["batch", "D"])
def test_no_images_or_no_channels(op, empty):
    leaves = on_device(INPUTS[op](K=2, L=5, **{empty: 0}))
    y = TRITON[op](**leaves, order=random_order(2, 5, DEVICE))
    assert y.shape == (2, 0 if empty == "batch" else 2, 5, 0 if empty == "D" else 32)
    for name, grad in zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert grad.shape == leaves[name].shape, name
        assert not grad.any(), name


@OPS
def test_forward_mode(op):
    """Torch's own operators, which have it, replace the kernels."""
    order = random_order(2, 5, DEVICE)
    inputs = {name: leaf.detach() for name, leaf in on_device(INPUTS[op](K=2, L=5)).items()}
    tangents = {name: torch.randn_like(tensor) for name, tensor in inputs.items()}
    got = torch.func.jvp(lambda x: TRITON[op](**x, order=order), (inputs,), (tangents,))[1]
    exact, tangents = ({name: x.double() for name, x in given.items()} for given in (inputs, tangents))
    want = torch.func.jvp(lambda x: getattr(naive, op)(**x, order=order), (exact,), (tangents,))[1]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
