"""One epoch of finetuning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from util.data.device_loader import DeviceLoader
from util.tracking.run_log import Log
from util.training.loop import train_epoch
from util.training.run_state import Run

if TYPE_CHECKING:
    from timm.data import Mixup
    from timm.utils import ModelEmaV3


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: DeviceLoader,
    run: Run,
    device: torch.device,
    log: Log,
    mixup: Mixup | None = None,
) -> dict[str, float]:
    """Train the classifier on labelled images, and update the EMA of `run`: see `loss_of` and `train_epoch`."""
    compute_loss = loss_of(model, criterion, mixup)
    if run.ema is None:
        return train_epoch(model, loader, compute_loss, run, device, log)
    return train_epoch(model, loader, compute_loss, run, device, log, partial(update_ema, run.ema, run.model))


@torch.no_grad()
def update_ema(ema: ModelEmaV3, model: nn.Module, skipped: Tensor) -> None:
    """Update the averages of the parameters as `ModelEmaV3.update` does, unless the update of the weights was skipped.

    Only the device knows whether it was: `skipped` is 1 or 0 there, so that the host does not wait.
    """
    averages: list[Tensor] = list(ema.module.parameters())
    values: list[Tensor] = list(model.parameters())
    steps = torch._foreach_sub(values, averages)
    torch._foreach_mul_(steps, (1 - ema.decay) * (1 - skipped))
    torch._foreach_add_(averages, steps)


def loss_of(model: nn.Module, criterion: nn.Module, mixup: Mixup | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that computes the loss of a batch: images (B, in_chans, H, W), labels (B,) int64 -> scalar.

    `criterion` takes logits and labels; with `mixup`, which mixes images and labels, logits and class probabilities.
    """

    def compute_loss(imgs: Tensor, labels: Tensor) -> Tensor:
        if mixup is not None:
            imgs, labels = mixup(imgs, labels)
        return criterion(model(imgs), labels)

    return compute_loss
