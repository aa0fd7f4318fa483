"""Test the CUDA graphs of blocks with an emulation on the CPU; test_cuda_graph_gpu.py tests them on a GPU."""

import copy
import logging
import math
import os
import sys
import warnings
from unittest.mock import MagicMock

import pytest
import torch
from graph_helpers import CLASSIFIER, COPY, CPU, RECORDER, Emulation, Trained, assert_equal, batches_of, replays
from helpers import TINY_FINETUNE, TINY_PRETRAIN, read_log, torchrun
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

import decoder
import main_pretrain
import models_arm
import models_pretrain
from Finetuning import main_finetune
from ops import cuda_graph, kernel_choice, measured
from util import arguments
from util.training import precision

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setattr(cuda_graph, "Recorder", Emulation)
    replays.clear()


@pytest.mark.parametrize("accum_iter", [1, 3])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_training_equals_the_eager_one(kind, accum_iter):
    """Check losses and gradients with taps, drop path, mixup, EMA, evaluations, and a batch of another size."""
    batches = batches_of(kind, [4, 4, 4, 4, 2, 4])
    eager, graphed = (Trained(kind, g, batches, epochs=2, accum_iter=accum_iter) for g in (False, True))
    assert_equal(graphed, eager)
    blocks = 6 if kind == "pretrain" else 3
    assert len(replays) == 2 * blocks * 9  # not in the first of 12 batches, nor in two of another size


@pytest.mark.parametrize("blocks", [0, 1, "all"])
def test_frozen_blocks_are_not_captured(blocks, monkeypatch):
    """The others are; the first one reads its input from outside the graphs."""
    monkeypatch.setattr(Trained, "prepare", lambda self: self.model.freeze(blocks))
    eager, graphed = (Trained("finetune", g, batches_of("finetune", [4, 4, 4])) for g in (False, True))
    assert_equal(graphed, eager)
    assert len(replays) == (0 if blocks == "all" else 2 * (3 - blocks) * 2)


@pytest.mark.parametrize(("kind", "replayed"), [("pretrain", 4 + 3), ("finetune", 1 + 3 + 1)])
def test_nothing_is_copied_between_blocks(kind, replayed, monkeypatch):
    """Check the number of copies: only tensors from outside the blocks are copied, mask and orders once.

    Pretraining: the first input, queries, two latents; gradients of two taps and the output. Classifier: the first
    input, the blocks' factors of drop path; the output's gradient.
    """
    copied = []
    count = lambda self, other: (copied.append(self.shape), COPY(self, other))[1]  # noqa: E731

    def count_copies(self, *args, train=Trained.epoch):
        monkeypatch.setattr(torch.Tensor, "copy_", count)
        train(self, *args)

    monkeypatch.setattr(Trained, "epoch", count_copies)
    trained = Trained(kind, True, batches_of(kind, [4, 4, 4]))
    once = 2 if kind == "pretrain" else 3 + 3  # for the rehearsal
    assert len(copied) == once + 2 * replayed
    mlp = {*trained.model.layers[0].mlp.parameters()}  # autograd changes the strides of some gradients in the mixer
    assert {address for p, address in trained.run.graphs.gradients if p in mlp} <= trained.addresses


def test_compiled_blocks(monkeypatch):
    """Blocks are compiled once, for the first batch and the capture; results equal those without graphs bit for bit."""
    compiled = []
    for graphs in (False, True):
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr(Trained, "prepare", lambda self: self.model.compile(backend="aot_eager"))
        compiled.append(Trained("pretrain", graphs, batches_of("pretrain", [4, 4, 4])))
        compiled[-1].graphs = counters["stats"]["unique_graphs"]
    assert len(replays) == 2 * 6 * 2
    assert compiled[0].graphs == compiled[1].graphs
    assert_equal(compiled[1], compiled[0], exact=True)


def test_under_autocast(monkeypatch):
    """To bfloat16, as on a GPU: neither the capture nor a replay finds weights in its cache that are old."""
    monkeypatch.setattr(precision, "activation_dtype", lambda device: torch.bfloat16)
    batches = batches_of("finetune", [4, 4, 4, 4])
    eager, graphed = (Trained("finetune", graphs, batches, accum_iter=2) for graphs in (False, True))
    assert len(replays) == 2 * 3 * 3
    assert_equal(graphed, eager)


def test_an_update_that_is_skipped(monkeypatch):
    """A batch with a loss that is not finite: its gradients are NaN, and the ones after it are right again."""
    batches = batches_of("finetune", [4, 4, 4, 4])
    batches[2][0][0, 0, 0, 0] = math.inf
    eager, graphed = (Trained("finetune", graphs, batches) for graphs in (False, True))
    assert graphed.run.skipped_in_a_row == 0
    assert graphed.seen[2]["layers.0.norm1.weight"].isnan().all()
    del graphed.seen[2], eager.seen[2]
    assert_equal(graphed, eager)


def captured(kind="finetune"):
    """A model with captured blocks, and a batch of images."""
    batches = batches_of(kind, [4, 4])
    return Trained(kind, True, batches).model.train(), batches[0][0]


def test_a_late_backward_pass_is_refused():
    model, imgs = captured()
    first = model(imgs).sum()
    model(imgs).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # by the layer after the blocks
        first.backward()
    h = torch.randn(4, 10, 32, requires_grad=True)
    replays.clear()
    first, second = (model.layers[0](h, model.order, torch.ones(2, 4, 1, 1)).sum() for _ in range(2))
    with pytest.raises(RuntimeError, match="called again before its backward pass"):
        first.backward()
    second.backward(retain_graph=True)
    assert len(replays) == 3
    with pytest.raises(RuntimeError, match="called again before its backward pass"):
        second.backward()


def test_other_calls_run_the_block_itself():
    """Evaluation, another batch size or autocast, forward mode and a deep copy replay no graph."""
    model, imgs = captured()
    eager = models_arm.create_classifier("arm_tiny_pz16", **CLASSIFIER).train()
    eager.load_state_dict(model.state_dict())
    replays.clear()

    def same(compute):
        results = []
        for m in (model, eager):
            torch.manual_seed(5)
            results.append(compute(m))
        assert torch.equal(*results)
        assert not replays

    same(lambda m: m.eval()(imgs))
    model.train(), eager.train()
    with torch.no_grad():
        same(lambda m: m(imgs))
    same(lambda m: m(imgs[:3]))
    same(lambda m: torch.func.jvp(m, (imgs,), (imgs,))[1])
    with forward_ad.dual_level():
        same(lambda m: forward_ad.unpack_dual(m(forward_ad.make_dual(imgs, imgs))).tangent)
    same(lambda m: copy.deepcopy(m)(imgs))
    same(lambda m: m.layers[0](h=torch.ones(4, 10, 32, requires_grad=True), order=m.order))
    with torch.autocast("cpu", torch.bfloat16):
        same(lambda m: m(imgs.bfloat16()).float())
    assert list(model.state_dict()) == list(eager.state_dict())
    model(imgs)
    assert len(replays) == 3
    model, imgs = captured("pretrain")
    replays.clear()
    model.eval()(imgs)
    assert not replays


def test_weights_loaded_after_the_capture():
    """The graphs read parameters and buffers that change in place."""
    model, imgs = captured()
    other = models_arm.create_classifier("arm_tiny_pz16", **CLASSIFIER).train()
    model.load_state_dict(other.state_dict())  # also creates a new order
    for _ in range(2):
        replays.clear()
        results = []
        for m in (model, other):
            torch.manual_seed(5)
            results.append(m(imgs))
            m.order.copy_(m.order.flip(0))
        assert torch.equal(*results)
        assert len(replays) == 3


def test_the_rehearsal_adds_no_warning(monkeypatch):
    """torch would warn at the first search for waits that it does not find all of them."""
    modes, calls = [], []

    def set_mode(mode):
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", MagicMock())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RECORDER(torch.device("cuda", 0)).warm_up(lambda: calls.append(list(modes)))
    assert calls == [[], [], ["error"]]
    assert modes == ["error", 0]


@torch.library.custom_op("test::waits", mutates_args=())
def waits(x: torch.Tensor) -> torch.Tensor:
    if WAITS:
        raise RuntimeError("called a synchronizing CUDA operation\nand more")
    return x.clone()


waits.register_autograd(lambda ctx, dy: waits(dy))
WAITS = []


@pytest.mark.parametrize("stage", ["rehearsal", "capture", "repeated"])
def test_a_block_that_cannot_be_captured(stage, monkeypatch, caplog):
    """One line names the block and the reason; training continues without graphs."""
    kind = "finetune" if stage == "repeated" else "pretrain"
    batches = batches_of(kind, [4, 4, 4])
    eager = Trained(kind, False, batches)
    warm_up, forward = Emulation.warm_up, decoder.DecoderBlock.forward

    def refuse(self, function):
        WAITS.append(True)
        try:
            return warm_up(self, function)
        finally:
            WAITS.clear()

    def record(self, function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    class Waiting(decoder.DecoderBlock):
        def forward(self, *args):
            return waits(forward(self, *args))

    if stage == "rehearsal":
        monkeypatch.setattr(Emulation, "warm_up", refuse)
        monkeypatch.setattr(models_pretrain, "DecoderBlock", Waiting)
        reason = "Waiting cannot be captured: test.waits.default: called a synchronizing CUDA operation"
    elif stage == "capture":
        monkeypatch.setattr(Emulation, "record", record)
        reason = "Block cannot be captured: CUDA error: operation not permitted when stream is capturing"
    else:
        monkeypatch.setattr(Trained, "prepare", lambda self: self.model.set_grad_checkpointing())
        reason = "Block cannot be captured: it is called more than once in a batch"
    graphed = Trained(kind, True, batches)
    assert [record.message for record in caplog.records if record.name == "arm"][-1:] == [f"no CUDA graphs: {reason}"]
    assert not replays
    assert all(module._compiled_call_impl is None for module in graphed.model.modules())
    assert_equal(graphed, eager, exact=True)


ON_TWO = """
import torch
import graph_helpers
from ops import cuda_graph
from util.distributed.parallel import distribute
from util.distributed.processes import end_groups, init_device, rank

init_device("cpu")
torch.set_num_threads(1)
cuda_graph.Recorder = graph_helpers.Emulation
for kind, accum_iter in (("pretrain", 1), ("finetune", 2)):
    batches = graph_helpers.batches_of(kind, [4] * 8)[rank() :: 2]
    runs = []
    for graphs in (False, True):
        graph_helpers.replays.clear()
        runs.append(graph_helpers.Trained(kind, graphs, batches, wrap=distribute, accum_iter=accum_iter))
    graph_helpers.assert_equal(runs[1], runs[0])
    print(f"rank {rank()}: {kind}, {len(graph_helpers.replays)} replays, {len(runs[1].seen) - 2} updates")
end_groups()
"""


def test_two_processes(tmp_path, monkeypatch):
    """DDP receives every gradient, also with gradient accumulation."""
    (tmp_path / "two.py").write_text(ON_TWO)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    said = torchrun(tmp_path / "two.py")
    for rank in (0, 1):
        assert f"rank {rank}: pretrain, {3 * 2 * 6} replays, 4 updates" in said
        assert f"rank {rank}: finetune, {3 * 2 * 3} replays, 2 updates" in said


@pytest.mark.parametrize(("script", "tiny"), [(main_pretrain, TINY_PRETRAIN), (main_finetune, TINY_FINETUNE)])
def test_a_run_that_resumes(script, tiny, image_folder, tmp_path, run_script, monkeypatch, caplog):
    """Run the scripts with evaluations, EMA or figures: the losses equal those without graphs."""
    monkeypatch.setattr(kernel_choice, "captures", lambda asked, device: asked)
    caplog.set_level(logging.INFO)
    common = [*tiny, "--data_path", image_folder, "--batch_size", 4, "--warmup_epochs", 0, "--lr", 1e-3, "--epochs", 2]
    common += ["--vis_freq", 1] if script is main_pretrain else ["--drop_path", 0.3, "--reprob", 0, "--ema_decay", 0.9]
    common += ["--save_freq", 1]
    for flag in ("--no_cuda_graph", "--cuda_graph"):
        run_script(script, *common, flag, "--output_dir", tmp_path / flag)
    logs = [read_log(tmp_path / flag) for flag in ("--no_cuda_graph", "--cuda_graph")]
    for got, want in zip(*logs, strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    blocks = 6 if script is main_pretrain else 4
    assert caplog.messages.count(f"{blocks} blocks run as CUDA graphs") == 1
    assert len(replays) == 2 * blocks * 11
    file = tmp_path / "--cuda_graph" / "checkpoint-0.pth"
    run_script(script, *common, "--cuda_graph", "--resume", file, "--output_dir", tmp_path / "resumed")
    (row,) = read_log(tmp_path / "resumed")
    assert row == pytest.approx(logs[1][1], rel=1e-4)


def test_whether_to_capture(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for places in ({}, {(9, 0): "a file"}):
        monkeypatch.setattr(measured, "FASTER", {"cuda_graph": places})
        assert cuda_graph.captures(None, gpu) == bool(places)
        assert cuda_graph.captures(True, gpu)
        for asked, device in ((False, gpu), (None, CPU), (False, CPU)):
            assert not cuda_graph.captures(asked, device)


@pytest.mark.parametrize(
    ("script", "words", "problem"),
    [
        (main_pretrain, TINY_PRETRAIN, "--cuda_graph needs a GPU with CUDA, and the model is on cpu"),
        (main_pretrain, ["--fsdp"], "--cuda_graph does not go together with --fsdp: leave one of them out"),
        (main_finetune, ["--deterministic"], "--cuda_graph does not go together with --deterministic"),
        (main_finetune, ["--eval"], "--cuda_graph does not go together with --eval"),
    ],
)
def test_refused_where_graphs_cannot_be_used(
    script, words, problem, image_folder, tmp_path, run_script, capsys, monkeypatch
):
    monkeypatch.setattr("util.arguments.world_size", lambda: 2 if "--fsdp" in words else 1)
    with pytest.raises(SystemExit) as exit_info:
        run_script(script, *words, "--cuda_graph", "--data_path", image_folder, "--output_dir", tmp_path)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_default_is_off_where_graphs_cannot_be_used():
    for flag in ("--fsdp", "--deterministic", None):
        args = main_pretrain.get_args_parser().parse_args(["--data_path", "x", *[flag] * bool(flag)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("util.arguments.world_size", lambda: 2)
            arguments.check_arguments(args)
        assert args.cuda_graph is (None if flag is None else False)
