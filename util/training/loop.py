"""One epoch of training, the same for pretraining and finetuning."""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.data.device_loader import DeviceLoader
from util.distributed.parallel import full_tensor, no_sync
from util.distributed.processes import reduce_sum, world_size
from util.lr_sched import lr_at, set_lr
from util.seeding import seed_everything
from util.tracking.run_log import Log
from util.training.nonfinite import dump_nonfinite
from util.training.precision import autocast
from util.training.run_state import Run

LOGGER = logging.getLogger("arm")


def train_epoch(
    model: nn.Module,
    loader: DeviceLoader,
    compute_loss: Callable[..., Tensor | dict[str, Tensor]],
    run: Run,
    device: torch.device,
    log: Log,
    after_update: Callable[[Tensor], None] = lambda skip: None,
) -> dict[str, float]:
    """Train for the rest of the epoch, `accum_iter` batches per update; batches that fill no update are left out.

    The host queues work for the device and reads results only at log points, every `log.every` batches, and at saves;
    and the loss of the first update, so that a line soon tells that the run works.
    An update with a non-finite gradient is skipped on the device: the norm is that of the all-reduced gradients, so all
    processes skip it together. After `max_nonfinite` skipped updates in a row, all further updates are skipped until
    the next log point ends the run. With float16, a skipped update halves the scale of the loss, and counts only when
    the scale cannot fall further.

    Args:
        model: bare or distributed.
        loader: batches of tensors on `device`; its sampler has `set_epoch`.
        compute_loss: of the tensors of one batch; called under autocast. Parts of a loss, by name, are added, and each
            has a curve.
        run: its optimizer is a fused one, which can skip updates, and its groups may have an `lr_scale`; of its args
            the loop reads `seed`, `lr`, `min_lr`, `warmup_epochs`, `epochs`, `batch_size`, `accum_iter`, `clip_grad`,
            `max_nonfinite`, `save_every_steps` and `output_dir`.
        device: of the model.
        log: of this rank.
        after_update: called after every update with 1 if it was skipped, else 0, a float32 scalar on the device.

    Returns:
        `train_loss`, the mean of the finite losses over all batches of all processes; `train_lr` of the last update;
        `images_per_second`, the throughput of all processes in this call.

    Raises:
        RunError: `max_nonfinite` updates in a row were skipped; the weights are those before the first of them.
        Interrupted: the run was asked to stop; a checkpoint is written.
    """
    args, epoch, accum_iter = run.args, run.epoch, run.args.accum_iter
    optimizer: Any = run.optimizer  # torch's own GradScaler sets `found_inf` and `grad_scale`, too
    loss_scale = run.loss_scale
    loss_scale.start(device)
    model.train()
    images = args.batch_size * world_size()  # of a batch, on all processes
    done = run.samples // images  # batches, before this process started
    loader.sampler.set_epoch(epoch, done * args.batch_size)
    steps = len(loader) // accum_iter * accum_iter
    parameters = [p for p in model.parameters() if p.requires_grad]
    progress = log.progress(f"epoch {epoch}", steps, done)
    # sum and number of finite losses since the log point, and the sums of their parts, if they have some
    window = torch.zeros((), dtype=torch.float64, device=device)
    skipped, in_a_row = torch.tensor([0.0, run.skipped_in_a_row], device=device).unbind()
    unlogged, start = 0, time.monotonic()

    def abscissa_of(step: int) -> int:
        """Return the position in curves of the update that ends after `step` batches: MAE's, epochs times 1000.

        The position at which an epoch begins belongs to the evaluation before it, so that a run that resumes there can
        remove all later points.
        """
        position = int(1000 * (epoch + max(0, step - accum_iter) / len(loader)))
        return max(position, 1000 * epoch + 1) if epoch else position

    def lr_of(step: int) -> float:
        position = epoch + step / len(loader)
        return lr_at(position, args.lr, args.min_lr, args.warmup_epochs, args.epochs)

    log.start_at(epoch, abscissa_of(done) + 1 if done else abscissa_of(0))
    for step, batch in enumerate(islice(loader, max(0, steps - done)), done):
        seed_everything(args.seed, epoch, step)  # a run that resumes here draws the same numbers
        if step % accum_iter == 0:
            lr = lr_of(step)
            set_lr(optimizer, lr)
        updates = (step + 1) % accum_iter == 0

        with no_sync(model, not updates):  # gradients are all-reduced once per update
            with autocast(device):
                losses = compute_loss(*batch)
            parts = losses if isinstance(losses, dict) else {}
            loss = losses if isinstance(losses, Tensor) else torch.stack([*parts.values()]).sum()
            finite = loss.detach().isfinite()
            # a non-finite loss can have finite gradients; NaN forces the skip
            loss_scale.scaled(loss / accum_iter * torch.where(finite, 1.0, math.nan)).backward()
        values, names = torch.stack([loss, finite, *parts.values()]).detach(), [*parts]
        del loss, losses, parts  # their graph
        if run.graphs is not None:
            run.graphs.capture()
        window = window + torch.where(finite, values, 0.0).double()
        unlogged += 1
        if not updates:
            progress.update(images, quiet=True)
            continue

        norm = full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        norm = loss_scale.unscaled(norm)
        if args.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, norm)
        overflow = (~norm.isfinite()).float()
        skip = torch.maximum(overflow, (in_a_row >= args.max_nonfinite).float())
        optimizer.found_inf = skip  # where it is 1, a fused optimizer changes neither weights nor moments
        if loss_scale.active:
            optimizer.grad_scale = loss_scale.scale  # it divides the gradients
        optimizer.step()
        optimizer.zero_grad()
        after_update(skip)
        skipped += skip
        in_a_row.add_(loss_scale.counts()).mul_(skip)
        loss_scale.update(overflow)

        update = (epoch * steps + step + 1) // accum_iter  # of the run, from 1
        stops = run.stop.agreed()
        saves = bool(args.save_every_steps) and update % args.save_every_steps == 0
        if unlogged < log.every and step + 1 < steps and not stops and not saves:
            if step + 1 == done + accum_iter:  # not a log point: these stay where they are
                total, count, *_ = reduce_sum(window.clone()).tolist()
                progress.update(images, loss=total / count if count else math.nan, lr=lr)
            else:
                progress.update(images, quiet=True)
            continue
        window = reduce_sum(window)
        *totals, grad_norm, now_skipped, row, scale = torch.cat(
            [window, torch.stack([norm, skipped, in_a_row, loss_scale.scale]).double()]
        ).tolist()  # the one place where the host waits for the device
        total, count, *shares = totals
        loss_before = run.loss
        run.loss = run.loss + args.batch_size * torch.tensor([total, count], dtype=torch.float64)
        run.samples, run.skipped_in_a_row = (step + 1) * images, int(row)
        mean = total / count if count else math.nan
        progress.update(images, loss=mean, lr=lr)
        more = {"loss_scale": scale} if loss_scale.active else {}
        more |= {f"train_{name}": share / max(count, 1) for name, share in zip(names, shares, strict=True)}
        log.scalars(abscissa_of(step + 1), train_loss=mean, lr=lr, grad_norm=grad_norm, **more)
        if row >= args.max_nonfinite:
            first, run.loss = max(0, step + 1 - int(row) * accum_iter), loss_before
            dump_nonfinite(run, loader, first, Path(args.output_dir))
        if now_skipped:
            now = f"; the loss is scaled by {scale:g} now" if loss_scale.active else ""
            log.say(f"epoch {epoch}, batch {step}: skipped updates with a non-finite gradient: {now_skipped:.0f}{now}")
        if count:
            if spikes(run.recent, mean):
                earlier = statistics.mean(run.recent)
                log.say(f"epoch {epoch}, batch {step}: the loss rose to {mean:.4g}, from {earlier:.4g}")
            run.recent.append(mean)
        window.zero_()
        skipped.zero_()
        unlogged = 0
        if stops:
            run.leave()
        if saves:
            run.save()
    progress.close()
    total, count = run.loss.tolist()
    return {
        "train_loss": total / count if count else math.nan,
        "train_lr": lr_of(steps - accum_iter),
        "images_per_second": round(images * (steps - done) / (time.monotonic() - start), 1),
    }


def spikes(recent: deque[float], loss: float) -> bool:
    """Return whether a loss is above the mean of those before it by 5 standard deviations and by 5 %."""
    if len(recent) < (recent.maxlen or 0):
        return False
    mean, deviation = statistics.mean(recent), statistics.stdev(recent)
    return loss > mean + max(5 * deviation, 0.05 * abs(mean))
