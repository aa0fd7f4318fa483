"""The backends of ops/ against the oracle in float64: outputs, every gradient, arguments."""

import copy

import pytest
import torch
from scan_helpers import KERNELS, assert_same, conv_inputs, public, random_order, run, scan_inputs, threads
from torch import func
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import models_arm
import ops
from ops import naive
from ops.backends import cpu_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
