"""One epoch of pretraining."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from util.data.device_loader import DeviceLoader
from util.tracking.run_log import Log
from util.training.loop import train_epoch
from util.training.run_state import Run


def train_one_epoch(
    model: nn.Module, loader: DeviceLoader, run: Run, device: torch.device, log: Log
) -> dict[str, float]:
    """Train one epoch on the model's objective, without labels; see `util.training.loop.train_epoch`."""
    return train_epoch(model, loader, loss_of(model), run, device, log)


def loss_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that computes the loss () of a batch: images (B, in_chans, H, W) and labels (B,)."""
    return lambda imgs, _: model(imgs).mean()  # (any shape) -> ()
