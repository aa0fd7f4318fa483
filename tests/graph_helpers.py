"""Emulate CUDA graphs on the CPU, and train a model with them."""

import math

import torch
from helpers import Batches, loop_args
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import engine_pretrain
import models_arm
from Finetuning import engine_finetune
from ops import cuda_graph
from util.tracking.run_log import Log
from util.training.run_state import Run

CPU, COPY = torch.device("cpu"), torch.Tensor.copy_
DECODER = {"cluster_size": 2, "dec_embed_dim": 64, "dec_depth": 2, "norm_pix_loss": True}
PRETRAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, **DECODER}
CLASSIFIER = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_classes": 3, "drop_path_rate": 0.3}


class Emulation:
    """Replace `cuda_graph.Recorder`, with the semantics of graphs: fixed inputs and fixed outputs.

    All graphs share memory, so the outputs of all of them may be lost when the first one runs again: here they become
    NaN.
    """

    def __init__(self, device):
        self.memory, self.graphs = [], 0

    def warm_up(self, function):
        for _ in range(3):
            function()

    def record(self, function):
        outputs, first = function(), self.graphs == 0
        self.graphs += 1
        static = [None if x is None else x.detach() for x in outputs]
        self.memory += [x for x in static if x is not None]

        def replay():
            if first:
                for x in self.memory:
                    x.data.fill_(math.nan)
            with torch.enable_grad():
                computed = function()
            for x, new in zip(static, computed, strict=True):
                if x is not None:
                    COPY(x.data, new.detach())  # as on a GPU, where autograd does not see it
            replays.append(function)

        for x in self.memory:
            x.data.fill_(math.nan)  # a capture computes nothing
        return replay, outputs


replays = []
RECORDER = cuda_graph.Recorder


class Trained:
    """A model after some epochs of training, with its losses and the gradients of each update in `seen`."""

    device = CPU

    def __init__(self, kind, graphs, batches, epochs=1, wrap=lambda model, device: model, **changes):
        torch.manual_seed(0)
        if kind == "pretrain":
            self.model = models_arm.create_pretrain_model("arm_tiny_pz16", **PRETRAIN)
        else:
            self.model = models_arm.create_classifier("arm_tiny_pz16", **CLASSIFIER)
        self.model.to(self.device)
        args = loop_args(lr=0.1, min_lr=0.0, epochs=epochs, cuda_graph=graphs, clip_grad=0.5, batch_size=4, **changes)
        optimizer = torch.optim.SGD(self.model.parameters(), fused=True)  # AdamW would turn rounding noise into steps
        self.ema = ModelEmaV3(self.model, decay=0.9) if kind == "finetune" else None
        optimizer.register_step_pre_hook(self.note_gradients)
        self.prepare()
        self.wrapped = wrap(self.model, self.device)
        captured = cuda_graph.BlockGraphs(self.model) if graphs else None
        self.run = Run(args, self.model, optimizer, self.ema, graphs=captured)
        self.seen = []
        for self.run.epoch in range(epochs):
            self.run.samples = 0
            here = [[x.clone().to(self.device) for x in batch] for batch in batches]  # mixup works in place
            self.epoch(kind, Batches(*here))
            with torch.no_grad():
                self.seen.append({"evaluated": self.model.eval()(here[0][0])})

    def prepare(self):
        """Change the model before training; tests replace this."""

    def note_gradients(self, *_):
        self.addresses = {p.grad.data_ptr() for p in self.model.parameters() if p.grad is not None}
        self.seen.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    def epoch(self, kind, loader):
        if kind == "pretrain":
            engine_pretrain.train_one_epoch(self.wrapped, loader, self.run, self.device, Log())
        else:
            mixup, criterion = Mixup(mixup_alpha=0.8, num_classes=3), SoftTargetCrossEntropy()
            compute_loss = engine_finetune.loss_of(self.wrapped, criterion, mixup)
            engine_finetune.train_one_epoch(self.wrapped, compute_loss, loader, self.run, self.device, Log())
        self.seen.append({"losses": self.run.loss})


def batches_of(kind, sizes):
    side = 32 if kind == "pretrain" else 24
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(n, 3, side, side, generator=generator), torch.randint(3, (n,), generator=generator)] for n in sizes
    ]


def assert_equal(graphed, eager, exact=False):
    """Check that runs are equal, the classifier bit for bit.

    In pretraining, autograd adds three gradients of a tapped block, but two of a captured one.
    """

    def same(got, want, name=""):
        if exact or eager.ema is not None:
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
