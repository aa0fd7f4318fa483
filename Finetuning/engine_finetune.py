"""One epoch of finetuning."""

from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from util.data.device_loader import DeviceLoader
from util.tracking.run_log import Log
from util.training.loop import train_epoch
from util.training.run import Run


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: DeviceLoader,
    run: Run,
    device: torch.device,
    log: Log,
    mixup: Mixup | None = None,
) -> dict[str, float]:
    """Train the classifier on labelled images; the EMA of `run` follows every update.

    `criterion` and `mixup`: see `loss_of`. For the rest see `util.training.loop.train_epoch`.
    """

    def after_update(skipped: Tensor) -> None:
        if run.ema is not None:
            follow(run.ema, run.model, skipped)

    return train_epoch(model, loader, loss_of(model, criterion, mixup), run, device, log, after_update)


@torch.no_grad()
def follow(ema: ModelEmaV3, model: nn.Module, skipped: Tensor) -> None:
    """What `ModelEmaV3.update` does with the parameters, unless an update was skipped, which only the device knows."""
    averages, values = list(ema.module.parameters()), list(model.parameters())
    steps = torch._foreach_sub(values, averages)
    torch._foreach_mul_(steps, (1 - ema.decay) * (1 - skipped))
    torch._foreach_add_(averages, steps)


def loss_of(model: nn.Module, criterion: nn.Module, mixup: Mixup | None) -> Callable[[Tensor, Tensor], Tensor]:
    """What computes the loss of a batch of images (B, 3, H, W) and labels (B,).

    `criterion` takes logits and labels, or logits and class probabilities where `mixup` mixes images and labels.
    """

    def compute_loss(imgs: Tensor, labels: Tensor) -> Tensor:
        if mixup is not None:
            imgs, labels = mixup(imgs, labels)
        return criterion(model(imgs), labels)

    return compute_loss
