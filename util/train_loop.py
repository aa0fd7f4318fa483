"""One epoch of training, the same for pretraining and finetuning."""

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from util.dist import reduce_sum, world_size
from util.lr_sched import lr_at, set_lr
from util.metrics import LOG_EVERY, RunLog, SilentLog


def autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast on a GPU, where it needs no loss scaling; full precision elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    compute_loss: Callable[..., Tensor],
    optimizer: Optimizer,
    epoch: int,
    args: argparse.Namespace,
    device: torch.device,
    log: RunLog | SilentLog,
    after_update: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train for one epoch, `args.accum_iter` batches an update; batches that fill no update are left out.

    Args:
        model: bare or distributed.
        loader: batches of tensors; its sampler has `set_epoch`.
        compute_loss: of the tensors of one batch, on `device`; called under autocast.
        optimizer: its groups may have an `lr_scale`.
        epoch: number of the epoch, from 0.
        args: `lr`, `min_lr`, `warmup_epochs`, `epochs`, `accum_iter`, `clip_grad`.
        device: of the model.
        log: of this rank.
        after_update: called after every update.

    Returns:
        `train_loss`, the mean over all batches of all processes, and `train_lr` of the last update.

    Raises:
        RuntimeError: the loss is no finite number; the weights are then those before that batch.
    """
    model.train()
    loader.sampler.set_epoch(epoch)
    steps = len(loader) // args.accum_iter * args.accum_iter
    parameters = [p for p in model.parameters() if p.requires_grad]
    progress = log.progress(f"epoch {epoch}", steps)
    epoch_loss, window = 0.0, []
    for step, batch in enumerate(islice(loader, steps)):
        if step % args.accum_iter == 0:
            position = epoch + step / len(loader)
            lr = lr_at(position, args.lr, args.min_lr, args.warmup_epochs, args.epochs)
            set_lr(optimizer, lr)
        updates = (step + 1) % args.accum_iter == 0

        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
        waits = isinstance(model, DistributedDataParallel) and not updates
        with model.no_sync() if waits else nullcontext():  # gradients travel once an update
            with autocast(device):
                loss = compute_loss(*batch)
            (loss / args.accum_iter).backward()
        window.append(loss.item())
        if not math.isfinite(window[-1]):
            raise RuntimeError(
                f"the loss is {window[-1]} in epoch {epoch}, batch {step}; nothing was changed by that batch. "
                f"Go on from {Path(args.output_dir) / 'checkpoint-last.pth'} with --resume, or lower --blr"
            )
        if updates:
            norm = nn.utils.clip_grad_norm_(parameters, math.inf if args.clip_grad is None else args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            after_update()

        progress.update(len(batch[0]) * world_size(), loss=window[-1], lr=lr)
        if len(window) == LOG_EVERY or step + 1 == steps:
            total = reduce_sum(torch.tensor(sum(window), dtype=torch.float64, device=device)).item() / world_size()
            epoch_loss += total
            # MAE's abscissa: epochs times 1000, so that runs of any batch size compare
            log.scalars(int(1000 * position), train_loss=total / len(window), lr=lr, grad_norm=norm.item())
            window = []
    progress.close()
    return {"train_loss": epoch_loss / steps, "train_lr": lr}
