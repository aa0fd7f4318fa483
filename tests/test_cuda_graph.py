"""Blocks in CUDA graphs, emulated on the CPU: their bookkeeping with true values. test_cuda_graph_gpu.py has the rest."""

import copy
import logging
import math

import pytest
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import engine_finetune
import engine_pretrain
import models_arm
from conftest import Batches, loop_args
from util import cuda_graph
from util.metrics import SilentLog
from util.run import Run

CPU = torch.device("cpu")
PRETRAIN = {"img_size": 32, "patch_size": 8, "cluster_size": 2, "embed_dim": 32, "dec_embed_dim": 64, "dec_depth": 2}
CLASSIFIER = {"img_size": 24, "patch_size": 8, "num_classes": 3, "embed_dim": 32}

pytestmark = pytest.mark.usefixtures("one_thread")


class Emulation:
    """What `cuda_graph.Recorder` does, with the semantics of graphs: fixed inputs, fixed outputs.

    All graphs share memory. So whatever any of them wrote may be gone as soon as the first one runs again: here it is.
    """

    def __init__(self, device):
        self.memory, self.graphs, self.rehearsals = [], 0, 0

    def warm_up(self, function):
        for _ in range(3):
            function()
        self.rehearsals += 1

    def record(self, function):
        outputs, first = function(), self.graphs == 0
        self.graphs += 1
        static = [None if x is None else x.detach() for x in outputs]
        self.memory += [x for x in static if x is not None]

        def replay():
            if first:
                for x in self.memory:
                    x.fill_(math.nan)
            with torch.enable_grad():
                computed = function()
            for x, new in zip(static, computed, strict=True):
                if x is not None:
                    x.detach().copy_(new.detach())
            replays.append(function)

        for x in self.memory:
            x.data.fill_(math.nan)  # nothing is computed while graphs are captured
        return replay, outputs


replays = []


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setattr(cuda_graph, "Recorder", Emulation)
    replays.clear()


class Trained:
    """A model after some epochs of training, and all that was seen of it: losses, and the gradients of each update."""

    def __init__(self, kind, graphs, batches, epochs=1, **changes):
        torch.manual_seed(0)
        if kind == "pretrain":
            self.model = models_arm.create_pretrain_model("arm_tiny_pz16", **PRETRAIN, depth=4, norm_pix_loss=True)
        else:
            self.model = models_arm.create_classifier("arm_tiny_pz16", **CLASSIFIER, depth=3, drop_path_rate=0.3)
        args = loop_args(lr=0.1, min_lr=0.0, epochs=epochs, cuda_graph=graphs, clip_grad=0.5, batch_size=4, **changes)
        optimizer = torch.optim.SGD(self.model.parameters(), fused=True)  # AdamW makes steps of rounding noise
        self.ema = ModelEmaV3(self.model, decay=0.9) if kind == "finetune" else None
        optimizer.register_step_pre_hook(self.note_gradients)
        self.run = Run(args, self.model, optimizer, self.ema)
        self.seen = []
        for self.run.epoch in range(epochs):
            self.run.samples = 0
            self.epoch(kind, Batches(*[[x.clone() for x in batch] for batch in batches]))  # mixup works in place
            with torch.no_grad():
                self.seen.append({"evaluated": self.model.eval()(batches[0][0])})

    def note_gradients(self, *_):
        self.seen.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    def epoch(self, kind, loader):
        if kind == "pretrain":
            engine_pretrain.train_one_epoch(self.model, loader, self.run, CPU, SilentLog())
        else:
            mixup, criterion = Mixup(mixup_alpha=0.8, num_classes=3), SoftTargetCrossEntropy()
            common = (loader, self.run, CPU, SilentLog(), mixup)
            engine_finetune.train_one_epoch(self.model, criterion, *common)
        self.seen.append({"losses": self.run.loss})


def batches_of(kind, sizes):
    side = 32 if kind == "pretrain" else 24
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(n, 3, side, side, generator=generator), torch.randint(3, (n,), generator=generator)] for n in sizes
    ]


def assert_equal(graphed, eager):
    """The classifier bit for bit. Of a tapped block autograd adds up three gradients, and of a captured one two sums."""

    def same(got, want, name=""):
        if graphed.ema is not None:
            assert torch.equal(got, want), name
        else:
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item()), name

    assert len(graphed.seen) == len(eager.seen)
    for got, want in zip(graphed.seen, eager.seen, strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            same(got[name], value, name)
    for name, value in eager.model.named_parameters():
        same(graphed.model.get_parameter(name), value, name)
    if eager.ema is not None:
        for got, want in zip(graphed.ema.module.parameters(), eager.ema.module.parameters(), strict=True):
            same(got, want)


@pytest.mark.parametrize("accum_iter", [1, 3])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_training_equals_the_eager_one(kind, accum_iter):
    """With taps, drop path, mixup, EMA, an evaluation after each epoch, and a batch of another size in the middle."""
    batches = batches_of(kind, [4, 4, 4, 4, 2, 4])
    eager, graphed = (Trained(kind, g, batches, epochs=2, accum_iter=accum_iter) for g in (False, True))
    assert_equal(graphed, eager)
    blocks = 6 if kind == "pretrain" else 3
    assert len(replays) == 2 * blocks * 9  # but the first of 12 batches, and two of another size
