"""One epoch of training: gradients, updates, EMA, log points."""

import itertools
import math
import os
import platform
import re
import sys

import pytest
import torch
from fork_server import run_forked
from helpers import REPOSITORY, Batches, loop_args
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import NotedLog, one_weight_run, plain_sgd

from Finetuning import engine_finetune
from util.distributed.parallel import distribute
from util.tracking.run_log import Log, Progress, ScreenLog
from util.training import precision
from util.training.loop import train_epoch
from util.training.run_state import Run


def test_ema_is_the_recursion_over_updates(monkeypatch):
    """Two updates of two accumulated batches each, against the formula on the weights after each update."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    history = [model.weight.detach().clone()]
    ema = ModelEmaV3(model, decay=0.9)
    update_ema = engine_finetune.update_ema
    monkeypatch.setattr(
        engine_finetune,
        "update_ema",
        lambda e, m, skipped: (history.append(m.weight.detach().clone()), update_ema(e, m, skipped)),
    )
    loader = Batches(*([torch.randn(2, 3), torch.randint(2, (2,))] for _ in range(4)))
    args = loop_args(lr=0.1, min_lr=0, accum_iter=2, batch_size=2)
    run = Run(args, model, torch.optim.AdamW(model.parameters(), fused=True), ema)
    compute_loss = engine_finetune.loss_of(model, torch.nn.CrossEntropyLoss(), None)
    engine_finetune.train_one_epoch(model, compute_loss, loader, run, torch.device("cpu"), Log())
    assert len(history) == 3
    want = 0.9 * (0.9 * history[0] + 0.1 * history[1]) + 0.1 * history[2]
    assert torch.allclose(ema.module.weight, want, rtol=1e-6)
    assert not torch.equal(ema.module.weight, history[2])


def test_ema_equals_timms_and_ignores_skipped_updates():
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 20)
    ours, theirs = ModelEmaV3(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    for skipped in (0.0, 1.0, 0.0):
        torch.nn.init.normal_(model.weight)
        before = ours.module.weight.clone()
        engine_finetune.update_ema(ours, model, torch.tensor(skipped))
        if skipped:
            assert torch.equal(ours.module.weight, before)
        else:
            theirs.update(model)
        assert torch.allclose(ours.module.weight, theirs.module.weight, rtol=1e-6)


def test_gradients_are_neither_scaled_nor_clipped_by_default():
    weight, stats = one_weight_run([5.0, 3.0])
    assert weight == 1 - 5 - 3
    assert stats["train_loss"] == (5 * 1 + 3 * (1 - 5)) / 2


def test_gradient_clipping():
    assert one_weight_run([5.0, -0.25], clip_grad=2.0)[0] == pytest.approx(1 - 2 + 0.25, abs=1e-5)


def test_batches_that_fill_no_update_are_left_out():
    weight, stats = one_weight_run([5.0, 3.0, 100.0], accum_iter=2)
    assert weight == 1 - (5 + 3) / 2
    assert stats["train_loss"] == (5 + 3) / 2


def test_accumulation_longer_than_the_log_interval():
    """More accumulated batches than there are between two log points."""
    weight, stats = one_weight_run([1.0, 3.0] * 25, accum_iter=50)
    assert weight == pytest.approx(1 - 2, abs=1e-5)
    assert stats["train_loss"] == pytest.approx(2)


def test_each_log_point_covers_its_own_batches():
    log = NotedLog()
    samples = [1.0] * 19 + [math.nan] + [2.0] * 20 + [3.0] * 5
    _, stats = one_weight_run(samples, log=log, lr=0.0, min_lr=0.0)
    assert [point["train_loss"] for point in log.points] == [1, 2, 3]
    assert log.said == ["epoch 0, batch 19: skipped updates with a non-finite gradient: 1"]
    assert stats["train_loss"] == pytest.approx((19 + 40 + 15) / 44)


def test_loss_spikes_are_logged():
    log = NotedLog()
    one_weight_run([1.0] * 460 + [7.0] * 20 + [1.0] * 20, log=log, lr=0.0, min_lr=0.0)
    assert log.said == ["epoch 0, batch 479: the loss rose to 7, from 1"]


def test_nonfinite_losses_are_not_in_the_mean_of_earlier_losses():
    """Also if all losses between two log points are not finite, here of one update."""
    log = NotedLog()
    samples = [1.0] * 5 + [math.nan] + [1.0] * 24
    weight, stats = one_weight_run([*samples, 7.0], log=log, lr=0.0, min_lr=0.0, save_every_steps=1)
    assert (weight, stats["train_loss"]) == (1, (29 + 7) / 30)
    assert log.said[-1] == "epoch 0, batch 30: the loss rose to 7, from 1"


@pytest.mark.usefixtures("group_of_one")
def test_gradients_are_all_reduced_once_per_update(monkeypatch):
    monkeypatch.setattr("util.distributed.parallel.world_size", lambda: 2)
    model = distribute(torch.nn.Linear(1, 1), torch.device("cpu"))
    monkeypatch.undo()
    assert model.gradient_as_bucket_view
    loader = Batches(*([torch.ones(1, 1)] for _ in range(6)))
    run = Run(loop_args(accum_iter=3), model.module, plain_sgd(model.parameters()))
    synced = []

    def compute_loss(x):
        synced.append(model.require_backward_grad_sync)
        return model(x).mean()

    train_epoch(model, loader, compute_loss, run, torch.device("cpu"), Log())
    assert synced == [False, False, True] * 2


class CountReads(TorchDispatchMode):
    """Count how often the host asks for a number on the device, which on a GPU makes it wait."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("accum_iter", "dtype"), [(1, "fp32"), (3, "fp32"), (1, "fp16")])
def test_the_host_waits_only_at_log_points(accum_iter, dtype, monkeypatch):
    monkeypatch.setattr(precision, "_chosen", dtype)
    lists = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.shape) or to_list(self))
    reads = []
    for batches in (3, 45):
        log = NotedLog()
        with CountReads() as mode:
            one_weight_run([0.5] * batches, log=log, accum_iter=accum_iter, clip_grad=1.0, lr=1e-3, min_lr=1e-3)
        reads.append(mode.reads)
    assert reads[0] == reads[1] == 1  # this test's own look at the weight
    assert len(log.points) == 3  # batches 20 or 21, 40 or 42, 45
    assert lists.count(torch.Size([6])) == 1 + 3


class Lines(ScreenLog):
    """A log that keeps its lines."""

    def __init__(self, every):
        self.lines, self.every = [], every
        self.show = self.lines.append


@pytest.mark.parametrize(("every", "want"), [(1, range(1, 8)), (3, [1, 3, 6, 7]), (1000, [1, 7])])
def test_the_first_update_is_shown_at_once(every, want, monkeypatch):
    """With its own loss and the throughput; the lines after it are means since the last log point, and cover it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    log, samples = Lines(every), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    weight, stats = one_weight_run(samples, log=log, lr=0.0, min_lr=0.0)
    shown = [re.match(r"epoch 0  \[(\d)/7\]  loss (\S+)  lr 0  img/s \d+  left 0:00:0\d$", line) for line in log.lines]
    assert [int(line[1]) for line in shown] == list(want)
    points = [0, *(step for step in want if step % every == 0 or step == 7)]
    means = {after: sum(samples[before:after]) / (after - before) for before, after in itertools.pairwise(points)}
    assert [float(line[2]) for line in shown] == pytest.approx([({1: 1.0} | means)[step] for step in want], abs=1e-3)
    assert (weight, stats["train_loss"]) == (1, 4)


def test_the_first_update_of_accumulated_batches_is_shown(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    log = Lines(20)
    one_weight_run([1.0, 3.0] * 5, log=log, lr=0.0, min_lr=0.0, accum_iter=2)
    assert [line.split("  img/s")[0] for line in log.lines] == [
        f"epoch 0  [{step}/10]  loss 2  lr 0" for step in (2, 10)
    ]


def test_quiet_steps_count_and_print_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    progress = Progress("epoch 7", 3)
    progress.update(8, quiet=True)
    assert capsys.readouterr().out == ""
    progress.update(8, loss=0.25)
    assert re.fullmatch(r"epoch 7  \[2/3\]  loss 0.25  img/s \d+  left 0:00:0\d\n", capsys.readouterr().out)


FAULTS = """
import resource, sys
import torch
from util.data import loaders
from util.distributed.processes import init_device

def faults():
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

init_device("cpu")
if "worker" in sys.argv:
    loaders._begin_worker(0)
counts = [faults() for _ in range(12)]
print(min(later - earlier for earlier, later in zip(counts, counts[1:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_freed_memory_is_used_again():
    """The system maps no new pages for 64 MB that a step frees; it does in workers, and with MALLOC_ variables."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    own = {"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    for words, more, few in (([], {}, True), (["worker"], {}, False), ([], own[0], False), ([], own[1], False)):
        done = run_forked(["-c", FAULTS, *words], cwd=REPOSITORY, env=plain | more)
        assert int(done.stdout) < 100 if few else int(done.stdout) > 10_000, (words, more, done.stdout)


def test_a_loss_of_parts_is_their_sum_and_each_has_a_curve():
    """The parts are means over the finite batches since the last log point, as the loss is."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    loader = Batches(*([torch.tensor([[float(value)]])] for value in (1, 2, math.nan, 3)))
    run, log = Run(loop_args(lr=0.0, min_lr=0.0), model, plain_sgd(model.parameters())), NotedLog()
    log.every = 2
    parts = lambda x: {"loss_a": model(x).mean(), "loss_b": 2 * model(x).mean()}  # noqa: E731
    stats = train_epoch(model, loader, parts, run, torch.device("cpu"), log)
    assert stats["train_loss"] == 6  # 3 * (1 + 2 + 3) / 3
    shown = [{name: value for name, value in point.items() if "loss" in name} for point in log.points]
    assert shown == [
        {"train_loss": 4.5, "train_loss_a": 1.5, "train_loss_b": 3},
        {"train_loss": 9, "train_loss_a": 3, "train_loss_b": 6},
    ]
