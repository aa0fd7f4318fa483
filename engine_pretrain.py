"""One epoch of autoregressive pretraining."""

import argparse

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from util.device_loader import DeviceLoader
from util.metrics import RunLog, SilentLog
from util.train_loop import train_epoch


def train_one_epoch(
    model: nn.Module,
    loader: DeviceLoader,
    optimizer: Optimizer,
    epoch: int,
    args: argparse.Namespace,
    device: torch.device,
    log: RunLog | SilentLog,
) -> dict[str, float]:
    """Predict the clusters of every image, each from those before it; labels are not used.

    Arguments, result and errors: see `util.train_loop.train_epoch`.
    """

    def compute_loss(imgs: Tensor, _: Tensor) -> Tensor:
        return model(imgs).mean()  # (n,) -> scalar

    return train_epoch(model, loader, compute_loss, optimizer, epoch, args, device, log)
