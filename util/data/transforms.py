"""Image transforms for pretraining, finetuning and evaluation, and their execution in Pillow."""

import argparse
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from util.data import decode
from util.data.decode import MAX_PIXELS, BrokenImage
from util.data.pixels import IMAGENET, Pixels
from util.errors import UserError

BICUBIC = transforms.InterpolationMode.BICUBIC


class Recipe(transforms.Compose):
    """Steps from a Pillow image to the input of a model, and the `Pixels` that its decoding needs."""

    def __init__(self, steps: Sequence[Callable], pixels: Pixels) -> None:
        super().__init__(steps)
        self.pixels = pixels


def pretrain_transform(size: tuple[int, int], args: argparse.Namespace) -> Recipe:
    """Return a bicubic random resized crop and a horizontal flip: image -> (C, H, W) float32."""
    pixels = Pixels.of(args)
    return Recipe(
        [
            transforms.RandomResizedCrop(size, scale=args.scale, interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(args.hflip),
            transforms.ToTensor(),
            transforms.Normalize(pixels.mean, pixels.std),
        ],
        pixels,
    )


def finetune_transform(size: tuple[int, int], args: argparse.Namespace) -> Recipe:
    """Return timm's transform with RandAugment, colour jitter and random erasing: image -> (C, H, W) float32."""
    pixels = Pixels.of(args)
    if pixels.as_stored and (args.aa != "none" or args.color_jitter):
        raise UserError(
            f"--aa {args.aa} and --color_jitter are for images of 1 or 3 channels, not {pixels.channels}: --aa none"
        )
    transform = create_transform(
        input_size=(pixels.channels, *size), is_training=True, interpolation="bicubic",
        scale=args.scale, hflip=args.hflip, color_jitter=args.color_jitter,
        auto_augment=None if args.aa == "none" else args.aa,
        re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
        mean=pixels.mean, std=pixels.std,
    )  # fmt: skip
    return Recipe(transform.transforms, pixels)


def crop_ratio(size: tuple[int, int]) -> float:
    """Return the side of the crop divided by that of the resized image, for the height and width of the input."""
    return 224 / 256 if max(size) <= 224 else 1.0


def eval_transform(size: tuple[int, int], resize: str, pixels: Pixels = IMAGENET, ratio: float | None = None) -> Recipe:
    """Return a bicubic resize and a centre crop: image -> (C, H, W) float32.

    Args:
        size: height and width of the input. Up to 224 pixels the crop is 0.875 of the resized image; larger inputs
            are not cropped.
        resize: "square" resizes to (H, W) / 0.875 and ignores the aspect ratio, as the released finetuning code does;
            "shorter" keeps the aspect ratio and resizes the shorter side, as MAE does.
        pixels: those that the model was trained with.
        ratio: of crop and resized image; by default `crop_ratio`.
    """
    sides = [int(side / (ratio or crop_ratio(size))) for side in size]
    # with "shorter", the shorter side of an image becomes the longer side of the input, so that the crop always fits
    resized = max(sides) if resize == "shorter" else sides
    normalize = transforms.Normalize(pixels.mean, pixels.std)
    return Recipe(
        [BoundedResize(resized, BICUBIC), transforms.CenterCrop(size), transforms.ToTensor(), normalize], pixels
    )


class BoundedResize(transforms.Resize):
    """Resize an image unless it would become too large; see `check_resized`."""

    def forward(self, image: Image.Image) -> Image.Image:
        check_resized(image.height, image.width, self.size)
        return super().forward(image)


class PillowTransform:
    """Carry out a transform of Pillow images, image -> (C, H, W) float32, in the worker, as the released code does."""

    def __init__(self, transform: Recipe) -> None:
        self.transform, self.pixels = transform, transform.pixels

    def __call__(self, data: bytes) -> tuple[Tensor, list[float]]:
        """Return the image (C, H, W) float32 of an image file, and no numbers; raise `BrokenImage`."""
        return self.transform(decode.with_pillow(data, self.pixels)), []

    def finish(self, images: Tensor, _: Tensor, device: torch.device) -> Tensor:
        """Copy a batch to the device, to the CPU as well, because the memory of the batch is reused."""
        return images.to(device, non_blocking=True, copy=True)


def check_resized(height: int, width: int, size: int | Sequence[int]) -> None:
    """Raise `BrokenImage` if an image has more than `MAX_PIXELS` pixels after a resize of its shorter side to `size`.

    `size` is in pixels, as `transforms.Resize` takes it; a pair of height and width is always accepted.
    """
    if isinstance(size, int) and size * size * max(height, width) > MAX_PIXELS * min(height, width):
        raise BrokenImage(f"{width} x {height} pixels with {size} on the shorter side are more than {MAX_PIXELS}")
