"""The learning rate at any point of a run."""

import math

from torch.optim import Optimizer


def lr_at(epoch: float, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Return the learning rate: linear warm-up from 0, then a half-cosine to `min_lr` (MAE, He et al. 2022).

    Args:
        epoch: position in the run, fractional inside an epoch.
        lr: peak learning rate.
        min_lr: learning rate at the end.
        warmup_epochs: length of the warm-up.
        epochs: length of the run.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr`, times its `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
