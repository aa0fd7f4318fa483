"""Compiled models: no graph breaks, one graph for all blocks, the values of the eager model."""

import copy

import pytest
import torch
from helpers import TINY_FINETUNE, TINY_PRETRAIN, read_log, relative_error
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

import main_pretrain
import models_arm
from Finetuning import main_finetune
from mamba import FOUR_DIRECTIONS, ONE_DIRECTION, Block, drop_path_factors, scan_orders
from ops import kernel_choice
from util.checkpoints import checkpoint_file
from util.distributed.parallel import distribute

CLASSIFIER = {"img_size": 24, "patch_size": 8, "num_classes": 3, "embed_dim": 32}
PRETRAIN = {"img_size": 32, "patch_size": 8, "cluster_size": 2, "embed_dim": 32, "dec_embed_dim": 64, "dec_depth": 2}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def outputs(compute, parameters, *inputs):
    torch.manual_seed(3)
    y = compute(*inputs)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), parameters)]


def assert_close(got, want):
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 1e-5 * w.abs().max() + 1e-7


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("directions", [ONE_DIRECTION, FOUR_DIRECTIONS], ids=["one", "four"])
def test_a_whole_block_is_one_graph(backend, directions):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("compiled on the GPU by test_ops_gpu.py")
    torch.manual_seed(0)
    block = Block(32, 2, directions, backend)
    h = torch.randn(2, 5, 32, requires_grad=True)
    order = scan_orders((2, 2)) if len(directions) == 4 else None
    keep = drop_path_factors(torch.tensor([0.4]), 2)[0]
    parameters = [h, *block.parameters()]
    want = outputs(block, parameters, h, order, keep)
    assert_close(outputs(torch.compile(block, fullgraph=True), parameters, h, order, keep), want)
    assert counters["stats"]["unique_graphs"] == 1


def test_blocks_of_different_drop_path_share_a_graph():
    """12 rates; the compiler would stop after 8 graphs of one function and run the other blocks eagerly."""
    torch.manual_seed(0)
    model = models_arm.create_classifier("arm_tiny_pz16", **CLASSIFIER, depth=12, drop_path_rate=0.3)
    names, imgs = list(model.state_dict()), torch.randn(4, 3, 24, 24)
    parameters = list(model.parameters())
    want = outputs(model, parameters, imgs)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(outputs(model, parameters, imgs), want)
    assert counters["stats"]["unique_graphs"] == 1
    assert list(model.state_dict()) == names
    with torch.no_grad():
        eager = models_arm.create_classifier("arm_tiny_pz16", **CLASSIFIER, depth=12)
        eager.load_state_dict(model.state_dict())
        assert relative_error(model.eval()(imgs), eager.eval()(imgs)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_pretraining_model():
    """One graph each: encoder block, first and later decoder blocks, taps, loss."""
    torch.manual_seed(0)
    model = models_arm.create_pretrain_model("arm_tiny_pz16", **PRETRAIN, depth=6, norm_pix_loss=True)
    imgs = torch.randn(2, 3, 32, 32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = outputs(model, parameters, imgs)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(outputs(model, parameters, imgs), want)
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]

    twin = copy.deepcopy(model)  # with weights of its own
    torch.nn.init.zeros_(model.enc2dec.weight)
    assert_close(outputs(twin, [p for p in twin.parameters() if p.requires_grad], imgs), want)


@torch._dynamo.config.patch(optimize_ddp=True)  # undone afterwards, whatever `distribute` sets
def test_ddp_does_not_break_graphs(tmp_path, monkeypatch):
    """By default the compiler splits graphs where a bucket of gradients is full."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        monkeypatch.setattr("util.distributed.processes.world_size", lambda: 2)
        model = models_arm.create_classifier("arm_tiny_pz16", **{**CLASSIFIER, "embed_dim": 512}, depth=2)
        model.compile(backend="aot_eager")
        distribute(model, torch.device("cpu"))(torch.randn(2, 3, 24, 24)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["total"] == 1


@pytest.mark.parametrize(
    ("script", "tiny", "more"),
    [
        (main_pretrain, TINY_PRETRAIN, ["--norm_pix_loss"]),
        (main_finetune, TINY_FINETUNE, ["--ema_decay", 0.9, "--drop_path", 0.2, "--reprob", 0]),
    ],
    ids=["pretrain", "finetune"],
)
def test_compiled_run_equals_the_eager_one(script, tiny, more, image_folder, tmp_path, run_script):
    """Through the script, optimizer, EMA and evaluation included."""
    common = [*tiny, *more, "--data_path", image_folder, "--batch_size", 8, "--epochs", 1, "--warmup_epochs", 0]
    logs = {}
    for flag in ("--compile", "--no_compile"):
        counters.clear()
        run_script(script, *common, "--lr", 1e-3, flag, "--output_dir", tmp_path / flag)
        (logs[flag],) = read_log(tmp_path / flag)
        assert (counters["stats"]["unique_graphs"] > 0) == (flag == "--compile")
    for name, value in logs["--no_compile"].items():
        assert logs["--compile"][name] == pytest.approx(value, rel=1e-4), name
    states = [checkpoint_file.read(tmp_path / flag / "checkpoint-last.pth")["model"] for flag in logs]
    assert list(states[0]) == list(states[1])


def test_whether_to_compile(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for works in (True, False):
        monkeypatch.setattr(kernel_choice, "unavailable", lambda name, works=works: None if works else "no compiler")
        assert kernel_choice.should_compile(None, gpu) == works
        assert not kernel_choice.should_compile(None, cpu)
        for device in (cpu, gpu):
            assert kernel_choice.should_compile(True, device)
            assert not kernel_choice.should_compile(False, device)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_forward_mode_of_compiled_modules(backend):
    """Of a block that was compiled and called before, as usual: the right tangent or an error, never one of 0."""
    torch.manual_seed(0)
    block = Block(32, 2, ONE_DIRECTION, backend).requires_grad_(False)
    h, tangent = torch.randn(2, 2, 5, 32)
    keep = torch.ones(2, 1, 1)
    want = torch.func.jvp(lambda h: block(h, None, keep), (h,), (tangent,))[1]
    exact = copy.deepcopy(block).double()
    exact.mixer.scan_backend = "torch"
    far, near = (exact(h.double() + step * tangent.double(), None, keep.double()) for step in (1e-6, -1e-6))
    assert relative_error(want, (far - near) / 2e-6) < 1e-4

    compiled = torch.compile(block, backend="aot_eager")
    compiled(h, None, keep)
    assert relative_error(torch.func.jvp(lambda h: compiled(h, None, keep), (h,), (tangent,))[1], want) < 1e-5

    torch._dynamo.reset()
    compiled(h, None, keep)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="uncompiled and inside"):
        compiled(forward_ad.make_dual(h, tangent), None, keep)
