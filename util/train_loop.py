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

from util.device_loader import DeviceLoader
from util.dist import reduce_sum, seed_everything, world_size
from util.lr_sched import lr_at, set_lr
from util.metrics import LOG_EVERY, RunLog, SilentLog


def activation_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, where it needs no loss scaling; float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to `activation_dtype`."""
    dtype = activation_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def train_epoch(
    model: nn.Module,
    loader: DeviceLoader,
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
        loader: batches of tensors on `device`; its sampler has `set_epoch`.
        compute_loss: of the tensors of one batch; called under autocast.
        optimizer: its groups may have an `lr_scale`.
        epoch: number of the epoch, from 0.
        args: `seed`, `lr`, `min_lr`, `warmup_epochs`, `epochs`, `accum_iter`, `clip_grad`, `output_dir`.
        device: of the model.
        log: of this rank.
        after_update: called after every update.

    Returns:
        `train_loss`, the mean over all batches of all processes, and `train_lr` of the last update.

    Raises:
        RuntimeError: a gradient is not finite, on whatever process; the weights are those before that update.
    """
    seed_everything(args.seed, epoch)  # a resumed run draws the same numbers as an uninterrupted one
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

        waits = isinstance(model, DistributedDataParallel) and not updates
        with model.no_sync() if waits else nullcontext():  # gradients travel once an update
            with autocast(device):
                loss = compute_loss(*batch)
            (loss / args.accum_iter).backward()
        window.append(loss.item())
        if updates:
            norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf).item()
            if not math.isfinite(norm):  # the same on all processes: they stop together
                raise RuntimeError(
                    f"the gradient is {norm} and the loss {window[-1]} in epoch {epoch}, batch {step}; the weights "
                    f"were not updated. Go on from {Path(args.output_dir) / 'checkpoint-last.pth'} with --resume, "
                    "or lower --blr"
                )
            optimizer.step()
            optimizer.zero_grad()
            after_update()

        progress.update(len(batch[0]) * world_size(), loss=window[-1], lr=lr)
        if updates and (len(window) >= LOG_EVERY or step + 1 == steps):
            total = reduce_sum(torch.tensor(sum(window), dtype=torch.float64, device=device)).item() / world_size()
            epoch_loss += total
            # MAE's abscissa: epochs times 1000, so that runs of any batch size compare
            log.scalars(int(1000 * position), train_loss=total / len(window), lr=lr, grad_norm=norm)
            window = []
    progress.close()
    return {"train_loss": epoch_loss / steps, "train_lr": lr}
