"""Transforms of images for pretraining, finetuning and evaluation, carried out in Pillow."""

import argparse
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision import transforms

from util.data import decode
from util.data.decode import MAX_PIXELS, BrokenImage

NORMALIZE = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

BICUBIC = transforms.InterpolationMode.BICUBIC


def pretrain_transform(size: tuple[int, int], args: argparse.Namespace) -> Callable:
    """Random resized crop, bicubic, and horizontal flip: image -> (3, H, W) float32."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=args.scale, interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(args.hflip),
            transforms.ToTensor(),
            NORMALIZE,
        ]
    )


def finetune_transform(size: tuple[int, int], args: argparse.Namespace) -> Callable:
    """timm's training transform with RandAugment, colour jitter and random erasing: image -> (3, H, W) float32."""
    return create_transform(
        input_size=(3, *size),
        is_training=True,
        scale=args.scale,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa == "none" else args.aa,
        interpolation="bicubic",
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )


def crop_ratio(size: tuple[int, int]) -> float:
    """Which part of the sides of a resized image is evaluated, by height and width of the input."""
    return 224 / 256 if max(size) <= 224 else 1.0


def eval_transform(size: tuple[int, int], resize: str, ratio: float | None = None) -> Callable:
    """Resize and centre crop, bicubic: image -> (3, H, W) float32.

    Args:
        size: height and width of the input. Up to 224 pixels the crop is 0.875 of the resized image; larger inputs
            are not cropped.
        resize: "square" resizes to (H, W) / 0.875 whatever the aspect ratio, as the released finetuning code does;
            "shorter" keeps the aspect ratio and resizes the shorter side, as MAE does.
        ratio: of crop and resized image, where it is not `crop_ratio`.
    """
    resized = [int(side / (ratio or crop_ratio(size))) for side in size]
    if resize == "shorter":
        # the shorter side of an image is laid onto the longer side of the input, so that the crop always fits
        resized = max(resized)
    return transforms.Compose(
        [BoundedResize(resized, BICUBIC), transforms.CenterCrop(size), transforms.ToTensor(), NORMALIZE]
    )


class BoundedResize(transforms.Resize):
    """Resize, but refuse an image that would become too large; see `check_resized`."""

    def forward(self, image: Image.Image) -> Image.Image:
        check_resized(image.height, image.width, self.size)
        return super().forward(image)


class PillowTransform:
    """The released path: a transform of Pillow images, all of it in the worker.

    Args:
        transform: image -> (3, H, W) float32.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, data: bytes) -> tuple[Tensor, list[float]]:
        return self.transform(decode.with_pillow(data)), []

    def finish(self, images: Tensor, _: Tensor, device: torch.device) -> Tensor:
        # a copy also on the CPU: the memory of the batch is used again
        return images.to(device, non_blocking=True, copy=True)


def check_resized(height: int, width: int, size: int | Sequence[int]) -> None:
    """Refuse an image so narrow that it would fill memory once its shorter side has been resized.

    Args:
        height: in pixels.
        width: in pixels.
        size: of the shorter side, as `transforms.Resize` takes it; height and width bound themselves.

    Raises:
        BrokenImage: more than `MAX_PIXELS` would come out.
    """
    if isinstance(size, int) and size * size * max(height, width) > MAX_PIXELS * min(height, width):
        raise BrokenImage(f"{width} x {height} pixels with {size} on the shorter side are more than {MAX_PIXELS}")
