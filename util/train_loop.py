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

MAX_NONFINITE = 3  # updates in a row that may be skipped before the run stops


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

    The host queues work for the device and looks at results only where it logs, every `LOG_EVERY` batches. An update
    whose gradient is not finite is skipped on the device itself: gradients are averaged over all processes before
    their norm is taken, so that all of them skip it together.

    Args:
        model: bare or distributed.
        loader: batches of tensors on `device`; its sampler has `set_epoch`.
        compute_loss: of the tensors of one batch; called under autocast.
        optimizer: a fused one, which can skip updates; its groups may have an `lr_scale`.
        epoch: number of the epoch, from 0.
        args: `seed`, `lr`, `min_lr`, `warmup_epochs`, `epochs`, `accum_iter`, `clip_grad`, `output_dir`.
        device: of the model.
        log: of this rank.
        after_update: called after every update, a skipped one included.

    Returns:
        `train_loss`, the mean over all batches of all processes where it is finite, and `train_lr` of the last update.

    Raises:
        RuntimeError: `MAX_NONFINITE` updates in a row were skipped; the weights are those before the first of them.
    """
    seed_everything(args.seed, epoch)  # a resumed run draws the same numbers as an uninterrupted one
    model.train()
    loader.sampler.set_epoch(epoch)
    steps = len(loader) // args.accum_iter * args.accum_iter
    parameters = [p for p in model.parameters() if p.requires_grad]
    progress = log.progress(f"epoch {epoch}", steps)
    epoch_sums = torch.zeros(2, dtype=torch.float64)  # sum of the finite losses, and how many they are
    window = epoch_sums.to(device, copy=True)  # the same since the last log line, on the device
    # Skipped updates: since the last log line, in a row up to now, and the longest row since the last log line.
    skipped, in_a_row, longest = torch.zeros(3, device=device).unbind()
    unlogged = 0
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
        loss = loss.detach()
        window += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite()])
        unlogged += 1
        if updates:
            if args.clip_grad:
                norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad)
            else:
                norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            optimizer.found_inf = (~norm.isfinite()).float()  # a fused optimizer then leaves weights and moments alone
            optimizer.step()
            optimizer.zero_grad()
            after_update()
            skipped += optimizer.found_inf
            in_a_row.add_(1).mul_(optimizer.found_inf)
            torch.maximum(longest, in_a_row, out=longest)

        images = len(batch[0]) * world_size()
        if not updates or (unlogged < LOG_EVERY and step + 1 < steps):
            progress.update(images, quiet=True)
            continue
        window = reduce_sum(window)
        total, count, grad_norm, now_skipped, row = torch.cat(
            [window, torch.stack([norm, skipped, longest]).double()]
        ).tolist()  # the one place where the host waits for the device
        epoch_sums += torch.tensor([total, count], dtype=torch.float64)
        mean = total / count if count else math.nan
        progress.update(images, loss=mean, lr=lr)
        # MAE's abscissa: epochs times 1000, so that runs of any batch size compare
        log.scalars(int(1000 * position), train_loss=mean, lr=lr, grad_norm=grad_norm)
        if row >= MAX_NONFINITE:
            raise RuntimeError(
                f"the gradient was not finite in {row:.0f} updates in a row, up to epoch {epoch}, batch "
                f"{step}; none of them was made. Go on from {Path(args.output_dir) / 'checkpoint-last.pth'} with "
                "--resume, or lower --blr"
            )
        if now_skipped:
            log.say(f"epoch {epoch}, batch {step}: updates skipped, their gradient was not finite: {now_skipped:.0f}")
        window.zero_()
        skipped.zero_()
        longest.zero_()
        unlogged = 0
    progress.close()
    total, count = epoch_sums.tolist()
    return {"train_loss": total / count if count else math.nan, "train_lr": lr}
