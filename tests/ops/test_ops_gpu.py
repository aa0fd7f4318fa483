"""Tests that need a GPU: every backend against the oracle in float64, whole models, compiled models, no waiting.

test_triton.py runs on the GPU too where there is one.
"""

import contextlib
import copy

import pytest
import torch
from helpers import Batches, loop_args, relative_error
from scan_helpers import assert_same, conv_inputs, public, random_order, scan_inputs
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import models_arm
import ops
from Finetuning import engine_finetune
from mamba import FOUR_DIRECTIONS, Block, scan_orders
from ops import fused, measured, naive
from ops.backends import cuda_backend
from util.tracking.run_log import Log
from util.training.precision import autocast
from util.training.run_state import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# The kernels of mamba-ssm take fast exponentials and add up some gradients in an order of their own.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1e-2}
CLASSIFIER = {"img_size": 64, "num_classes": 10, "embed_dim": 128, "depth": 4}
PRETRAIN = {"embed_dim": 128, "depth": 4, "dec_embed_dim": 64, "dec_depth": 2, "norm_pix_loss": True}


@pytest.fixture(params=["torch", "mamba_ssm", "triton", "cuda"])
def backend(request):
    if reason := ops.unavailable(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    if reason := ops.unavailable(request.param):
        pytest.skip(reason)
    return request.param


def on_gpu(leaves):
    return {name: leaf.detach().cuda().requires_grad_() for name, leaf in leaves.items()}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("varying", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "ordered"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize(("L", "D"), [(1, 32), (37, 96), (197, 64), (24, 384)])
def test_scan(backend, L, D, K, ordered, varying):
    if (backend, L, varying) == ("mamba_ssm", 1, torch.bfloat16):
        pytest.skip("A has no gradient where there is one token, but 1e-7 with mamba-ssm's kernel")
    order = random_order(K, L, "cuda") if ordered else None
    leaves = on_gpu(scan_inputs(K=K, L=L, D=D, varying=varying))
    assert_same("selective_scan", public("selective_scan", backend), leaves, order, tolerance=TOLERANCE[varying])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("varying", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "ordered"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize(("L", "D", "W"), [(1, 32, 4), (37, 96, 4), (197, 64, 4), (37, 32, 1), (37, 32, 6)])
def test_conv(backend, L, D, W, K, ordered, varying):
    order = random_order(K, L, "cuda") if ordered else None
    leaves = on_gpu(conv_inputs(K=K, L=L, D=D, W=W, varying=varying))
    assert_same("causal_conv1d", public("causal_conv1d", backend), leaves, order, tolerance=TOLERANCE[varying])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rank", [3, 8])  # rows of 8 + 16 + 16 numbers begin at multiples of 16 bytes
@pytest.mark.parametrize("varying", [torch.float32, torch.bfloat16])
def test_views_under_autocast(backend, varying, rank):
    leaves = on_gpu(scan_inputs(D=64, varying=varying))
    leaves["B"] = torch.randn(4, 2, 37, rank + 16 + 16, device="cuda").to(varying).requires_grad_()

    def views(inputs):
        _, B, C = inputs["B"].split([rank, 16, 16], dim=-1)
        return {**inputs, "B": B, "C": C * inputs["C"]}

    def compute(**inputs):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return public("selective_scan", backend)(**inputs)

    order = random_order(4, 37, "cuda")
    assert_same("selective_scan", compute, leaves, order, views, tolerance=TOLERANCE[varying])


def test_the_longest_sequence(kernels):
    """768 pixels, 2,304 patches and the class token, in the four orders of the classifier."""
    order = scan_orders((48, 48)).cuda()
    varying, tolerance = (torch.bfloat16, 1e-2) if kernels == "cuda" else (torch.float32, 1e-3)
    for op, inputs in (("selective_scan", scan_inputs), ("causal_conv1d", conv_inputs)):
        leaves = on_gpu(inputs(batch=1, L=2305, D=32, varying=varying))
        assert_same(op, public(op, kernels), leaves, order, tolerance=tolerance)


def test_gradients_that_are_not_dense(kernels):
    """Strides of 0, channels that are not contiguous, and rows at odd addresses."""
    shape = (2, 2, 37, 64)
    for dy in (
        lambda shape: torch.randn(1, *shape[1:]).expand(shape),
        lambda shape: torch.randn(*shape[:2], shape[3], shape[2]).mT,
        lambda shape: torch.randn(*shape[:3], shape[3] + 1)[..., 1:],
    ):
        leaves, order = on_gpu(scan_inputs(K=2, D=64, varying=torch.bfloat16)), random_order(2, 37, "cuda")
        assert leaves["u"].shape == shape
        assert_same("selective_scan", public("selective_scan", kernels), leaves, order, grad=dy, tolerance=1e-2)


def test_in_a_cuda_graph(kernels):
    """Forward and backward pass, captured on a stream of its own and replayed on other numbers."""
    leaves = on_gpu(scan_inputs(K=4, D=128, varying=torch.bfloat16))
    order = random_order(4, 37, "cuda")
    dy = torch.randn(leaves["u"].shape, device="cuda").bfloat16()

    def step():
        y = public("selective_scan", kernels)(**leaves, order=order)
        return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles, loads, and checks the order
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["u"].mul_(0.5)
    graph.replay()
    for name, got, want in zip(["y", *leaves], captured, step(), strict=True):
        assert torch.equal(got, want), name


def test_either_chunk(monkeypatch):
    """Both are in `bench_scan.py`; a default is one of them."""
    if reason := ops.unavailable("cuda"):
        pytest.skip(reason)
    for chunk in (4, 8):
        monkeypatch.setattr(cuda_backend, "CHUNKS", {torch.cuda.get_device_capability(): chunk})
        for ordered in (False, True):
            leaves = on_gpu(scan_inputs(D=128, varying=torch.bfloat16))
            order = random_order(4, 37, "cuda") if ordered else None
            assert_same("selective_scan", public("selective_scan", "cuda"), leaves, order, tolerance=1e-2)


def test_more_than_two_billion_elements(kernels):
    """A batch of 1,024 of ARM-huge at 1,600 tokens: the last image, its gradients too, equals the same image alone."""
    batch, L, D = 1024, 1600, 1536
    if torch.cuda.mem_get_info()[0] < 80e9:
        pytest.skip("needs 80 GB of free memory")
    assert batch * L * D > 2**31
    alone = {name: leaf.detach().cuda() for name, leaf in scan_inputs(K=1, batch=1, L=L, D=D).items()}
    alone |= {name: alone[name].bfloat16() for name in ("u", "dt", "B", "C")}
    many = dict(alone)
    for name in ("u", "dt", "B", "C"):
        many[name] = torch.zeros(1, batch, L, alone[name].shape[-1], dtype=torch.bfloat16, device="cuda")
        many[name][:, -1] = alone[name][:, 0]
    results = []
    for inputs in (alone, many):
        leaves = {name: tensor.requires_grad_(name in ("u", "dt", "B", "C")) for name, tensor in inputs.items()}
        y = public("selective_scan", kernels)(**leaves)
        grads = torch.autograd.grad(y, [leaves[name] for name in ("u", "dt", "B", "C")], torch.ones_like(y))
        results.append([tensor[:, -1].clone() for tensor in (y.detach(), *grads)])
        del y, grads
    for name, a, b in zip(("y", "u", "dt", "B", "C"), *results, strict=True):
        assert torch.equal(a, b), name
    conv = {name: leaf.detach().cuda() for name, leaf in conv_inputs(K=1, batch=1, L=1, D=D).items() if name != "x"}
    results = []
    for inputs in (alone, many):
        x = inputs["u"].detach()[0].requires_grad_()
        y = ops.causal_conv1d(x, **conv, backend=kernels)
        (grad,) = torch.autograd.grad(y, [x], torch.ones_like(y))
        results.append((y.detach()[:, -1].clone(), grad[-1].clone()))
        del x, y, grad
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def loss_and_gradients(model, imgs, mixed=True):
    """Return loss and gradients of one training step by name, under autocast where `mixed`."""
    torch.manual_seed(0)
    with autocast(imgs.device) if mixed else contextlib.nullcontext():
        out = model(imgs)
    loss = out.float().square().mean()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach(), **dict(zip(named, grads, strict=True))}


def errors(got, want):
    """Return the error of every gradient by name, relative to its norm."""
    return {name: ((got[name] - w).norm() / w.norm().clamp(min=1e-12)).item() for name, w in want.items()}


def assert_close(got, want, tolerance):
    for name, error in errors(got, want).items():
        assert error < tolerance, f"{name} differs by {error:.1e}"


def build(kind, backend, seed=0):
    torch.manual_seed(seed)
    if kind == "pretrain":
        model = models_arm.create_pretrain_model("arm_base_pz16", **PRETRAIN, scan_backend=backend)
        return model.cuda(), torch.randn(4, 3, 192, 192, device="cuda")
    model = models_arm.create_classifier("arm_base_pz16", **CLASSIFIER, drop_path_rate=0.2, scan_backend=backend)
    return model.cuda(), torch.randn(4, 3, 64, 64, device="cuda")


KINDS = pytest.mark.parametrize("kind", ["pretrain", "finetune"])


@KINDS
def test_whole_models_against_the_torch_backend(kind, kernels):
    model, imgs = build(kind, kernels)
    reference, _ = build(kind, "torch")
    want = loss_and_gradients(reference, imgs, mixed=False)
    assert_close(loss_and_gradients(model, imgs, mixed=False), want, 1e-3)
    got, want = (loss_and_gradients(m, imgs)["loss"].item() for m in (model, reference))
    assert got == pytest.approx(want, rel=1e-2)  # under autocast both round to bf16 at every step


@KINDS
def test_two_runs_are_equal_bit_for_bit(kind, kernels):
    model, imgs = build(kind, kernels)
    first, second = loss_and_gradients(model, imgs), loss_and_gradients(model, imgs)
    for name, gradient in first.items():
        if "layers" in name:  # the encoder; PyTorch's attention and convolution promise less
            assert torch.equal(gradient, second[name]), name


@KINDS
@pytest.mark.parametrize("choice", ["auto", "torch", "cuda"])
def test_compiled_equals_eager(kind, choice):
    if reason := ops.unavailable(choice):
        pytest.skip(reason)
    model, imgs = build(kind, choice)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True)
    want = loss_and_gradients(model, imgs, mixed=False)
    assert_close(loss_and_gradients(compiled, imgs, mixed=False), want, 1e-3)
    got, want = (loss_and_gradients(m.eval(), imgs)["loss"].item() for m in (compiled, model))
    assert got == pytest.approx(want, rel=1e-2)


@KINDS
def test_fused_operators_in_training(kind, kernels):
    """All of them in a compiled model in bf16: each gradient is about as far from float32 as without them."""
    model, imgs = build(kind, kernels)
    want = loss_and_gradients(build(kind, "torch")[0], imgs, mixed=False)
    results = []
    try:
        for names in (["none"], ["all"]):
            fused.use(names, imgs.device)
            torch._dynamo.reset()  # a choice is part of a graph
            compiled = copy.deepcopy(model)
            compiled.compile(fullgraph=True, **fused.compile_options())
            got, again = loss_and_gradients(compiled, imgs), loss_and_gradients(compiled, imgs)
            results.append(errors(got, want))
            for name, gradient in got.items():
                assert "layers" not in name or torch.equal(gradient, again[name]), f"{name} in a second run"
    finally:
        fused.use(["none"], imgs.device)
        torch._dynamo.reset()
    plain, fast = results
    for name, error in fast.items():
        assert error < 3 * plain[name] + 1e-3, f"{name} differs by {error:.1e}, {plain[name]:.1e} without"
    assert sum(fast.values()) < 1.2 * sum(plain.values())


def test_four_direction_block_against_the_oracle(monkeypatch):
    """In float32, without autocast, with the classifier's own orders."""
    torch.manual_seed(0)
    block, order = Block(128, 4, FOUR_DIRECTIONS, "triton").cuda(), scan_orders((7, 7)).cuda()
    h = torch.randn(2, 50, 128, device="cuda")
    got = block(h, order)
    import mamba

    monkeypatch.setattr(fused, "selective_scan", lambda *args: naive.selective_scan(*args[:-1]))
    monkeypatch.setattr(mamba, "causal_conv1d", lambda *args: naive.causal_conv1d(*args[:-1]))
    assert relative_error(got, block.double()(h.double(), order)) < 2e-3  # float32 products may be TF32


def test_training_does_not_wait_between_log_lines(monkeypatch):
    """Finetuning as it runs: compiled, with mixup and EMA. Any wait for the device raises, but where the loop logs."""
    model, imgs = build("finetune", "auto")
    model.compile()
    images, labels = torch.randn(4, 3, 64, 64, device="cuda"), torch.arange(4, device="cuda")
    loader = Batches(*([images.clone(), labels] for _ in range(4)))
    args = loop_args(lr=1e-3, min_lr=0.0, epochs=2, accum_iter=2, clip_grad=3.0, batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    mixup, ema = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10), ModelEmaV3(model, decay=0.9)
    run = Run(args, model, optimizer, ema)
    reads = []
    to_list = torch.Tensor.tolist

    def read(tensor):
        torch.cuda.set_sync_debug_mode("default")
        reads.append(tensor.shape)
        return to_list(tensor)

    class Criterion(SoftTargetCrossEntropy):
        def forward(self, logits, targets):
            torch.cuda.set_sync_debug_mode(self.mode)  # from the first batch on
            return super().forward(logits, targets)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    try:
        criterion, common = Criterion(), (loader, run, imgs.device, Log())
        for criterion.mode in ("default", "error"):  # what is compiled and allocated at first use may wait
            run.samples = 0
            engine_finetune.train_one_epoch(model, engine_finetune.loss_of(model, criterion, mixup), *common)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads.count(torch.Size([5])) == 2


def test_auto_follows_the_measurements():
    device = torch.device("cuda")
    best = "cuda" if measured.faster("cuda", device) else "triton"
    assert ops.choose_backend("auto", device, torch.bfloat16, 768) == best
    assert ops.choose_backend("auto", device, torch.float32, 768) == "triton"
