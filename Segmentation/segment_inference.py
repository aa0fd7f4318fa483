"""Apply a segmenter to images of any size: whole or by a sliding window, at one scale or at several."""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = "slide", "whole"
RATIOS = 0.5, 0.75, 1.0, 1.25, 1.5, 1.75  # of --multi_scale, as MAE, BEiT and MMSegmentation evaluate
ELEMENTS = 2**26  # largest number of logits that are enlarged at a time


class Inference(NamedTuple):
    """Predict the class of every pixel.

    Args:
        size: height and width of the input in training.
        mode: "slide" averages the logits of windows of `size` at steps of two thirds of it; "whole" passes the image at
            once.
        ratios: scales of the image; the probabilities of several are averaged.
        flip: average with the mirrored image, too.
        batch: number of windows that pass the model at a time.
    """

    size: tuple[int, int]
    mode: str = "slide"
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch: int = 8

    def __str__(self) -> str:
        """Say in words how images pass the model."""
        windows = f"windows of {self.size[0]} x {self.size[1]}" if self.mode == "slide" else "whole images"
        scales = f", scales {', '.join(f'{ratio:g}' for ratio in self.ratios)}" * (self.ratios != (1.0,))
        return windows + scales + ", mirrored too" * self.flip

    def __call__(self, model: Callable[[Tensor], Tensor], imgs: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Predict.

        Args:
            model: images (B, C, h, w) -> logits (B, K, h, w).
            imgs: (B, C, h, w), of the scale of images in training.
            size: height and width of the answer; logits are interpolated to it.

        Returns:
            Classes (B, H, W) int64, and whether all logits of an image are finite, (B,) bool.
        """
        base = imgs.shape[-2], imgs.shape[-1]
        views = list(product(self.ratios, (False, True) if self.flip else (False,)))
        total: Tensor | None = None
        for ratio, mirrored in views:
            view = resize_images(imgs, (max(1, round(ratio * base[0])), max(1, round(ratio * base[1]))))
            logits = self.logits(model, view.flip(-1) if mirrored else view)  # (B, K, h, w)
            logits = logits.flip(-1) if mirrored else logits
            if len(views) > 1:  # in place of the logits, which several scales have on different levels
                logits = F.interpolate(logits, base, mode="bilinear", align_corners=False).softmax(dim=1)
            total = logits if total is None else total.add_(logits)
        assert total is not None
        return largest(total, size), total.isfinite().flatten(1).all(dim=1)

    def logits(self, model: Callable[[Tensor], Tensor], imgs: Tensor) -> Tensor:
        """Return logits (B, K, h, w) float32 of images (B, C, h, w)."""
        if self.mode == "whole":
            return model(imgs).float()
        height, width = (min(pair) for pair in zip(self.size, imgs.shape[-2:], strict=True))  # of a window
        corners = list(product(starts(imgs.shape[-2], height), starts(imgs.shape[-1], width)))
        count, total = imgs.new_zeros(imgs.shape[-2:]), None
        step = max(1, self.batch // len(imgs))
        for begin in range(0, len(corners), step):
            part = corners[begin : begin + step]
            windows = torch.cat([imgs[..., y : y + height, x : x + width] for y, x in part])  # (windows * B, C, h, w)
            found = model(windows).float()
            if total is None:
                total = found.new_zeros(len(imgs), found.shape[1], *imgs.shape[-2:])
            for (y, x), logits in zip(part, found.split(len(imgs)), strict=True):
                total[..., y : y + height, x : x + width] += logits
                count[y : y + height, x : x + width] += 1
        assert total is not None
        return total.div_(count)


def starts(length: int, window: int) -> list[int]:
    """Return where windows start that cover a length at steps of two thirds of a window; the last ends with it."""
    step = max(1, window * 2 // 3)
    return [*range(0, length - window, step), length - window]


def resize_images(imgs: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (B, C, H, W) bilinearly, with antialiasing where they become smaller."""
    if tuple(imgs.shape[-2:]) == size:
        return imgs
    return F.interpolate(imgs, size, mode="bilinear", align_corners=False, antialias=True)


def largest(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate scores (B, K, h, w) to a size, and return the class of the largest: (B, H, W) int64.

    Some classes are interpolated at a time, so that memory does not grow with the size times the number of classes.
    """
    best = label = None
    step = max(1, ELEMENTS // (len(scores) * size[0] * size[1]))
    for first in range(0, scores.shape[1], step):
        part = scores[:, first : first + step]
        part = F.interpolate(part, size, mode="bilinear", align_corners=False)
        values, places = part.max(dim=1)
        if best is None or label is None:
            best, label = values, places
        else:
            higher = values > best
            best, label = torch.where(higher, values, best), torch.where(higher, places + first, label)
    assert label is not None
    return label
