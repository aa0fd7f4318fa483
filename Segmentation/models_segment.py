"""Segmenters: an encoder with UperNet on its feature pyramid, or with a linear layer on its tokens.

model = create_segmenter("arm_base_pz16", num_classes=150, img_size=512)
logits = model(imgs)  # (B, 150, H, W)
loss = model(imgs, masks)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from models_arm import create_classifier, create_pyramid
from models_classifier import ARMClassifier, WithEncoder

HEADS = "upernet", "linear"
IGNORED = -1  # class of the pixels that neither the loss nor a metric counts
BINS = 1, 2, 3, 6  # regions a side of the pyramid pooling
AUXILIARY = 0.4  # weight of the loss of UperNet's second classifier


class Segmenter(WithEncoder):
    """Classify every pixel of an image.

    Args:
        backbone: an `ARMPyramid` for `UperNet`; for a `LinearHead` an `ARMClassifier` without head.
        head: its `stride` is in pixels of the input, and `outputs` turns feature maps into logits.
    """

    def __init__(self, backbone: ARMClassifier, head: "UperNet | LinearHead") -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, imgs: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return logits at the size of the images, or the training loss if `masks` are given.

        Args:
            imgs: (B, in_chans, H, W).
            masks: (B, H, W) int64, classes from 0, `IGNORED` for pixels that do not count.

        Returns:
            (B, K, H, W), or a scalar: the sum of `loss` over the outputs of the head, each with its weight.
        """
        maps: Any = self.backbone(imgs) if isinstance(self.head, UperNet) else last_map(self.backbone, imgs)
        size = imgs.shape[-2:]
        if masks is None:
            return enlarge(self.head(maps), self.head.stride, size)
        outputs = self.head.outputs(maps)
        parts = [weight * loss(enlarge(logits, stride, size), masks) for weight, stride, logits in outputs]
        return torch.stack(parts).sum()


def loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the cross-entropy of all pixels, 0 for those that are ignored, as a mean over all pixels of the batch.

    An image weighs the same whatever else is in its batch, so that any number of processes computes the same.

    Args:
        logits: (B, K, H, W).
        masks: (B, H, W) int64, classes from 0, or `IGNORED`.
    """
    # The sums of other reductions use atomics on a GPU, which --deterministic forbids.
    return F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="none").mean()


def last_map(backbone: ARMClassifier, imgs: Tensor) -> Tensor:
    """Return the normalised patches after the last block: (B, in_chans, H, W) -> (B, C, ceil(H / p), ceil(W / p))."""
    ((patches, _),) = backbone.intermediates(imgs, [len(backbone.layers) - 1], norm=True)[1]
    return patches


def enlarge(x: Tensor, factor: int, size: Sequence[int]) -> Tensor:
    """Enlarge a map (B, C, h, w) by a factor, bilinearly, and cut what lies beyond `size`: (B, C, H, W).

    A map of an image that no stride divides reaches beyond the image, at the bottom and on the right.
    """
    if factor > 1:
        sides = x.shape[-2] * factor, x.shape[-1] * factor
        x = F.interpolate(x, sides, mode="bilinear", align_corners=False)
    return x[..., : size[0], : size[1]]


def region_means(x: Tensor, bins: int) -> Tensor:
    """Average a map over bins x bins regions: (B, C, h, w) -> (B, C, bins, bins).

    These are the values of `F.adaptive_avg_pool2d`, whose gradient on a GPU depends on the order of its additions.
    """
    for _ in range(2):  # along the last axis, and then along the one before
        shares = F.adaptive_avg_pool1d(torch.eye(x.shape[-1], device=x.device, dtype=x.dtype), bins)  # (w, bins)
        x = (x @ shares).transpose(-1, -2)
    return x


def convolution(in_chans: int, out_chans: int, side: int) -> nn.Sequential:
    """Return a convolution with normalisation and ReLU.

    The normalisation is that of each pixel. Batch normalisation, which the published heads use, would make the result
    depend on how many processes share a batch.
    """
    conv = nn.Conv2d(in_chans, out_chans, side, padding=side // 2, bias=False)
    return nn.Sequential(conv, LayerNorm2d(out_chans), nn.ReLU())


def classifier(in_chans: int, num_classes: int, drop_rate: float = 0.0) -> nn.Sequential:
    """Return a linear layer of each pixel, after dropout of whole channels."""
    conv = nn.Conv2d(in_chans, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.get_parameter("bias"))
    return nn.Sequential(nn.Dropout2d(drop_rate), conv)


class UperNet(nn.Module):
    """UperNet (Xiao et al. 2018): pyramid pooling on the coarsest map, a feature pyramid, and fusion of its levels.

    As in MMSegmentation, with which MAE and BEiT report: 512 channels, and in training a second classifier of 256
    channels on the third map. Normalisation differs; see `convolution`.

    Args:
        in_chans: channels of each of the four maps.
        num_classes: outputs K.
        stride: of the first map, in pixels of the input; each further map has twice the stride.
        channels: of the head.
        drop_rate: dropout of channels before both classifiers.
    """

    OUTPUTS = "head.classifier.", "head.auxiliary.2."  # how names of a segmenter's parameters of each class begin

    def __init__(
        self, in_chans: int, num_classes: int, stride: int = 4, channels: int = 512, drop_rate: float = 0.1
    ) -> None:
        super().__init__()
        self.stride, self.channels, self.num_classes = stride, channels, num_classes
        self.pools = nn.ModuleList(convolution(in_chans, channels, 1) for _ in BINS)
        self.context = convolution(in_chans + len(BINS) * channels, channels, 3)
        self.lateral = nn.ModuleList(convolution(in_chans, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(convolution(channels, channels, 3) for _ in range(3))
        self.fusion = convolution(4 * channels, channels, 3)
        self.classifier = classifier(channels, num_classes, drop_rate)
        self.auxiliary = nn.Sequential(convolution(in_chans, 256, 3), *classifier(256, num_classes, drop_rate))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits: four maps (B, C, h, w), each half as high and wide as the one before -> (B, K, h, w)."""
        *finer, coarsest = maps
        size = coarsest.shape[-2:]
        pooled = [conv(region_means(coarsest, bins)) for conv, bins in zip(self.pools, BINS, strict=True)]
        spread = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in pooled]
        levels = [self.context(torch.cat([coarsest, *spread], dim=1))]
        for conv, x in zip(reversed(self.lateral), reversed(finer), strict=True):
            levels.insert(0, conv(x) + enlarge(levels[0], 2, x.shape[-2:]))
        levels = [conv(x) for conv, x in zip(self.smooth, levels, strict=False)] + levels[3:]
        same = [enlarge(x, 2**i, levels[0].shape[-2:]) for i, x in enumerate(levels)]
        return self.classifier(self.fusion(torch.cat(same, dim=1)))

    def outputs(self, maps: Sequence[Tensor]) -> list[tuple[float, int, Tensor]]:
        """Return what is trained, as triples of weight in the loss, stride in pixels and logits (B, K, h, w)."""
        return [(1.0, self.stride, self(maps)), (AUXILIARY, 4 * self.stride, self.auxiliary(maps[2]))]


class LinearHead(nn.Module):
    """A linear layer on each token; with a frozen encoder, dense linear probing.

    Args:
        in_chans: channels of a token.
        num_classes: outputs K.
        stride: of the tokens, in pixels of the input.
    """

    OUTPUTS = ("head.classifier.",)

    def __init__(self, in_chans: int, num_classes: int, stride: int = 16) -> None:
        super().__init__()
        self.stride, self.num_classes = stride, num_classes
        self.classifier = classifier(in_chans, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: (B, C, h, w) -> (B, K, h, w)."""
        return self.classifier(x)

    def outputs(self, x: Tensor) -> list[tuple[float, int, Tensor]]:
        """See `UperNet.outputs`."""
        return [(1.0, self.stride, self(x))]


def create_segmenter(
    name: str,
    num_classes: int,
    head: str = "upernet",
    channels: int = 512,
    drop_rate: float = 0.1,
    **encoder: Any,
) -> Segmenter:
    """Return a segmenter with random weights.

    Args:
        name: of the encoder; see `models_arm.create_classifier`.
        num_classes: outputs K.
        head: one of `HEADS`.
        channels: of `UperNet`.
        drop_rate: of `UperNet`.
        **encoder: arguments of the encoder that replace those of its size.

    Raises:
        ValueError: unknown name or head, or sizes that do not fit together.
    """
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; choose from {', '.join(HEADS)}")
    if head == "linear":
        sizes = {"num_classes": 0, "dynamic_img_size": True, "dynamic_img_pad": True}
        plain = create_classifier(name, **{**encoder, **sizes})
        return Segmenter(plain, LinearHead(plain.embed_dim, num_classes, plain.patch_size))
    pyramid = create_pyramid(name, **{"taps": "even", **encoder})
    stride = pyramid.patch_size // 4
    return Segmenter(pyramid, UperNet(pyramid.out_chans, num_classes, stride, channels, drop_rate))


def head_sizes(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `create_segmenter` about the head of a state dict: `head`, `num_classes`, `channels`.

    Raises:
        ValueError: it has no such head.
    """
    outputs, fused = (state_dict.get(f"head.{name}.weight") for name in ("classifier.1", "fusion.0"))
    if outputs is None or outputs.ndim != 4:
        raise ValueError("it has no classifier of pixels")
    found = {"num_classes": len(outputs), "head": "linear" if fused is None else "upernet"}
    return found if fused is None else found | {"channels": len(fused)}


def build(state_dict: dict[str, Tensor], sizes: dict[str, Any], _: dict[str, Any]) -> Segmenter:
    """Return a segmenter for a state dict, with random weights; `sizes` are those of its encoder.

    Raises:
        ValueError: see `head_sizes` and `create_segmenter`.
    """
    return create_segmenter("arm_base_pz16", **head_sizes(state_dict), **sizes)
