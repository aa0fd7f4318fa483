"""Evaluate a classifier on every image once."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.data.device_loader import DeviceLoader
from util.distributed.parallel import unsharded
from util.distributed.processes import gather, reduce_sum, world_size
from util.distributed.signals import StopRequest
from util.errors import Interrupted, RunError
from util.tracking.run_log import Log
from util.training.precision import autocast

LOGGER = logging.getLogger(__name__)
SHOWN = 5  # images that are named


def score_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compare logits with one label per image, and sum the cross-entropies; see `evaluate`."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
    return hits, F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)


class Answers:
    """The answer to every image, for numbers that sums over batches do not give; a `score` of `evaluate`.

    It scores as `score_labels` does. Values stay on the device until `gathered`. Memory is 40 bytes an image, whatever
    the number of classes.
    """

    COLUMNS = ("predicted", "correct5", "confidence", "nll", "brier")

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hits, loss = score_labels(logits, labels)
        best = logits.topk(min(5, logits.shape[1])).indices[:, :1]  # the first of these, of equal logits too
        own = labels.clamp(min=0)[:, None]
        log_p = logits.double().log_softmax(dim=1)
        p = log_p.exp()
        nll = -log_p.gather(1, own)[:, 0]
        brier = (p * p).sum(dim=1) - 2 * p.gather(1, own)[:, 0] + 1
        columns = best[:, 0].double(), hits.any(dim=1).double(), p.gather(1, best)[:, 0], nll, brier
        rows = torch.stack(columns, dim=1)  # (B, 5)
        self.batches.append(torch.where(labels[:, None] >= 0, rows, -1.0))
        return hits, loss

    def gathered(self, distributed: bool) -> np.ndarray:
        """Return the answers in the order of the images, on every process the same.

        Args:
            distributed: processes had shares of the images, as `ShareSampler` divides them.

        Returns:
            (images, 5) float64: predicted class, whether the label is among the five best, probability of the predicted
            class, minus the log of the label's probability, and Brier score. -1 for an image that is broken or has
            logits that are not finite.
        """
        own = torch.cat(self.batches).cpu().numpy()
        shares = gather(own) if distributed else [own]
        answers = np.empty((sum(map(len, shares)), len(self.COLUMNS)))
        for number, share in enumerate(shares):
            answers[number :: len(shares)] = share
        return answers


def batches_of(
    model: nn.Module, loader: DeviceLoader, log: Log, title: str = "eval", stop: StopRequest | None = None
) -> Iterator[list[Any]]:
    """Yield every batch of a loader once, with the model in evaluation mode and gathered, and show the progress.

    Args:
        model: the bare model, or a sharded one; processes may have unequal shares.
        loader: its sampler has `distributed`: whether each process reads a share of the images, or all of them.
        log: of this rank.
        title: of the progress display.
        stop: may end the evaluation on all processes.

    Raises:
        Interrupted: `stop` received a signal.
    """
    model.eval()
    progress = log.progress(title, len(loader))
    processes = world_size() if loader.sampler.distributed else 1
    common = min(gather(len(loader)))  # number of batches that every process has
    with unsharded(model):
        for step, batch in enumerate(loader, start=1):
            yield batch
            progress.update(len(batch[0]) * processes)
            if stop is not None and step <= common and stop.agreed():
                raise Interrupted("stopped during an evaluation, which --resume auto repeats from its start")
    progress.close()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    device: torch.device,
    log: Log,
    title: str = "eval",
    stop: StopRequest | None = None,
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = score_labels,
) -> dict[str, float]:
    """Return accuracy and loss over every image once.

    Args:
        model: the bare classifier, or a sharded one.
        loader: see `batches_of`, as for `log`, `title` and `stop`.
        device: of the model.
        log: of this rank.
        title: of the progress display.
        stop: may end the evaluation.
        score: logits (B, num_classes) float32 and labels (B,) -> which of the five best are right (B, up to 5) bool,
            and the sum of the losses; the label -1 has neither.

    Returns:
        `acc1` and `acc5` in percent, `loss` (mean cross-entropy) and `images`, their exact number. Broken images (label
        -1) and images with non-finite logits (logged by name) count as wrong and have no loss; `broken` and `nonfinite`
        are their numbers, if not 0.

    Raises:
        RunError: an image is broken and the loader does not count it as wrong; or no image has a loss.
        Interrupted: `stop` received a signal.
    """
    # correct, correct among five, loss, broken, not finite
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    # for each image in order, whether its logits are not finite
    bad = [torch.zeros(0, dtype=torch.bool, device=device)]
    seen = 0  # counted on the host, without waiting for the device
    for imgs, labels in batches_of(model, loader, log, title, stop):
        with autocast(device):
            logits = model(imgs)
        broken = labels == -1
        bad.append(~logits.isfinite().all(dim=1) & ~broken)
        hits, loss = score(logits.float(), labels.masked_fill(bad[-1], -1))
        seen += len(labels)
        sums += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), loss, broken.sum(), bad[-1].sum()])
    sums = torch.cat([sums, sums.new_tensor([seen])])
    if loader.sampler.distributed:
        reduce_sum(sums)
    correct, correct5, loss, broken, nonfinite, images = sums.tolist()
    if broken == images:
        raise RunError(f"all {int(images)} images are broken")
    if nonfinite + broken == images:
        raise RunError(f"the logits of all {int(nonfinite)} images are not finite: these weights cannot be evaluated")
    if nonfinite:
        places = torch.cat(bad).nonzero().flatten().tolist()
        names = loader.names(places[:SHOWN])
        if loader.sampler.distributed:
            names = [name for share in gather(names) for name in share]
        for name in names[:SHOWN]:
            LOGGER.warning("logits that are not finite: %s", name)
    result = {
        "acc1": 100 * correct / images,
        "acc5": 100 * correct5 / images,
        "loss": loss / (images - broken - nonfinite),
        "images": int(images),
    }
    counts = {"broken": int(broken), "nonfinite": int(nonfinite)}
    return result | {name: count for name, count in counts.items() if count}


def describe_result(result: dict[str, float]) -> str:
    """Return a result of `evaluate` as one line."""
    wrong = f", {result['broken']} of them broken and counted as wrong" if "broken" in result else ""
    if "nonfinite" in result:
        wrong += f", {result['nonfinite']} of them with logits that are not finite, counted as wrong"
    return (
        f"top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %, loss {result['loss']:.4f} "
        f"on {result['images']} images{wrong}"
    )
