"""Images with masks of classes: random views of them to train on, whole images to evaluate."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from util.data import arrays, decode
from util.data.datasets import Item, SharedStack, named_if_broken, sample_or_blank
from util.data.decode import BrokenImage
from util.data.pixels import Pixels
from util.data.sources.mask_folder import IGNORED, MaskFolder
from util.data.transforms import check_resized
from util.errors import UserError

Mask = TypeVar("Mask", np.ndarray, Tensor)
REDRAWS = 10  # of a crop that one class fills
Sample = tuple[Tensor, Tensor]  # image (C, H, W) uint8, or float32 with other than 1 or 3 channels; mask (h, w) int16


class RandomView:
    """Draw a part of an image and of its mask as mmsegmentation does for ADE20K: scale, crop, flip and distort.

    The shorter side of the image becomes the longer side of the input times a random ratio. A crop of the size of the
    input is drawn anew while one class has too large a share of its pixels, up to `REDRAWS` times. An image smaller
    than the crop is padded on the right and below with the mean of the pixels, and its mask with `IGNORED`.

    Args:
        size: height and width of the input.
        pixels: how images are decoded and normalised.
        ratio: least and largest one; all between are equally likely.
        max_share: of the pixels that have a class; 1 draws a single crop.
        hflip: rate of horizontal flips.
        distort: rate of each change of brightness, contrast, saturation and hue, by the factors of torchvision's
            `RandomPhotometricDistort`.

    Raises:
        UserError: `distort` is for images of 1 or 3 channels.
    """

    one_size = True

    def __init__(
        self,
        size: tuple[int, int],
        pixels: Pixels,
        ratio: Sequence[float] = (0.5, 2.0),
        max_share: float = 0.75,
        hflip: float = 0.5,
        distort: float = 0.5,
    ) -> None:
        if distort and pixels.as_stored:
            raise UserError(
                f"--distort {distort:g} is for images of 1 or 3 channels, not {pixels.channels}: --distort 0"
            )
        self.size, self.pixels, self.ratio, self.max_share = size, pixels, ratio, max_share
        self.hflip, self.distort = hflip, _Distortion(p=distort) if distort else None
        self.fill = [m if pixels.as_stored else round(255 * m) for m in pixels.mean]

    def __call__(self, data: bytes, mask: np.ndarray) -> Sample:
        """Return a view of the content of an image file and of its mask as it is stored, (h, w) int16 each.

        Raises:
            BrokenImage: the image cannot be decoded, or has another size than the mask.
        """
        mask = upright(mask, data, self.pixels)
        low, high = self.ratio
        side = max(self.size) * (low + (high - low) * float(torch.rand(1)))
        resized = resized_shape(mask.shape, side)
        target = min(self.size[0], resized[0]), min(self.size[1], resized[1])
        shares = [t * m / r for t, m, r in zip(target, mask.shape, resized, strict=True)]
        h, w = (max(1, round(share)) for share in shares)
        for _ in range(REDRAWS + 1):
            top, left = (
                int(torch.randint(whole - part + 1, ())) for whole, part in zip(mask.shape, (h, w), strict=True)
            )
            part = mask[top : top + h, left : left + w]
            if self.max_share == 1 or _largest_share(part) <= self.max_share:
                break
        image = _resized(_decoded(data, mask.shape, (top, left, h, w), target, self.pixels), target)
        labels = torch.from_numpy(nearest(part, target))
        if torch.rand(1) < self.hflip:
            image, labels = image.flip(2), labels.flip(1)
        if self.distort is not None:
            image = self.distort(image)
        missing = (0, self.size[1] - target[1], 0, self.size[0] - target[0])  # left, right, above, below
        channels = [F.pad(c, missing, value=fill) for c, fill in zip(image, self.fill, strict=True)]
        return torch.stack(channels), F.pad(labels, missing, value=IGNORED)


class _Distortion(v2.RandomPhotometricDistort):
    """Do not exchange channels, as mmsegmentation does not: colours tell sky from grass."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class WholeImage:
    """Resize the shorter side of an image to the longer side of the input; its mask keeps all of its pixels.

    Args:
        size: height and width of the input.
        pixels: how images are decoded and normalised.
        square: resize the image to the input instead, whatever its aspect ratio.
    """

    one_size = False

    def __init__(self, size: tuple[int, int], pixels: Pixels, square: bool = False) -> None:
        self.size, self.pixels, self.square = size, pixels, square

    def __call__(self, data: bytes, mask: np.ndarray) -> Sample:
        """Return a whole image (C, H, W) and its mask (h, w) int16 in the pixels of the file, turned with the image.

        Raises:
            BrokenImage: the image cannot be decoded, has another size than the mask, or becomes too large.
        """
        mask = upright(mask, data, self.pixels)
        height, width = mask.shape
        check_resized(height, width, self.size if self.square else max(self.size))
        target = self.size if self.square else resized_shape(mask.shape, max(self.size))
        image = _decoded(data, mask.shape, (0, 0, height, width), target, self.pixels)
        return _resized(image, target), torch.from_numpy(np.ascontiguousarray(mask))


class SegmentationDataset(Dataset):
    """Images and masks of a source after a transform; see `util.data.datasets.Samples`.

    After `finish`, a batch for training is images (B, C, H, W) float32 and masks (B, H, W) int64, `IGNORED` for pixels
    without a class; for evaluation, lists of B images (C, H, W) and of B masks (h, w), of any sizes.
    """

    def __init__(self, source: MaskFolder, transform: RandomView | WholeImage) -> None:
        self.source, self.transform = source, transform
        self.stacks = SharedStack(), SharedStack()

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> Item:
        return sample_or_blank(self, index)

    def sample(self, index: int) -> Sample:
        """Return an image and its mask; raise `BrokenImage`, which names the image, if one cannot be read."""
        with named_if_broken(self.source, index):
            return self.transform(self.source.read(index), self.source.read_mask(index))

    def blank(self) -> Sample:
        """Return a black image without a class, in place of a broken one."""
        size, pixels = self.transform.size, self.transform.pixels
        image = torch.zeros(pixels.channels, *size, dtype=torch.float32 if pixels.as_stored else torch.uint8)
        return image, torch.full(size, IGNORED, dtype=torch.int16)

    def collate(self, samples: Sequence[Sample]) -> list:
        """Return images and masks: as two tensors if the transform gives all the same size, else as two lists."""
        images, masks = zip(*samples, strict=True)
        if self.transform.one_size:
            return [stack(parts) for stack, parts in zip(self.stacks, (images, masks), strict=True)]
        return [[*images], [*masks]]

    def finish(self, batch: list, device: torch.device) -> list:
        """Return images, normalised, and masks on the device."""
        images, masks = batch
        if self.transform.one_size:
            return [normalized(images, self.transform.pixels, device), masks.to(device, non_blocking=True).long()]
        pixels = self.transform.pixels
        return [
            [normalized(i, pixels, device) for i in images],
            [m.to(device, non_blocking=True).long() for m in masks],
        ]


def normalized(images: Tensor, pixels: Pixels, device: torch.device) -> Tensor:
    """Normalise images on a device: (..., C, H, W) uint8, or float32 from 0 to 1 -> float32 of its own memory."""
    mean, std = (torch.tensor(values)[:, None, None].to(device) for values in (pixels.mean, pixels.std))
    images = images.to(device, non_blocking=True).to(torch.float32, copy=True)  # the memory of the batch is reused
    return (images if pixels.as_stored else images.div_(255)).sub_(mean).div_(std)


def resized_shape(shape: Sequence[int], shorter: float) -> tuple[int, int]:
    """Return height and width after the shorter side is resized to so many pixels, rounded."""
    height, width = (max(1, round(side * shorter / min(shape))) for side in shape)
    return height, width


def nearest(mask: Mask, shape: Sequence[int]) -> Mask:
    """Resize a mask: each pixel takes the class at its centre, (h, w) -> `shape`."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(shape, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def upright(mask: np.ndarray, data: bytes, pixels: Pixels) -> np.ndarray:
    """Turn a mask of stored pixels as the image in the content of a file is turned."""
    return decode.turned(mask, decode.orientation_of(data)) if pixels.exif else mask


def _largest_share(mask: np.ndarray) -> float:
    """Return the share of the most frequent class among the pixels that have one; 1 if none has."""
    counts = np.bincount(mask[mask != IGNORED])
    return counts.max() / counts.sum() if len(counts) else 1.0


def _decoded(
    data: bytes, shape: tuple[int, ...], part: tuple[int, int, int, int], target: tuple[int, int], pixels: Pixels
) -> np.ndarray:
    """Decode a part of an image to (h, w, C), and little more; see `decode.crop_of`.

    Args:
        data: content of an image file.
        shape: height and width of its mask.
        part: top, left, height and width.
        target: height and width that it will be resized to.
        pixels: how images are decoded.

    Raises:
        BrokenImage: the image cannot be decoded, or has another size than the mask.
    """

    def crop(height: int, width: int) -> tuple[int, int, int, int]:
        if (height, width) != shape:
            raise BrokenImage(f"it has {width} x {height} pixels, and its mask {shape[1]} x {shape[0]}")
        return part

    return arrays.crop_of(data, crop, pixels) if pixels.as_stored else decode.crop_of(data, crop, target, pixels)


def _resized(pixels: np.ndarray, shape: tuple[int, int]) -> Tensor:
    """Resize an image with antialiasing: (h, w, C) -> (C, *shape) of the same type."""
    return TF.resize_image(torch.from_numpy(pixels).permute(2, 0, 1), list(shape), InterpolationMode.BICUBIC)
