"""Count confusions of pixels exactly, over batches and processes, and compute intersections over unions from them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from util.distributed.processes import reduce_sum


class Confusions:
    """Pixels of each class by the class that was predicted; exact, since the counts are int64.

    Args:
        classes: their number.
        device: of the counts.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        # the last column is that of pixels without an answer
        self.counts = torch.zeros(classes, classes + 1, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count pixels on the device, without waiting for it.

        Args:
            predicted: classes, of any shape and integer type; pixels with a negative one are wrong, without an answer.
            truth: of the same shape; pixels with a negative class are not counted.
        """
        classes, cells = len(self.counts), self.counts.numel()
        own, answer = truth.long().flatten(), predicted.long().flatten()
        places = own * (classes + 1) + torch.where(answer >= 0, answer, classes)
        places = torch.where(own >= 0, places, cells)  # the last count is that of ignored pixels
        self.counts += places.bincount(minlength=cells + 1)[:-1].view_as(self.counts)  # (cells,) -> (n, n + 1)

    def summary(self, names: Sequence[str]) -> dict:
        """Sum over all processes, each of which calls it once, and return numbers in percent.

        Args:
            names: of the classes.

        Returns:
            `miou`, the mean IoU of the classes that occur in truth or prediction; `pixel_acc`; `mean_acc`, the mean
            recall of the classes that occur in the truth; `pixels`, the number with a class; and `classes`, a row for
            each: its `name`, `iou`, `acc` (its recall), and its numbers of `pixels` and of `predicted` pixels. A number
            that a class or all pixels do not have is None.
        """
        counts = reduce_sum(self.counts.clone()).cpu()
        right, pixels, predicted = counts.diagonal(), counts.sum(dim=1), counts[:, :-1].sum(dim=0)
        columns = (values.tolist() for values in (right, pixels, predicted, pixels + predicted - right))
        rows = [
            {"name": name, "iou": _percent(r, u), "acc": _percent(r, n), "pixels": n, "predicted": p}
            for name, r, n, p, u in zip(names, *columns, strict=True)
        ]
        total = int(pixels.sum())
        mean = {key: _mean([row[key] for row in rows]) for key in ("iou", "acc")}
        overall = {"miou": mean["iou"], "pixel_acc": _percent(int(right.sum()), total), "mean_acc": mean["acc"]}
        return {**overall, "pixels": total, "classes": rows}


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
