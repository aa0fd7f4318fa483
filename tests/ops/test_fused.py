"""The fused operators against their formulas in float64: values, gradients, blocks and models."""

import copy

import pytest
import torch
from scan_helpers import kernel_resources, random_order
from torch import func, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import models_arm
from mamba import FOUR_DIRECTIONS, ONE_DIRECTION, Block, drop_path_factors, scan_orders
from ops import fused
from ops.fused import fused_operators, triton_fused

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICE = GPU if torch.cuda.is_available() else CPU  # without a GPU Triton interprets the kernels
# Relative to the norm; Triton's interpreter cuts bfloat16 off where GPUs round.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
pytestmark = [pytest.mark.gpu] if DEVICE == GPU else []


@pytest.fixture(autouse=True)
def _none_afterwards():
    yield
    fused.use(["none"], CPU)


# ---- values and gradients, against the formula in float64 ----


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def check(name, compute, leaves, tolerance=None):
    """Compare `compute` of leaves by name, with the fused operator, with the formula in float64: result and gradients.

    The leaves are a dict of tensors; those without a gradient are given, not compared.
    """

    def run(inputs):
        y = compute(**inputs)
        torch.manual_seed(1)
        dy = torch.randn(y.shape, device="cpu").to(y.device, y.dtype)
        learnt = {key: x for key, x in inputs.items() if x.requires_grad}
        return {
            "result": y.detach(),
            **dict(zip(learnt, torch.autograd.grad(y, list(learnt.values()), dy), strict=True)),
        }

    exact = {key: x.detach().double().requires_grad_(x.requires_grad) for key, x in leaves.items()}
    fused.use(["none"], DEVICE)
    want = run(exact)
    fused.use([name], DEVICE)
    calls = counted(compute, leaves)
    got = run(leaves)
    assert calls, "the fused operator was not used"
    for key, w in want.items():
        like = leaves.get(key, next(iter(leaves.values())))
        assert got[key].shape == w.shape
        assert key == "result" or got[key].dtype == like.dtype, key
        error = ((got[key].double() - w).norm() / w.norm().clamp(min=1e-12)).item()
        assert error < (tolerance or TOLERANCE[next(iter(leaves.values())).dtype]), f"{key} differs by {error:.1e}"
    return got


class Counter(TorchDispatchMode):
    """Count our own operators."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "arm"
        return function(*args, **(kwargs or {}))


def counted(compute, leaves):
    """Return how many of our operators a call runs."""
    with torch.no_grad(), Counter() as counter:
        compute(**leaves)
    return counter.count


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "hidden"), [((2, 3), 5), ((1, 1), 1), ((3, 43), 24), ((5,), 520)])
def test_swiglu(shape, hidden, dtype):
    """Rows and columns that fill no block, and more of both than one program has."""
    leaves = {"x": drawn(*shape, 8, dtype=dtype), "weight": drawn(2 * hidden, 8, dtype=dtype)}
    leaves["bias"] = drawn(2 * hidden, dtype=dtype)
    check("swiglu", fused.swiglu, leaves)


def test_swiglu_of_slices_and_of_rows_with_strides():
    """As the block has it: weights padded and joined, x a view."""

    def compute(x, w1, w2, bias):
        weight = torch.cat([nn.functional.pad(w, (0, 0, 0, 3)) for w in (w1, w2)])
        return fused.swiglu(x.mT, weight, bias)

    leaves = {"x": drawn(2, 6, 3), "w1": drawn(5, 6), "w2": drawn(5, 6), "bias": drawn(16)}
    check("swiglu", compute, leaves)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("C", [2, 7, 40])
@pytest.mark.parametrize(("batch", "L"), [(2, 1), (3, 5), (2, 10)])
def test_branches(batch, L, C, keep, monkeypatch):
    """Three of them: the input's norm, and two sums; with more rows than programs of the backward pass."""
    monkeypatch.setattr(triton_fused, "WARPS", 8)
    leaves = {"h": drawn(batch, L, C), **{f"{kind}{i}": drawn(C) for i in range(3) for kind in ("weight", "bias")}}
    leaves |= {f"linear{i}": drawn(C, C) for i in range(3)}
    if keep:
        leaves["keep"] = torch.rand(3, batch, 1, 1, device=DEVICE) + 0.5

    def compute(h, keep=None, **p):
        class Norm(nn.LayerNorm):
            def __init__(self, i):
                super().__init__(C)
                del self.weight, self.bias
                self.weight, self.bias = p[f"weight{i}"], p[f"bias{i}"]

        def branch(i):
            return lambda x: x @ p[f"linear{i}"] / C**0.5 + x

        return fused.add_branches(h, [(Norm(i), branch(i)) for i in range(3)], keep)

    check("norm", compute, leaves, tolerance=1e-5 if C > 2 else 1e-3)  # two channels: norms of -1 and 1, slopes near 0


def test_branches_of_a_stream_that_images_share():
    """As in the first block of the decoder, which starts from the same for all images: the formula, not the kernels."""
    fused.use(["norm"], DEVICE)
    h, images, norm = drawn(1, 5, 8), drawn(3, 1, 8), nn.LayerNorm(8).to(DEVICE)
    leaves = {"h": h, "branches": [(norm, lambda x: x * images), (norm, torch.sin)]}
    assert fused.add_branches(**leaves).shape == (3, 5, 8)
    assert not counted(fused.add_branches, leaves)


@pytest.mark.parametrize(("batch", "L", "C", "n"), [(1, 1, 3, 1), (2, 5, 24, 4)])
def test_norms_side_by_side(batch, L, C, n):
    leaves = {
        f"{kind}{i}": drawn(*shape)
        for i in range(n)
        for kind, shape in (("x", (batch, L, C)), ("w", (C,)), ("b", (C,)))
    }

    def compute(**p):
        norms = [nn.LayerNorm(C) for _ in range(n)]
        for i, norm in enumerate(norms):
            del norm.weight, norm.bias
            norm.weight, norm.bias = p[f"w{i}"], p[f"b{i}"]
        return fused.norm_cat([p[f"x{i}"] for i in range(n)], norms)

    check("norm", compute, leaves)


@pytest.mark.parametrize("n", [1, 2])
def test_images_of_one_token_whose_stride_is_another(n):
    """As a transposed gradient has it, which torch takes for contiguous."""
    fused.use(["norm"], DEVICE)
    norms = [nn.LayerNorm(8).to(DEVICE) for _ in range(n)]
    xs = [drawn(3, 1, 8) for _ in norms]
    dense = torch.randn(3, 1, 8 * n, device=DEVICE)
    dy = torch.randn(1, 3, 8 * n, device=DEVICE).copy_(dense.transpose(0, 1)).transpose(0, 1)
    assert dy.stride(1) == 3 * dense.stride(1)
    assert dy.is_contiguous()
    y = fused.norm_cat(xs, norms)
    want = torch.autograd.grad(y, xs, dense, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(y, xs, dy), want))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("ordered", [False, True])
def test_selective_ssm(ordered, backend):
    K, batch, L, C, N, R = 2, 2, 5, 32, 4, 3
    order = random_order(K, L, DEVICE) if ordered else None
    leaves = {"u": drawn(K, batch, L, C), "x_proj": drawn(K, R + 2 * N, C), "dt_proj": drawn(K, C, R)}
    leaves |= {"A": (-torch.rand(K, C, N, device=DEVICE)).requires_grad_(), "D": drawn(K, C), "dt_bias": drawn(K, C)}

    def compute(**inputs):
        which = backend if inputs["u"].dtype == torch.float32 else "torch"
        return fused.selective_ssm(**inputs, order=order, backend=which)

    check("projections", compute, leaves, tolerance=2e-5)


# ---- blocks and models ----


def outputs(model, parameters, *args, amp=None):
    torch.manual_seed(3)
    with torch.autocast(DEVICE.type, amp, enabled=amp is not None):
        y = model(*args)
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(), parameters)]


def assert_close(got, want, tolerance=1e-5):
    for g, w in zip(got, want, strict=True):
        error = ((g - w).norm() / w.norm().clamp(min=1e-9)).item()
        assert error < tolerance, error


@pytest.mark.parametrize(
    "names", [["swiglu"], ["norm"], ["conv"], ["projections"], ["all"]], ids=lambda names: names[0]
)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("directions", [ONE_DIRECTION, FOUR_DIRECTIONS], ids=["one", "four"])
def test_block(directions, keep, names):
    torch.manual_seed(0)
    block = Block(32, 4, directions, "triton" if names == ["conv"] else "torch").to(DEVICE)
    h = drawn(2, 5, 32)
    order = scan_orders((2, 2))[: len(directions)].to(DEVICE) if len(directions) > 1 else None
    factors = drop_path_factors(torch.tensor([0.4]), 2)[0].to(DEVICE) if keep else None
    parameters = [h, *block.parameters()]
    fused.use(["none"], DEVICE)
    want = outputs(block, parameters, h, order, factors)
    fused.use(names, DEVICE)
    assert_close(outputs(block, parameters, h, order, factors), want)
    with torch.no_grad():
        assert_close([block(h, order, factors)], want[:1])


@pytest.mark.parametrize("directions", [ONE_DIRECTION, FOUR_DIRECTIONS], ids=["one", "four"])
def test_gradients_in_half_precision_are_as_exact_as_the_formulas(directions):
    """Under autocast, against float32: result and each gradient by itself, and all of them on average.

    In float16 where the kernels are interpreted: Triton's interpreter cuts bfloat16 off instead of rounding it.
    """
    torch.manual_seed(0)
    amp = torch.float16 if DEVICE == CPU else torch.bfloat16
    block = Block(32, 4, directions, "torch").to(DEVICE)
    h, order = drawn(3, 17, 32), scan_orders((4, 4))[: len(directions)].to(DEVICE)
    keep = torch.tensor([[1.5, 0.0, 1.5], [0.0, 1.2, 1.2]], device=DEVICE)[:, :, None, None]  # (2, B, 1, 1)
    args = (h, order, keep)

    def errors(names, amp):
        fused.use(names, DEVICE)
        got = outputs(block, [h, *block.parameters()], *args, amp=amp)
        return torch.stack([(g - w).norm() / w.norm() for g, w in zip(got, want, strict=True)])

    fused.use(["none"], DEVICE)
    want = outputs(block, [h, *block.parameters()], *args)
    plain, fast = errors(["none"], amp), errors(["all"], amp)
    assert (fast < 2 * plain).all()
    assert (fast / plain).mean() < 1.15


def small_model(kind):
    torch.manual_seed(0)
    if kind == "pretrain":
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "cluster_size": 2,
            "embed_dim": 32,
            "dec_embed_dim": 64,
            "dec_depth": 2,
        }
        model = models_arm.create_pretrain_model("arm_tiny_pz16", **sizes, depth=6, norm_pix_loss=True)
    else:
        sizes = {"img_size": 32, "patch_size": 8, "num_classes": 3, "embed_dim": 32}
        model = models_arm.create_classifier("arm_tiny_pz16", **sizes, depth=3, drop_path_rate=0.3)
    model.to(DEVICE)
    return model, [p for p in model.parameters() if p.requires_grad], torch.randn(4, 3, 32, 32).to(DEVICE)


@pytest.mark.parametrize("kind", ["pretrain", "classifier"])
def test_whole_model(kind):
    """Eager, compiled as one graph a kind of block, under autocast; the formula takes over where derivatives differ."""
    model, parameters, imgs = small_model(kind)
    twin = copy.deepcopy(model)
    fused.use(["none"], DEVICE)
    want, rounded = outputs(model, parameters, imgs), outputs(model, parameters, imgs, amp=torch.bfloat16)
    plain = counted(model, {"imgs": imgs})
    fused.use(["all"], DEVICE)
    assert counted(model, {"imgs": imgs}) > plain
    assert_close(outputs(model, parameters, imgs), want)
    assert_close(outputs(model, parameters, imgs, amp=torch.bfloat16)[:1], rounded[:1], TOLERANCE[torch.bfloat16])

    torch._dynamo.reset()
    counters.clear()
    twin.compile(fullgraph=True, backend="aot_eager")
    learnt = [p for p in twin.parameters() if p.requires_grad]
    assert_close(outputs(twin, learnt, imgs), want)
    assert counters["stats"]["unique_graphs"] == {"pretrain": 5, "classifier": 1}[kind]
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_two_runs_are_equal_bit_for_bit():
    model, parameters, imgs = small_model("classifier")
    fused.use(["all"], DEVICE)
    for a, b in zip(*(outputs(model, parameters, imgs) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_no_images():
    fused.use(["all"], DEVICE)
    block = Block(32, 4, ONE_DIRECTION, "torch").to(DEVICE)
    h = drawn(0, 5, 32)
    grads = torch.autograd.grad(block(h).sum(), [h, *block.parameters()])
    assert not any(grad.any() for grad in grads)


def test_casts_are_an_option_of_the_compiler():
    """They join small kernels on a GPU; the results of a compiled model stay the same."""
    model, parameters, imgs = small_model("classifier")
    fused.use(["none"], DEVICE)
    assert fused.compile_options() == {}
    want = outputs(model, parameters, imgs)
    fused.use(["casts"], DEVICE)
    model.compile(fullgraph=True, **fused.compile_options())
    assert_close(outputs(model, parameters, imgs), want)  # the compiler refuses options that it does not know
    torch._dynamo.reset()


# ---- what the operators refuse, and as torch operators ----


def test_derivatives_that_the_operators_do_not_have():
    """The formula computes forward mode; a second backward pass is refused."""
    torch.manual_seed(0)
    block = Block(32, 4, ONE_DIRECTION, "export").to(DEVICE).requires_grad_(False)
    h, tangent = torch.randn(2, 2, 5, 32, device=DEVICE)
    fused.use(["none"], DEVICE)
    want = func.jvp(block, (h,), (tangent,))[1]
    fused.use(["all"], DEVICE)
    assert torch.equal(func.jvp(block, (h,), (tangent,))[1], want)
    x, weight, bias = drawn(3, 8), drawn(10, 8), drawn(10)
    (dx,) = torch.autograd.grad(fused.swiglu(x, weight, bias).sum(), [x], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        dx.sum().backward()


def test_the_formula_computes_float64():
    fused.use(["all"], DEVICE)
    block = Block(32, 4, ONE_DIRECTION, "torch").to(DEVICE).double()
    assert counted(block, {"h": drawn(2, 5, 32).detach().double()}) == 2  # convolution and scan


def test_opcheck():
    """Schema, fake tensors, autograd registration and tracing of all operators."""
    h, branch, weight, bias = drawn(2, 5, 8), drawn(2, 5, 8), drawn(8), drawn(8)
    keep, float32, eps = torch.rand(2, device=DEVICE), torch.float32, 1e-5
    check = torch.library.opcheck
    check(fused_operators.swiglu, (drawn(2, 5, 8), drawn(8)))
    check(fused_operators.swiglu_backward, (h.detach()[..., :4], branch.detach(), bias.detach()))
    check(fused_operators.norm, (h, None, None, None, weight, bias, eps, float32))
    stand_in = torch.zeros(1, device=DEVICE, requires_grad=True).expand(2, 5, 8)
    check(fused_operators.norm, (h.detach(), stand_in, branch, keep, weight, bias, eps, torch.bfloat16))
    inputs = [x.detach() for x in (h, branch, weight)]
    statistics = fused_operators.norm(inputs[0], None, None, None, inputs[2], bias.detach(), eps, float32)[2]
    check(fused_operators.norm_backward, (inputs[0], inputs[1], inputs[0], keep, inputs[2], statistics, torch.bfloat16))
    check(fused_operators.norm_backward, (inputs[0], None, inputs[0], None, inputs[2], statistics, None))
    check(fused_operators.norm_cat, ([h, branch], [weight, bias], [bias, weight], eps, float32))
    both = torch.stack([statistics, statistics])
    dnormed = torch.randn(2, 5, 16, device=DEVICE)
    check(fused_operators.norm_cat_backward, (dnormed, inputs[:2], [inputs[2]] * 2, both))
    tensors = (drawn(2, 2, 5, 32), drawn(2, 3 + 8, 32), drawn(2, 32, 3))
    tensors += ((-torch.rand(2, 32, 4, device=DEVICE)).requires_grad_(), drawn(2, 32), drawn(2, 32))
    check(fused_operators.selective_ssm, (*tensors, None, "torch", True))
    tensors = [x.detach() for x in tensors]
    y, *saved = fused_operators.selective_ssm(*tensors, None, "torch", True)
    check(fused_operators.selective_ssm_backward, (y, *tensors, None, *saved, "torch"))


@pytest.mark.skipif(DEVICE == CPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("batch", "L", "C", "hidden"), [(4, 197, 768, 2048), (2, 128, 1024, 2736), (2, 128, 1536, 4096)]
)
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_widths_of_the_published_models(batch, L, C, hidden, amp):
    """Each operator at the width of a model, eager and compiled, against its formula in float64."""
    torch.manual_seed(0)
    norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2)).to(DEVICE)
    w1, w2 = drawn(2 * hidden, C), drawn(C, hidden)
    bias, h = drawn(2 * hidden), drawn(batch, L, C)
    keep = (torch.rand(2, batch, 1, 1) + 0.5).to(DEVICE)

    def compute(h, w1, w2, bias, norms):
        def mlp(x):
            return nn.functional.linear(fused.swiglu(x, w1 / 16, bias), w2 / 16)

        h = fused.add_branches(h, [(norms[0], mlp), (norms[1], mlp)], keep.to(h.dtype))
        return fused.norm_cat([h, 2 * h], list(norms))

    exact = copy.deepcopy(norms).double()
    leaves = [x.detach().double().requires_grad_() for x in (h, w1, w2, bias)]
    fused.use(["none"], DEVICE)
    want = outputs(lambda: compute(*leaves, exact), [*leaves, *exact.parameters()])
    fused.use(["all"], DEVICE)
    parameters = [h, w1, w2, bias, *norms.parameters()]
    for run in (compute, torch.compile(compute, fullgraph=True)):
        got = outputs(lambda run=run: run(h, w1, w2, bias, norms), parameters, amp=amp)
        assert_close(got, want, 5e-3 if amp is None else 3e-2)  # float32 products may be TF32
    torch._dynamo.reset()


def test_registers_spills_and_instructions():
    """As a training run of ARM-base launches the kernels; nothing spills."""
    bounds = {
        "swiglu_forward": (40, 80), "swiglu_backward": (72, 90), "norm_forward": (40, 290), "norm_backward": (88, 270),
        "conv_forward": (72, 95), "conv_backward": (144, 185),
    }  # fmt: skip
    rows, _ = kernel_resources("--backends", "fused", "--capabilities", 90)
    assert len(rows) == 2 * len(bounds)
    for row in rows:
        registers, instructions = bounds[row["kernel"].removesuffix("_kernel")]
        assert 16 < row["registers"] <= registers, row
        assert 40 < row["instructions"] <= instructions, row
        assert not row["spilled"], row
