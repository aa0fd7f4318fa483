"""Accuracy of a classifier over every image once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.device_loader import DeviceLoader
from util.dist import gather, reduce_sum, world_size
from util.errors import Interrupted, RunError
from util.fsdp import whole
from util.interrupt import StopRequest
from util.metrics import LOG_EVERY, ScreenLog, SilentLog
from util.train_loop import autocast


def score_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compare with one label an image; see `evaluate`. The loss is the cross-entropy."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
    return hits, F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    device: torch.device,
    log: ScreenLog | SilentLog,
    title: str = "eval",
    stop: StopRequest | None = None,
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = score_labels,
) -> dict[str, float]:
    """Accuracy over every image once.

    Args:
        model: the bare classifier, or a sharded one; processes may have unequal shares.
        loader: its sampler has `distributed`, which says whether each process has a share or all of the images.
        device: of the model.
        log: of this rank.
        title: of the progress.
        stop: what may ask all processes to leave; nothing of an evaluation is kept then.
        score: logits (B, num_classes) float32 and labels (B,) -> which of the five best are right (B, up to 5) bool,
            and the sum of the losses; the label -1 has neither.

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
    common = min(gather(len(loader)))  # batches that every process has: a last one may be of some only
    with whole(model):
        for step, (imgs, labels) in enumerate(loader, start=1):
            with autocast(device):
                logits = model(imgs)
            hits, loss = score(logits.float(), labels)
            seen += len(labels)
            sums += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), loss, (labels == -1).sum()])
            progress.update(len(labels) * processes, quiet=step % LOG_EVERY != 0 and step != len(loader))
            if stop is not None and step <= common and stop.agreed():
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


def in_words(result: dict[str, float]) -> str:
    """What `evaluate` found, as a line."""
    broken = f", {result['broken']} of them broken and counted as wrong" if "broken" in result else ""
    return (
        f"top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %, loss {result['loss']:.4f} "
        f"on {result['images']} images{broken}"
    )
