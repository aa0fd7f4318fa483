"""The backends of ops/ against the oracle in float64: outputs, every gradient, choosing, building, timing."""

import copy
import importlib
import logging
import multiprocessing
import os
import platform
import re
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from scan_helpers import KERNELS, assert_same, conv_inputs, public, random_order, run, scan_inputs, threads
from torch import func
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import models_arm
import ops
from ops import BackendUnavailable, backends, naive
from ops.backends import compiled, cpu_backend


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill torch.empty with NaN, so that unwritten results are found."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- values ----


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("D", [5, 8, 32, 100])
@pytest.mark.parametrize("L", [1, 2, 3, 37, 63, 64])
def test_scan(backend, dtype, L, D):
    leaves = scan_inputs(L=L, D=D, dtype=dtype)
    assert_same("selective_scan", public("selective_scan", backend), leaves, random_order(4, L))


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("N", [4, 16])
@pytest.mark.parametrize(("K", "ordered"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize(("batch", "D"), [(1, 8), (3, 260)])
def test_scan_directions_states_and_groups(backend, dtype, batch, D, K, ordered, N):
    leaves = scan_inputs(K=K, batch=batch, L=19, D=D, N=N, dtype=dtype)
    assert_same("selective_scan", public("selective_scan", backend), leaves, random_order(K, 19) if ordered else None)


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("ordered", [False, True])
def test_scan_of_views(backend, dtype, ordered):
    K, batch, L, D, N, R = 4, 2, 20, 24, 16, 3
    torch.manual_seed(0)
    shapes = {"u": (batch, L, D), "dt": (K, batch, D, L), "projected": (K, batch, L, R + 2 * N), "A": (K, N, D)}
    leaves = {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    leaves |= {name: torch.randn(D, dtype=dtype).requires_grad_() for name in ("D", "dt_bias")}

    def views(x):
        _, B, C = x["projected"].split([R, N, N], dim=-1)
        same = {name: x[name].expand(K, D) for name in ("D", "dt_bias")}
        return {"u": x["u"].expand(K, batch, L, D), "dt": x["dt"].mT, "A": -x["A"].mT.exp(), "B": B, "C": C, **same}

    order = random_order(K, L).T.contiguous().T if ordered else None  # strided too
    assert_same("selective_scan", public("selective_scan", backend), leaves, order, views)


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("L", [1, 2, 3, 37, 64])
@pytest.mark.parametrize(("D", "W"), [(5, 4), (32, 4), (300, 4), (8, 1), (8, 2), (8, 6)])
def test_conv(backend, dtype, L, D, W):
    leaves = conv_inputs(L=L, D=D, W=W, dtype=dtype)
    assert_same("causal_conv1d", public("causal_conv1d", backend), leaves, random_order(4, L))


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize(("K", "ordered"), [(1, False), (1, True), (4, False)])
def test_conv_directions_of_a_view(backend, dtype, K, ordered):
    leaves = conv_inputs(K=K, batch=3, D=48, dtype=dtype)  # the mixer's x is one half of a projection
    leaves["weight"] = leaves["weight"].detach()[:, :24].requires_grad_()
    leaves["bias"] = leaves["bias"].detach()[:, :24].requires_grad_()

    def views(leaves):
        return {**leaves, "x": leaves["x"].chunk(2, dim=-1)[1]}

    order = random_order(K, 37) if ordered else None
    assert_same("causal_conv1d", public("causal_conv1d", backend), leaves, order, views)


@pytest.mark.parametrize(("op", "inputs"), [("selective_scan", scan_inputs), ("causal_conv1d", conv_inputs)])
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize(
    "grad",
    [
        lambda shape: torch.randn(1, *shape[1:]).expand(shape),
        lambda shape: torch.randn(*shape[:2], shape[3], shape[2]).mT,
        lambda shape: torch.ones(()).expand(shape),
    ],
    ids=["same in all directions", "transposed", "one number"],
)
def test_gradients_of_results_with_strides(op, inputs, backend, dtype, grad):
    assert_same(op, public(op, backend), inputs(dtype=dtype), random_order(4, 37), grad=grad)


@pytest.mark.parametrize(("op", "inputs"), [("selective_scan", scan_inputs), ("causal_conv1d", conv_inputs)])
def test_bfloat16_activations_and_float32_parameters(op, inputs):
    leaves = inputs(varying=torch.bfloat16)
    assert leaves[{"selective_scan": "A", "causal_conv1d": "weight"}[op]].dtype == torch.float32
    assert_same(op, public(op, "torch"), leaves, random_order(4, 37))


@pytest.mark.parametrize(("op", "inputs"), [("selective_scan", scan_inputs), ("causal_conv1d", conv_inputs)])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_autocast_changes_nothing(op, inputs, backend):
    leaves, order = inputs(), random_order(4, 37)
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = public(op, backend)(**leaves, order=order)
            runs.append([y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))])
    for name, a, b in zip(["result", *leaves], *runs, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("op", "inputs"), [("selective_scan", scan_inputs), ("causal_conv1d", conv_inputs)])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_without_some_or_any_gradients(op, inputs, backend):
    leaves, order = inputs(), random_order(4, 37)
    y = public(op, backend)(**leaves, order=order)
    grads = dict(zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True))
    with torch.no_grad():
        assert torch.equal(public(op, backend)(**leaves, order=order), y)
    for name, leaf in leaves.items():
        alone = {other: tensor.detach() for other, tensor in leaves.items()} | {name: leaf}
        (grad,) = torch.autograd.grad(public(op, backend)(**alone, order=order).sum(), [leaf])
        assert torch.equal(grad, grads[name]), name


@pytest.mark.parametrize(
    ("op", "leaves"),
    [
        ("selective_scan", scan_inputs(K=2, batch=2, L=4, D=3, N=2, dtype=torch.float64)),
        ("causal_conv1d", conv_inputs(K=2, batch=2, L=5, D=3, W=3, dtype=torch.float64)),
    ],
)
def test_gradcheck(op, leaves):
    order = random_order(2, 4 if op == "selective_scan" else 5)

    def compute(*tensors):
        return public(op, "torch")(**dict(zip(leaves, tensors, strict=True)), order=order)

    assert torch.autograd.gradcheck(compute, tuple(leaves.values()))


def test_cpu_results_are_reproducible_to_the_bit():
    order, same = random_order(4, 37), lambda inputs: inputs
    for op, leaves in (("selective_scan", scan_inputs(batch=3, D=200)), ("causal_conv1d", conv_inputs(batch=3, D=200))):
        runs, dy = [], torch.randn(4, 3, 37, 200)
        for count in (2, 2, 1, 3):
            with threads(count):
                runs.append(run(public(op, "cpu"), leaves, order, same, dy))
        for other in runs[1:]:
            for name, a, b in zip(["result", *leaves], runs[0], other, strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_extreme_steps_and_not_a_number(backend):
    leaves = {name: leaf.detach() for name, leaf in scan_inputs(K=1, D=8).items()}
    leaves["dt"][..., 0], leaves["dt"][..., 1] = 1e4, -1e4  # delta of 1e4 and of 0
    y = public("selective_scan", backend)(**leaves)
    want = naive.selective_scan(**{name: leaf.double() for name, leaf in leaves.items()})
    assert ((y - want).abs().amax((0, 1, 2)) / want.abs().amax((0, 1, 2))).max() < 1e-5
    leaves["u"][0, 0, 9, 3] = leaves["dt"][0, 1, 9, 3] = float("nan")
    leaves["A"][0, 4, 2] = float("nan")
    broken = public("selective_scan", backend)(**leaves).isnan()
    assert broken[:, :, 9:, 3].all()  # from the token on, so that training can see it
    assert broken[..., 4].all()
    assert broken.sum() == broken[:, :, 9:, 3].sum() + broken[..., 4].sum()


def test_cpu_exponential_and_softplus_number_by_number():
    D, one_state = 5000, torch.eye(16)[:1]  # (1, N)
    dt, x = torch.linspace(-3, 60, D), torch.linspace(-1, 0, D)
    inputs = {"u": torch.ones(2, D), "dt": torch.stack([dt, torch.full((D,), 30.0)])}  # softplus(30) is 30
    inputs["u"][1] = 0
    inputs |= {"B": one_state.expand(2, 16), "C": one_state.expand(2, 16)}
    inputs = {name: tensor[None, None] for name, tensor in inputs.items()}  # (L, .) -> (K, B, L, .)
    zero = torch.zeros(1, D)
    y = ops.selective_scan(**inputs, A=(x / 30).expand(1, 16, D).mT, D=zero, dt_bias=zero, backend="cpu")[0, 0]
    softplus = torch.nn.functional.softplus(dt.double(), threshold=100)
    assert (y[0] / softplus - 1).abs().max() < 5e-7
    assert (y[1] / y[0] / x.double().exp() - 1).abs().max() < 5e-7


class NoteShapes(TorchDispatchMode):
    """Collect the shapes of all tensors that are created."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.shapes += [x.shape for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor)]
        return out


def test_the_states_get_no_gradient():
    """Autograd would fill it with zeros: a pass over as much memory as the states take."""
    leaves = scan_inputs()
    states = cpu_backend.scan_states(leaves["u"], leaves["A"]).shape
    with NoteShapes() as forward:
        y = public("selective_scan", "cpu")(**leaves)
    assert states in forward.shapes
    with NoteShapes() as backward:
        y.sum().backward()
    assert leaves["u"].shape in backward.shapes
    assert states not in backward.shapes


# ---- other derivatives ----

SMALL = {"selective_scan": scan_inputs(K=2, batch=2, L=4, D=3, N=2), "causal_conv1d": conv_inputs(K=2, L=4, D=3, W=3)}
OPS = pytest.mark.parametrize("op", SMALL)


def frozen(op):
    """Return the inputs of an op without gradients, and a tangent for each."""
    inputs = {name: leaf.detach() for name, leaf in SMALL[op].items()}
    return inputs, {name: torch.randn_like(tensor) for name, tensor in inputs.items()}


def in_dual_level(compute, inputs, tangents):
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(tensor, tangents[name]) for name, tensor in inputs.items()}
        return forward_ad.unpack_dual(compute(duals)).tangent


def in_dual_level_with_gradients(compute, inputs, tangents):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    return in_dual_level(compute, leaves, tangents)


def pairs(inputs, tangents):
    """Return two sets of inputs as one batch, to be mapped over."""
    return {name: torch.stack([tensor, tensor + tangents[name]]) for name, tensor in inputs.items()}


def first_only(compute, inputs):
    name = next(iter(inputs))
    return (lambda tensor: compute({**inputs, name: tensor}).pow(2).sum()), inputs[name]


DERIVATIVES = {
    "jvp": lambda compute, x, v: func.jvp(compute, (x,), (v,))[1],
    "jacfwd": lambda compute, x, v: torch.cat([part.flatten() for part in func.jacfwd(compute)(x).values()]),
    "jacrev": lambda compute, x, v: torch.cat([part.flatten() for part in func.jacrev(compute)(x).values()]),
    "dual level": in_dual_level,
    "dual level, inputs with gradients": in_dual_level_with_gradients,
    "vmap": lambda compute, x, v: func.vmap(compute)(pairs(x, v)),
    "gradients of each image": lambda compute, x, v: torch.cat(
        [part.flatten() for part in func.vmap(func.grad(lambda x: compute(x).sum()))(pairs(x, v)).values()]
    ),
    "jvp of vmap": lambda compute, x, v: func.jvp(func.vmap(compute), (pairs(x, v),), (pairs(v, v),))[1],
    "vmap of jvp": lambda compute, x, v: func.vmap(lambda x: func.jvp(compute, (x,), (v,))[1])(pairs(x, v)),
    "jacfwd of jacrev": lambda compute, x, v: func.hessian(first_only(compute, x)[0])(first_only(compute, x)[1]),
    "jacrev of jacfwd": lambda compute, x, v: func.jacrev(func.jacfwd(first_only(compute, x)[0]))(
        first_only(compute, x)[1]
    ),
    "linearize": lambda compute, x, v: func.linearize(compute, x)[1](v),
}


@OPS
@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("backend", ["torch", "cpu", "export"])
def test_derivatives_beyond_those_of_the_kernels(op, kind, backend):
    """Torch silently drops tangents for which an operator has no rule."""
    order, (inputs, tangents) = random_order(2, 4), frozen(op)
    got = DERIVATIVES[kind](lambda x: public(op, backend)(**x, order=order), inputs, tangents)
    exact, tangents = ({name: x.double() for name, x in given.items()} for given in (inputs, tangents))
    want = DERIVATIVES[kind](lambda x: getattr(naive, op)(**x, order=order), exact, tangents)
    assert want.abs().max() > 0.1
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@OPS
def test_second_derivatives(op):
    """They are correct in the backend "export" and refused by the kernels."""
    order, leaves = random_order(2, 4), {name: leaf.detach().double() for name, leaf in SMALL[op].items()}
    leaves = tuple(leaf.requires_grad_() for leaf in leaves.values())

    def compute(*tensors, backend="export"):
        return public(op, backend)(**dict(zip(SMALL[op], tensors, strict=True)), order=order)

    assert torch.autograd.gradgradcheck(compute, leaves)
    grads = torch.autograd.grad(compute(*leaves, backend="torch").sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivatives: backend='export' \(--scan_backend export\)"):
        sum(grad.sum() for grad in grads).backward()


def operator(op):
    """Return the registered operator as a function of the same arguments."""
    if op == "causal_conv1d":
        return lambda **x: torch.ops.arm.causal_conv1d(*x.values(), "torch")
    return lambda **x: torch.ops.arm.selective_scan(*x.values(), "torch", False)[0]


@OPS
def test_an_operator_called_directly_refuses_forward_mode(op):
    order, (inputs, tangents) = random_order(2, 4), frozen(op)

    def tangent(x, v):
        return func.jvp(lambda x: operator(op)(**x, order=order), (x,), (v,))[1]

    for compute in (tangent, torch.compile(tangent, backend="eager")):
        with pytest.raises(NotImplementedError, match=r"^the operators arm::\.\.\. have no forward-mode derivatives"):
            compute(inputs, tangents)


@OPS
def test_forward_mode_of_a_backward_pass_is_refused(op):
    leaf = next(iter(SMALL[op].values()))
    y = public(op, "torch")(**SMALL[op])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="backend='export' where only a backward"):
        torch.autograd.grad(y, leaf, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_forward_mode_of_models():
    """Also with frozen weights, as in a linear probe."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4}
    classifier = models_arm.create_classifier("arm_tiny_pz16", **sizes, num_classes=3).double().eval()
    torch.nn.init.normal_(classifier.head.weight)
    pretrain = models_arm.create_pretrain_model(
        "arm_tiny_pz16", **sizes, cluster_size=2, dec_embed_dim=64, dec_depth=2
    ).double()
    imgs, direction = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    for model in (classifier, copy.deepcopy(classifier).requires_grad_(False), pretrain.requires_grad_(False)):
        want = (model(imgs + 1e-6 * direction) - model(imgs - 1e-6 * direction)) / 2e-6
        with sdpa_kernel(SDPBackend.MATH):  # torch's faster attention has no forward mode, and says so
            got = func.jvp(model, (imgs,), (direction,))[1]
        assert (got - want).norm() < 1e-6 * want.norm()


# ---- arguments ----


def test_poison_reaches_new_tensors():
    assert torch.ones(1).new_empty(64).isnan().all()
    assert torch.empty_like(torch.ones(64)).isnan().all()


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "dt_bias", "order"])
def test_shapes_that_do_not_fit(name):
    inputs = {**scan_inputs(), "order": random_order(4, 37)}
    inputs[name] = inputs[name][..., :3] if name == "A" else inputs[name][:3]
    wrong = "B" if name == "A" else name  # A tells N
    with pytest.raises(ValueError, match=rf"^{wrong} must have shape \(4, .*, got \("):
        ops.selective_scan(**inputs, backend="torch")


@pytest.mark.parametrize(("op", "inputs"), [("selective_scan", scan_inputs), ("causal_conv1d", conv_inputs)])
@pytest.mark.parametrize("backend", ["torch", "cpu", "export"])
@pytest.mark.parametrize("empty", ["batch", "D"])
def test_no_images_or_no_channels(op, inputs, backend, empty):
    """Results are empty, and gradients of inputs that all images share are 0."""
    leaves = inputs(K=2, L=5, **{empty: 0})
    y = public(op, backend)(**leaves, order=random_order(2, 5))
    assert y.shape == (2, 0 if empty == "batch" else 2, 5, 0 if empty == "D" else 32)
    for name, grad in zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert grad.shape == leaves[name].shape, name
        assert not grad.any(), name


@pytest.mark.parametrize("backend", ["torch", "cpu", "export", "auto"])
@pytest.mark.parametrize(("size", "name"), [("K", "direction"), ("L", "token"), ("N", "state"), ("W", "tap")])
def test_no_directions_tokens_states_or_taps(backend, size, name):
    for op, inputs in (("selective_scan", scan_inputs), ("causal_conv1d", conv_inputs)):
        if (size, op) in (("N", "causal_conv1d"), ("W", "selective_scan")):
            continue
        leaves = inputs(**{"K": 2, "L": 5, size: 0})
        with pytest.raises(ValueError, match=f"^there must be at least one {name}$"):
            public(op, backend)(**leaves)


@pytest.mark.parametrize("backend", ["torch", "cpu", "export"])
def test_dtypes_that_are_refused(backend):
    """Rounding to integers would change the numbers."""
    scan, conv, order = scan_inputs(L=5), conv_inputs(L=5), random_order(4, 5)
    for wrong in (order.float(), order.bool()):
        with pytest.raises(TypeError, match=f"order int64, got torch.float32 and {wrong.dtype}"):
            ops.selective_scan(**scan, order=wrong, backend=backend)
        with pytest.raises(TypeError, match=f"order int64, got torch.float32 and {wrong.dtype}"):
            ops.causal_conv1d(**conv, order=wrong, backend=backend)
    with pytest.raises(TypeError, match=r"must be floating point, .*, got torch\.int64$"):
        ops.selective_scan(**{**scan, "u": scan["u"].long()}, backend=backend)
    with pytest.raises(TypeError, match=r"must be floating point, .*, got torch\.int64$"):
        ops.causal_conv1d(**{**conv, "x": conv["x"].long()}, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("token", [37, -38])
def test_order_out_of_range(backend, token):
    order = random_order(4, 37)
    order[2, 5] = token
    with pytest.raises(IndexError):
        ops.selective_scan(**scan_inputs(), order=order, backend=backend)
    with pytest.raises(IndexError):
        ops.causal_conv1d(**conv_inputs(), order=order, backend=backend)


# ---- choosing ----


def test_unknown_backend():
    message = "unknown backend 'fast'; choose from auto, cpu, cuda, triton, mamba_ssm, torch, export"
    with pytest.raises(ValueError, match=message):
        ops.check_backend("fast")
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(**scan_inputs(), backend="fast")


@pytest.mark.parametrize("package", ["mamba_ssm", "causal_conv1d"])
def test_missing_cuda_packages(package, fresh, monkeypatch):
    stand_in_packages(monkeypatch)
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match=f"{package}.*pip install --no-build-isolation -r requirements-cuda"):
        ops.check_backend("mamba_ssm")
    ops.check_backend("auto")
    ops.check_backend("torch")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PATH", "", r"no C compiler found \(looked for cc, gcc, clang"),
        ("CC", "no-such-cc -O1", r"looked for no-such-cc -O1"),
        ("CC", "'", r"looked for '"),
        ("CC", "false", "`false -O3 .*`: exit status 1"),
        ("NATIVE", "-march=no-such-cpu", "no-such-cpu"),
    ],
)
def test_missing_compiler(name, value, message, fresh, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    if name == "NATIVE":
        monkeypatch.setattr(cpu_backend, name, value)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendUnavailable, match=message) as error:
        ops.check_backend("cpu")
    assert "\n" not in str(error.value)
    with pytest.raises(BackendUnavailable, match=message):
        ops.causal_conv1d(**conv_inputs(), backend="cpu")
    with caplog.at_level(logging.INFO, "arm"):
        for _ in range(3):
            assert ops.choose_backend("auto", torch.device("cpu"), torch.float32, 32) == "torch"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert ops.unavailable("cpu") in record.message


def test_odd_values_of_cc(fresh, monkeypatch, tmp_path):
    """A blank $CC counts as unset; a file that is no program is named, without an install hint."""
    monkeypatch.setenv("CC", " ")
    assert cpu_backend._compiler() in [[name] for name in cpu_backend.COMPILERS]
    program = tmp_path / "cc"
    program.write_text("nothing")
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    with pytest.raises(BackendUnavailable, match=f"{program} .*`: Exec format error$"):
        ops.check_backend("cpu")


@pytest.mark.parametrize(("rank", "logged"), [(None, 1), ("0", 1), ("1", 0)])
def test_the_choice_is_logged_once_by_rank_0(rank, logged, fresh, monkeypatch, caplog):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO, "arm"):
        for _ in range(3):
            assert ops.choose_backend("auto", torch.device("cpu"), torch.float32, 32) == "cpu"
    assert [record.levelname for record in caplog.records] == ["INFO"] * logged


@pytest.mark.parametrize(
    ("device", "dtype", "width", "missing", "expected"),
    [
        ("cpu", torch.float32, 32, [], "cpu"),
        ("cpu", torch.float32, 32, ["cpu"], "torch"),
        ("cpu", torch.float64, 32, [], "torch"),
        ("cpu", torch.bfloat16, 32, [], "torch"),
        ("cuda", torch.float32, 768, [], "triton"),
        ("cuda", torch.bfloat16, 768, [], "triton"),
        ("cuda", torch.bfloat16, 768, ["triton"], "mamba_ssm"),
        ("cuda", torch.bfloat16, 768, ["triton", "mamba_ssm"], "torch"),
        ("cuda", torch.bfloat16, 100, [], "mamba_ssm"),
        ("cuda", torch.float64, 768, [], "torch"),
        ("mps", torch.float32, 32, [], "torch"),
    ],
)
def test_auto(device, dtype, width, missing, expected, fresh, monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "unavailable", lambda name: f"no {name} here" if name in missing else None)
    monkeypatch.setattr(backends, "faster", lambda name, device: False)
    with caplog.at_level(logging.INFO, "arm"):
        assert ops.choose_backend("auto", torch.device(device), dtype, width) == expected
    assert ops.choose_backend("torch", torch.device(device), dtype, width) == "torch"
    (record,) = caplog.records
    assert f"{dtype} on {device}: {expected}" in record.message
    if expected == "triton":
        assert ops.choose_backend("auto", torch.device(device), dtype, width, 12) == "mamba_ssm"
    assert all(f"{name}: no {name} here" in record.message for name in missing)
    assert record.levelname == ("WARNING" if missing and expected == "torch" else "INFO")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "width", "what"),
    [
        ("cpu", "cpu", torch.float64, 32, "torch.float64 on cpu"),
        ("cpu", "cpu", torch.bfloat16, 32, "torch.bfloat16 on cpu"),
        ("cpu", "cuda", torch.float32, 32, "torch.float32 on cuda"),
        ("mamba_ssm", "cpu", torch.float32, 32, "torch.float32 on cpu"),
        ("mamba_ssm", "cuda", torch.float64, 32, "torch.float64 on cuda"),
        ("triton", "cpu", torch.float32, 32, "torch.float32 on cpu"),
        ("triton", "cuda", torch.float64, 32, "torch.float64 on cuda"),
        ("triton", "cuda", torch.float32, 100, "100 channels (not a multiple of 32)"),
    ],
)
def test_a_requested_backend_refuses_other_tensors(backend, device, dtype, width, what, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    with pytest.raises(TypeError, match=re.escape(f"'{backend}' does not compute {what}: use backend 'torch'")):
        ops.choose_backend(backend, torch.device(device), dtype, width)


def test_the_choice_is_made_in_one_place(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "choose_backend", lambda *request: asked.append(request) or "torch")
    monkeypatch.setattr(cpu_backend, "load", None)
    ops.selective_scan(**scan_inputs(), backend="cpu")
    ops.causal_conv1d(**conv_inputs())
    given = torch.device("cpu"), torch.float32, 32
    assert asked == [("cpu", *given, 16), ("auto", *given)]  # 16 states


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("whole", "from ops.naive import causal_conv1d, selective_scan"),
        ("kernels", "from ops.backends.torch_backend import conv_backward, conv_forward\n"
                    "from ops.backends.torch_backend import scan_backward, scan_forward, scan_states"),
    ],
)  # fmt: skip
def test_a_new_backend_is_one_file_and_one_line(name, functions, fresh, monkeypatch, tmp_path, caplog):
    (tmp_path / f"{name}_backend.py").write_text(f"""
import torch
{functions}

INSTALL = "new-kernels"

def load():
    import new_kernels

def misfit(device, dtype, width, states):
    return None if dtype == torch.float64 else f"{{dtype}} on {{device.type}}"
""")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    monkeypatch.setattr(backends, "BACKENDS", {"auto": [], name: ["cpu"], **backends.BACKENDS})
    monkeypatch.setitem(sys.modules, "new_kernels", types.ModuleType("new_kernels"))
    for op, inputs in (("selective_scan", scan_inputs), ("causal_conv1d", conv_inputs)):
        assert_same(op, public(op, name), inputs(dtype=torch.float64), random_order(4, 37))
    with pytest.raises(TypeError, match=rf"'{name}' does not compute torch\.float32 on cpu: use backend 'torch'"):
        public("causal_conv1d", name)(**conv_inputs())
    with caplog.at_level(logging.INFO, "arm"):
        for dtype, chosen in ((torch.float64, name), (torch.float32, "cpu")):
            assert ops.choose_backend("auto", torch.device("cpu"), dtype, 32) == chosen
            assert caplog.messages[-1] == f"scan backend for {dtype} on cpu: {chosen}"
    monkeypatch.setitem(sys.modules, "new_kernels", None)
    ops.unavailable.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"new_kernels.*; to install it: pip install new-kernels$"):
        ops.check_backend(name)


def test_importing_ops_imports_neither_triton_nor_the_compiler():
    script = "import sys, ops.fused; print({'triton', 'torch._dynamo', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    ours, theirs = backends.constant(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs)


# ---- building the C kernels ----


def load_at_once(barrier, results):
    cpu_backend.load.cache_clear()
    barrier.wait()
    kernels = cpu_backend.load()
    results.put((kernels._name, kernels.scan_groups(1)))


def test_concurrent_builds_give_one_file(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    ranks = [context.Process(target=load_at_once, args=(barrier, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = {results.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    (library,) = (tmp_path / "arm-ops").iterdir()  # and no leftovers
    assert found == {(str(library), 1)}
    built = library.stat().st_mtime_ns
    assert_same("selective_scan", public("selective_scan", "cpu"), scan_inputs())
    assert library.stat().st_mtime_ns == built  # found in the cache, not built again


def test_a_build_appears_atomically(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_here, built = cpu_backend._run, []

    def compile_and_look(command):
        output = run_here(command)
        if "-o" in command:
            assert not list((tmp_path / "arm-ops").glob("*.so"))
            built.append(os.stat(command[command.index("-o") + 1]).st_ino)
        return output

    monkeypatch.setattr(cpu_backend, "_run", compile_and_look)
    assert [os.stat(cpu_backend.load()._name).st_ino] == built  # the same file, renamed and not copied


def test_cache_that_cannot_be_written(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = compiled.private_folder().name
    assert cpu_backend.load()._name.startswith(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert str(compiled.cache_folder()) == folder


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "writable", "owner", "link", "fifo"])
def test_an_untrusted_or_damaged_compiled_file_is_built_again(damage, fresh, monkeypatch, tmp_path, caplog):
    """A truncated file would end the process with SIGBUS; a file that others can write could execute their code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = Path(cpu_backend.load()._name)
    content = path.read_bytes()
    # not written to in place: this process has it mapped
    os.rename(path, tmp_path / "loaded")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 16
    changed = {"truncated": content[:5000], "bit": flipped, "empty": b""}.get(damage, content)
    if damage == "link":
        path.symlink_to(tmp_path / "loaded")
    elif damage == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(changed)
        path.chmod(0o722 if damage == "writable" else 0o700)
    if damage == "owner":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(path, 12345, 12345)
    before = path.lstat().st_ino
    cpu_backend.load.cache_clear()
    assert cpu_backend.load()._name == str(path)
    status = path.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert status.st_ino != before
    assert status.st_uid == os.geteuid()
    assert stat.S_IMODE(status.st_mode) == 0o700
    assert path.read_bytes() == content
    (message,) = [line for line in caplog.messages if line.endswith(": built again")]
    assert message.startswith(f"{path} ")


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_that_others_can_write_is_not_used(mode, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "arm-ops").mkdir()
    (tmp_path / "arm-ops").chmod(mode)
    assert cpu_backend.load()._name.startswith(compiled.private_folder().name)
    assert not list((tmp_path / "arm-ops").iterdir())


def test_a_compiled_file_is_private_and_flushed_with_any_umask(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino) or fsync(descriptor)
    )
    before = os.umask(0)
    try:
        path = Path(cpu_backend.load()._name)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert flushed == [path.stat().st_ino]


def test_cache_tells_cpus_and_compilers_apart(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_here, here = cpu_backend._run, cpu_backend.load()._name
    cpu_backend.load.cache_clear()
    monkeypatch.setattr(
        cpu_backend, "_run", lambda command: run_here(command) + (b"#define __OTHER__ 1" if "-dM" in command else b"")
    )
    assert cpu_backend.load()._name != here


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 flags")
@pytest.mark.parametrize("cpu", ["x86-64", "haswell"])
def test_cpu_with_shorter_vectors(cpu, fresh, monkeypatch, tmp_path):
    if cpu == "haswell" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_backend, "NATIVE", f"-march={cpu}")
    for D in (3, 36):
        order = random_order(4, 37)
        assert_same("selective_scan", public("selective_scan", "cpu"), scan_inputs(D=D), order)
        assert_same("causal_conv1d", public("causal_conv1d", "cpu"), conv_inputs(D=D), order)
    assert len(list((tmp_path / "arm-ops").iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_kernels_run_on_the_threads_of_torch():
    script = """
import os, torch, ops
threads = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
x = torch.ones(1, 8, 2, 16)
before = threads()
ops.causal_conv1d(x[0], torch.ones(1, 16, 4), torch.ones(1, 16), backend="cpu")
kernel = threads()
torch.ones(1 << 22).exp()
print(kernel - before, threads() - kernel)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "0"]  # three workers beside the caller, and torch uses the same


# ---- the adapter to mamba-ssm, with stand-ins that insist on what the CUDA kernels insist on ----


def stand_in_packages(monkeypatch):
    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert u.dtype == delta.dtype == B.dtype == C.dtype
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
        assert all(x.stride(-1) == 1 for x in (u, delta, B, C))
        assert u.shape[1:] == (len(A), u.shape[-1])
        assert B.shape == C.shape == (len(u), A.shape[1], u.shape[2])
        assert z is None
        assert delta_softplus
        inputs = (x[None] for x in (u.mT, delta.mT, A, B.mT, C.mT, D, delta_bias))
        return naive.selective_scan(*inputs)[0].mT

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        assert 2 <= weight.shape[1] <= 4
        assert weight.dtype == bias.dtype
        assert x.stride(-1) == 1
        assert activation == "silu"
        return naive.causal_conv1d(x.mT, weight[None], bias[None])[0].mT

    scan = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    modules = {"mamba_ssm": types.ModuleType("mamba_ssm"), "mamba_ssm.ops": types.ModuleType("mamba_ssm.ops")}
    modules["mamba_ssm.ops.selective_scan_interface"] = scan
    modules["causal_conv1d"] = types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ops.backends.mamba_ssm_backend", raising=False)


@pytest.mark.parametrize(("K", "ordered"), [(1, False), (4, True)])
@pytest.mark.parametrize("varying", [torch.float32, torch.bfloat16])
def test_mamba_ssm_adapter(K, ordered, varying, fresh, monkeypatch):
    stand_in_packages(monkeypatch)
    adapter = importlib.import_module("ops.backends.mamba_ssm_backend")
    assert ops.unavailable("mamba_ssm") is None
    order = random_order(K, 37) if ordered else None
    scan = {**scan_inputs(K=K, varying=varying)}
    if varying == torch.bfloat16:
        scan["C"] = scan["C"].detach().float().requires_grad_()  # autocast may leave any mixture
    assert_same("selective_scan", adapter.selective_scan, scan, order)
    for W in (1, 2, 4, 5):
        assert_same("causal_conv1d", adapter.causal_conv1d, conv_inputs(K=K, W=W, varying=varying), order)
