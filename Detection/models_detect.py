"""The detector: Mask R-CNN, or Faster R-CNN without masks, on the feature pyramid of the encoder, as ViTDet has it.

Region proposals and heads are torchvision's (He et al. 2017, arXiv 1703.06870; Li et al. 2022, arXiv 2203.16527).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.poolers import initLevelMapper

from models_arm import create_pyramid
from models_classifier import ARMPyramid, WithEncoder

ANCHORS = (32, 64, 128, 256, 512)  # pixels, one size for each map
RATIOS = (0.5, 1.0, 2.0)  # height / width
BOX_CONVS, MASK_CONVS = 4, 4  # convolutions of the heads
LINEAR, MASKED = 1024, 256  # channels that torchvision's predictors of boxes and of masks take
PROPOSALS = 1000  # of an image, at most
SAMPLED_ANCHORS, SAMPLED_REGIONS = 256, 512  # of an image, in training
PASTED = 2**26  # pixels of masks that are pasted at a time: 256 MB in float32

Target = dict[str, Any]


class FixedAnchors(AnchorGenerator):
    """Anchors of maps whose strides are known; torchvision infers strides, wrong ones of an image that is padded.

    Args:
        strides: pixels, of each map.
    """

    def __init__(self, strides: list[int]) -> None:
        super().__init__(tuple((size,) for size in ANCHORS), (RATIOS,) * len(ANCHORS))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors (n, 4) float32 of each image, from the maps (B, channels, h, w)."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids: Any = [feature.shape[-2:] for feature in feature_maps]
        strides: Any = [[stride, stride] for stride in self.strides]
        return [torch.cat(self.grid_anchors(grids, strides))] * len(image_list.image_sizes)


class SeededSampler:
    """Choose anchors or proposals of one image for the loss, by its own seed: the same in every process and batch.

    It stands in for torchvision's `BalancedPositiveNegativeSampler`, which draws from the global generator.

    Args:
        count: to choose.
        positive_fraction: largest share of positive ones.

    Attributes:
        seed: of the image, set before each call.
    """

    def __init__(self, count: int, positive_fraction: float) -> None:
        self.count, self.positive = count, int(count * positive_fraction)
        self.seed = 0

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return which positive and which negative ones are chosen, (n,) bool each.

        `matched` has the labels (n,) of one image: above 0 positive, 0 negative, below 0 ignored.
        """
        (labels,) = matched
        generator = torch.Generator(labels.device).manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator, device=labels.device)
        positive = order[labels[order] > 0][: self.positive]
        negative = order[labels[order] == 0][: self.count - len(positive)]
        chosen = torch.zeros(2, len(labels), dtype=torch.bool, device=labels.device)
        chosen[0, positive] = chosen[1, negative] = True
        return [chosen[0]], [chosen[1]]


class Detector(WithEncoder):
    """Mask R-CNN or Faster R-CNN: region proposals, boxes and masks from the feature maps of an ARM encoder.

    As in ViTDet, the proposals have two convolutions, the box head four and a linear layer, the mask head four, with
    LayerNorm over channels; all have the channels of the maps. There is no batch norm: an image does not depend on the
    others of its batch. All other settings are torchvision's.

    Args:
        backbone: the encoder with its pyramid.
        num_classes: without the background.
        masks: predict masks, too.

    Attributes:
        rpn: torchvision's RegionProposalNetwork.
        roi_heads: torchvision's RoIHeads.
    """

    OUTPUTS = "roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits."  # parameters of the classes

    def __init__(self, backbone: ARMPyramid, num_classes: int, masks: bool = True) -> None:
        super().__init__()
        self.backbone, self.num_classes, self.has_masks = backbone, num_classes, masks
        channels = backbone.out_chans
        strides = [backbone.patch_size * 2**level // 4 for level in range(5)]
        norm: dict[str, Any] = {"norm_layer": LayerNorm2d}
        convolutions = [channels] * BOX_CONVS
        heads: dict[str, Any] = {"box_head": FastRCNNConvFCHead((channels, 7, 7), convolutions, [LINEAR], **norm)}
        if masks:
            heads["mask_head"] = MaskRCNNHeads(channels, [*[channels] * (MASK_CONVS - 1), MASKED], 1, **norm)
        parts = (MaskRCNN if masks else FasterRCNN)(
            SimpleNamespace(out_channels=channels),
            num_classes + 1,
            rpn_anchor_generator=FixedAnchors(strides),
            rpn_head=RPNHead(channels, len(RATIOS), conv_depth=2),
            rpn_post_nms_top_n_train=PROPOSALS,
            rpn_post_nms_top_n_test=PROPOSALS,
            **heads,
        )
        self.rpn, self.roi_heads = parts.rpn, parts.roi_heads
        self.rpn.fg_bg_sampler = SeededSampler(SAMPLED_ANCHORS, 0.5)
        self.roi_heads.fg_bg_sampler = SeededSampler(SAMPLED_REGIONS, 0.25)
        for part in (self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            if part is not None:
                part.register_forward_hook(_in_float32)
        pools = [self.roi_heads.box_roi_pool, *[self.roi_heads.mask_roi_pool] * masks]
        levels = [round(math.log2(stride)) for stride in strides]
        for pool in pools:  # torchvision would infer the scales once, from the first images
            pool.scales = [1 / stride for stride in strides[:4]]
            pool.map_levels = initLevelMapper(levels[0], levels[3])

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps by torchvision's names, float32: (B, C, H, W) -> (B, out_chans, h, w).

        Under autocast too: RoIAlign computes in float32, and convolutions convert them again.
        """
        maps = [feature.float() for feature in self.backbone(images)]
        coarsest = F.max_pool2d(maps[-1], kernel_size=1, stride=2)
        return {**{str(level): feature for level, feature in enumerate(maps)}, "pool": coarsest}

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> dict[str, Tensor] | list[Target]:
        """Return losses in training, and detections in evaluation.

        Proposals and heads run image by image, so that the losses of an image do not depend on its batch; their
        convolutions over a thousand regions fill a GPU.

        Args:
            images: (B, in_chans, H, W), normalised; the image of each is at the top left.
            targets: of each image `size` (h, w of the image in the input) and, in evaluation, `original` (h, w of its
                file); in training `seed` (int), `boxes` (m, 4) float32 x1 y1 x2 y2 in pixels of the input, `labels`
                (m,) int64 from 1, and `masks` (m, H, W) where the model has masks. m may be 0. None in evaluation means
                the whole input.

        Returns:
            Scalars `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`, `loss_box_reg` and `loss_mask`, each the
            mean over the images of torchvision's loss; or for each image up to 100 detections, the best first: `boxes`
            (n, 4) float32 in pixels of the original, `scores` (n,) float32, `labels` (n,) int64 from 1, with masks
            `masks` (n, 1, 28, 28) float32, probabilities inside the boxes: see `paste`; and `finite` () bool, whether
            the feature maps are, without which nothing is detected.
        """
        if targets is None:
            size = images.shape[-2], images.shape[-1]
            targets = [{"size": size, "original": size}] * len(images)
        features = self.features(images)
        per_image = [
            self._of_image(images[i : i + 1], {name: maps[i : i + 1] for name, maps in features.items()}, target)
            for i, target in enumerate(targets)
        ]
        if self.training:
            return {name: torch.stack([losses[name] for losses in per_image]).mean() for name in per_image[0]}
        return per_image

    def _of_image(self, image: Tensor, features: dict[str, Tensor], target: Target) -> dict[str, Any]:
        """Return the losses or the detections of one image: (1, in_chans, H, W), its maps, its target."""
        height, width = target["size"]
        own = [target] if self.training else None
        for sampler in (self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler):
            cast(SeededSampler, sampler).seed = target.get("seed", 0)
        proposals, losses = self.rpn(ImageList(image, [(height, width)]), features, own)
        found, more = self.roi_heads(features, proposals, [(height, width)], own)
        if self.training:
            return losses | more
        (detections,) = found
        detections["finite"] = torch.stack([maps.isfinite().all() for maps in features.values()]).all()
        (original_height, original_width) = target["original"]
        scale = original_width / width, original_height / height
        detections["boxes"] = detections["boxes"] * detections["boxes"].new_tensor(scale * 2)
        return detections


def paste(detections: Target, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield the masks of an image's detections in its original pixels, on the CPU, a few at a time.

    Args:
        detections: `boxes` (n, 4) and `masks` (n, 1, 28, 28), see `Detector`.
        size: height and width of the original.

    Yields:
        (k, height, width) uint8, 0 or 1; together n, of at most `PASTED` pixels at a time, or one.
    """
    boxes, masks = detections["boxes"].cpu(), detections["masks"].cpu()  # pasting reads every box on the host
    count = max(1, PASTED // (size[0] * size[1]))
    for start in range(0, len(boxes), count):
        part = slice(start, start + count)
        yield (paste_masks_in_image(masks[part], boxes[part], size)[:, 0] >= 0.5).to(torch.uint8)


def _in_float32(_: nn.Module, __: object, outputs: Any) -> Any:
    """Convert outputs to float32: bfloat16 has steps of 4 pixels at 1024, and torchvision decodes in their dtype."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_in_float32(_, __, part) for part in outputs)


def channels_of(state_dict: dict[str, Tensor]) -> int:
    """Return the channels of a detector's maps and heads."""
    return state_dict["rpn.head.cls_logits.weight"].shape[1]


def build(state_dict: dict[str, Tensor], sizes: dict[str, Any], _: dict[str, Any]) -> Detector:
    """Return the detector that a state dict describes, with random weights.

    Args:
        state_dict: of a `Detector`.
        sizes: arguments of `create_pyramid`.
        _: arguments of its run: none is needed.
    """
    classes = len(state_dict["roi_heads.box_predictor.cls_score.weight"]) - 1
    masks = any(name.startswith("roi_heads.mask_") for name in state_dict)
    return Detector(create_pyramid("arm_base_pz16", **{"out_chans": channels_of(state_dict), **sizes}), classes, masks)
