"""One epoch of finetuning."""

from collections.abc import Callable

import torch
from timm.data import Mixup
from torch import Tensor, nn

from util.device_loader import DeviceLoader
from util.metrics import RunLog, SilentLog
from util.run import Run
from util.train_loop import train_epoch


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: DeviceLoader,
    run: Run,
    device: torch.device,
    log: RunLog | SilentLog,
    mixup: Mixup | None = None,
) -> dict[str, float]:
    """Train the classifier on labelled images; the EMA of `run` follows every update.

    `criterion` and `mixup`: see `loss_of`. For the rest see `util.train_loop.train_epoch`.
    """

    def after_update() -> None:
        if run.ema is not None:
            run.ema.update(run.model)

    return train_epoch(model, loader, loss_of(model, criterion, mixup), run, device, log, after_update)


def loss_of(model: nn.Module, criterion: nn.Module, mixup: Mixup | None) -> Callable[[Tensor, Tensor], Tensor]:
    """What computes the loss of a batch of images (B, 3, H, W) and labels (B,).

    `criterion` takes logits and labels, or logits and class probabilities where `mixup` mixes images and labels.
    """

    def compute_loss(imgs: Tensor, labels: Tensor) -> Tensor:
        if mixup is not None:
            imgs, labels = mixup(imgs, labels)
        return criterion(model(imgs), labels)

    return compute_loss
