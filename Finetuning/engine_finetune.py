"""One epoch of finetuning, and evaluation."""

from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from util.device_loader import DeviceLoader
from util.dist import reduce_sum, world_size
from util.errors import Interrupted, RunError
from util.interrupt import StopRequest
from util.metrics import LOG_EVERY, RunLog, ScreenLog, SilentLog
from util.run import Run
from util.train_loop import autocast, train_epoch


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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    device: torch.device,
    log: ScreenLog | SilentLog,
    title: str = "eval",
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """Accuracy over every image once.

    Args:
        model: the bare classifier; processes may have unequal shares.
        loader: its sampler has `distributed`, which says whether each process has a share or all of the images.
        device: of the model.
        log: of this rank.
        title: of the progress.
        stop: what may ask to leave; nothing of an evaluation is kept then.

    Returns:
        `acc1`, `acc5` in percent, `loss` (cross-entropy, mean) and `images`, their exact number. Broken images, which
        have the label -1, count as wrong and have no loss; `broken` is their number where there are any.

    Raises:
        RunError: an image is broken and the loader does not let it count as wrong, or all are.
        Interrupted: `stop` was asked.
    """
    model.eval()
    progress = log.progress(title, len(loader))
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # correct, correct among five, loss, broken
    seen = 0  # counted by the host, which does not wait for the device
    processes = world_size() if loader.sampler.distributed else 1
    for step, (imgs, labels) in enumerate(loader, start=1):
        with autocast(device):
            logits = model(imgs)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
        seen += len(labels)
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, (labels == -1).sum()])
        progress.update(len(labels) * processes, quiet=step % LOG_EVERY != 0 and step != len(loader))
        if stop is not None and stop.asked:
            raise Interrupted("stopped during an evaluation, which --resume auto begins again")
    progress.close()
    sums = torch.cat([sums, sums.new_tensor([seen])])
    if loader.sampler.distributed:
        reduce_sum(sums)
    correct, correct5, loss, broken, images = sums.tolist()
    if broken == images:
        raise RunError(f"all {int(images)} images are broken")
    result = {
        "acc1": 100 * correct / images,
        "acc5": 100 * correct5 / images,
        "loss": loss / (images - broken),
        "images": int(images),
    }
    return result | ({"broken": int(broken)} if broken else {})
