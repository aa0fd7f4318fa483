"""Turn a detector into a program that exporters can write: for one image of a fixed size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops
from torchvision.ops import nms, poolers, roi_align

from Detection.models_detect import Detector
from util.errors import RunError

OUTPUTS = "boxes", "scores", "labels", "masks"
NEAR = 1e-3  # of the side of the image, between two boxes that are the same, and between their scores


class ExportedDetector(nn.Module):
    """A detector of one image that fills its input, with a threshold as its second input.

    Args:
        model: in evaluation mode.

    Attributes:
        outputs: their names.
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model, self.outputs = model, [*OUTPUTS[: 3 + model.has_masks]]

    def forward(self, imgs: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        """Return the detections in images (1, in_chans, H, W) that have at least a `score` () float32.

        They are `boxes` (n, 4), `scores` (n,), `labels` (n,) from 1 and, with masks, `masks` (n, 1, 28, 28); see
        `Detector.forward`.
        """
        self.model.roi_heads.score_thresh = score
        (found,) = self.model(imgs)
        return tuple(found[name] for name in self.outputs)

    @torch.no_grad()
    def examples(self, imgs: Tensor) -> list[tuple[Tensor, ...]]:
        """Return inputs for each of some images (B, in_chans, H, W), with a threshold that some detections pass.

        It lies where rounding moves no score across it: in the widest gap between the scores of the middle half.
        """
        self.model.roi_heads.score_thresh = 0.0
        scores = torch.cat([found["scores"] for found in self.model(imgs)]).sort().values
        middle = scores[len(scores) // 4 : len(scores) * 3 // 4 + 2]
        widest = middle.diff().argmax() if len(middle) > 1 else 0
        score = middle[widest : widest + 2].mean() if len(middle) else torch.zeros(())
        return [(imgs[i : i + 1], score) for i in range(len(imgs))]

    def paired(self, found: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of the detections that both have.

        Rounding decides which of two boxes that overlap just so much is kept, so that a few can differ.

        Raises:
            RunError: more than a tenth of all have no partner with the same label, and about the same score and box.
        """
        near = (found[0][:, None] - want[0]).abs().amax(dim=2) < NEAR * max(self.model.backbone.image_size)
        near &= ((found[1][:, None] - want[1]).abs() < NEAR) & (found[2][:, None] == want[2])  # (found, want)
        partners = near.any(dim=0).sum() + near.any(dim=1).sum()
        if partners < 0.9 * sum(near.shape):
            raise RunError(
                f"the exported model detects something else: {near.any(dim=0).sum()} of {len(want[0])} agree"
            )
        rows, columns = near.nonzero().unbind(dim=1)
        return [output[rows] for output in found], [output[columns] for output in want]

    def program(self, imgs: Tensor) -> torch.export.ExportedProgram:
        """Export the computation for images of the size of `imgs` (1, in_chans, H, W)."""
        with traceable(max(imgs.shape[-2:])), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torchvision's own code
            warnings.simplefilter("ignore", UserWarning)  # `score` becomes an attribute of torchvision's module
            return torch.export.export(self, (imgs, torch.tensor(0.05)), strict=False)


@contextmanager
def traceable(side: int) -> Iterator[None]:
    """Compute inside the block what torchvision computes, without branches on the number of boxes.

    torch.export cannot follow torchvision's `batched_nms`, which chooses an algorithm by the number of boxes, nor its
    RoIAlign over maps, which writes to the rows of each map in place. Here boxes of different groups are moved apart,
    and every box is pooled from every map.

    Args:
        side: of the image, in pixels; no box is longer.
    """

    def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
        return nms(boxes + groups.to(boxes)[:, None] * (side + 1), scores, threshold)

    def pooled(
        maps: Sequence[Tensor],
        boxes: list[Tensor],
        output_size: Any,
        sampling_ratio: int,
        scales: Sequence[float],
        mapper: Any,
    ) -> Tensor:
        regions, levels = poolers._convert_to_roi_format(boxes), mapper(boxes)
        results = [
            roi_align(own, regions, output_size, scale, sampling_ratio) for own, scale in zip(maps, scales, strict=True)
        ]
        result = results[0]
        for level in range(1, len(results)):
            result = torch.where((levels == level)[:, None, None, None], results[level], result)
        return result

    with patch.object(box_ops, "batched_nms", batched_nms), patch.object(poolers, "_multiscale_roi_align", pooled):
        yield
