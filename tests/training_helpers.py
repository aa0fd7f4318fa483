"""Helpers of the tests of training: commands of small runs, a model of one weight, a log that remembers."""

import pytest
import torch
from helpers import TINY_FINETUNE, TINY_PRETRAIN, Batches, loop_args

import main_pretrain
from Finetuning import main_finetune
from util.checkpoints import checkpoint_file
from util.tracking.run_log import Log
from util.training.loop import train_epoch
from util.training.run_state import Run

FAST = "--warmup_epochs 0 --lr 1e-3 --epochs 2 --save_freq 1".split()


FINETUNE = [*TINY_FINETUNE, "--reprob", "0"]  # random erasing draws once per image: it would be the same, only slower


SCRIPTS = {
    "pretrain": (main_pretrain, "main_pretrain.py", [*TINY_PRETRAIN, "--norm_pix_loss"]),
    "finetune": (main_finetune, "Finetuning/main_finetune.py", FINETUNE),
}


def final_weights(folder):
    return checkpoint_file.read(folder / "checkpoint-last.pth")["model"]


def assert_same_run(folder, reference, start):
    """Final weights differ by less than 1 % of the way from start to reference, every logged loss by less than 1e-4.

    AdamW divides by the gradient's size, so rounding noise becomes a step where the true gradient is zero (the keys'
    bias): weights are therefore compared as one vector.
    """
    want, got, begin = (torch.cat([v.flatten() for v in w.values()]) for w in (reference[0], folder[0], start))
    finite = torch.isfinite(want)  # the mask holds -inf
    distance = (want - begin)[finite].norm()
    assert distance > 0.1
    assert (got - want)[finite].norm() < 0.01 * distance
    for row, want_row in zip(folder[1], reference[1], strict=True):
        assert row["train_loss"] == pytest.approx(want_row["train_loss"], rel=1e-4)
        assert row["train_lr"] == want_row["train_lr"]


class NotedLog(Log):
    """A silent log that remembers what it was told."""

    def __init__(self):
        self.said, self.points = [], []

    def say(self, text):
        self.said.append(text)

    def scalars(self, step, **values):
        self.points.append(values)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, fused=True)


def one_weight_run(samples, log=None, make_optimizer=plain_sgd, **changes):
    """Train weight w of loss = w * sample with plain SGD, which shows every gradient as it is."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    loader = Batches(*([torch.tensor([[sample]], dtype=torch.float32)] for sample in samples))
    run = Run(loop_args(**changes), model, make_optimizer(model.parameters()))
    log = Log() if log is None else log
    stats = train_epoch(model, loader, lambda x: model(x).mean(), run, torch.device("cpu"), log)
    return model.weight.item(), stats
