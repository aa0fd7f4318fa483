"""Training and evaluation transforms on uint8 pixels: what the transforms in Pillow do, several times faster.

A worker decodes, crops and augments; flips, normalisation and random erasing are done on the training device, a batch
at a time. RandAugment's operations are OpenCV's and look-up tables; timm draws them and their magnitudes.
"""

import copy
import math
import random
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from util import decode

cv2.setNumThreads(0)  # parallel are the workers

Array = np.ndarray  # (H, W, 3) uint8
RANDOM_CROPS = transforms.RandomResizedCrop, RandomResizedCropAndInterpolation
CONVERSIONS = transforms.ToTensor, MaybeToTensor


class Uint8Transform:
    """A transform of Pillow images, carried out on uint8 pixels with the same random numbers.

    Args:
        transform: `transforms.Compose` of a random resized crop, or of a resize and a centre crop; then any of flip,
            RandAugment or another transform of images, conversion, normalisation, random erasing.
    """

    def __init__(self, transform: transforms.Compose) -> None:
        self.crop, self.resize, self.centre = None, None, None
        self.flip_rate, self.augment, self.erase, self.normalize = 0.0, [], None, None
        for step in transform.transforms:
            if isinstance(step, RANDOM_CROPS):
                self.crop = step
            elif isinstance(step, transforms.Resize):
                self.resize = step
            elif isinstance(step, transforms.CenterCrop):
                self.centre = step
            elif isinstance(step, transforms.RandomHorizontalFlip):
                self.flip_rate = step.p
            elif isinstance(step, RandomErasing):
                self.erase = step
                self.draw_boxes = copy.copy(step)
                self.draw_boxes.rand_color = self.draw_boxes.per_pixel = False  # no colours, only boxes
            elif isinstance(step, transforms.Normalize):
                self.normalize = step
            elif not isinstance(step, CONVERSIONS):
                self.augment.append(on_arrays(step))

    def __call__(self, data: bytes) -> tuple[Tensor, list[int]]:
        """What a worker does with an image.

        Args:
            data: content of an image file.

        Returns:
            pixels (H, W, 3) uint8 and the numbers that `finish` needs: whether to flip, a seed, and top, bottom, left
            and right of each box to erase.

        Raises:
            BrokenImage: says why.
        """
        pixels = self._cropped(data)
        todo = [int(torch.rand(1) < self.flip_rate) if self.flip_rate else 0]
        for step in self.augment:
            pixels = step(pixels)
        if self.erase is not None:
            height, width, _ = pixels.shape
            notes = _Notes(height, width)
            self.draw_boxes(notes)
            boxes = notes.boxes + [0, 0, 0, 0] * (self.erase.max_count - len(notes.boxes) // 4)
            todo += [random.getrandbits(62), *boxes]
        return torch.from_numpy(pixels), todo

    def _cropped(self, data: bytes) -> Array:
        if self.crop is None:
            pixels = decode.crop_of(data, lambda height, width: (0, 0, height, width))
            image = F.resize(_as_image(pixels), self.resize.size, self.resize.interpolation)
            return F.center_crop(image, self.centre.size).permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)

        def draw(height: int, width: int) -> tuple[int, int, int, int]:
            image = torch.empty(1).expand(3, height, width)  # torchvision and timm ask an image for its size
            top, left, h, w = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
            return min(top, height - 1), min(left, width - 1), max(h, 1), max(w, 1)  # timm's rounds to none at times

        pixels = np.ascontiguousarray(decode.crop_of(data, draw, self.crop.size))
        image = F.resize_image(_as_image(pixels), self.crop.size, self.crop.interpolation)
        return image.permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)

    def finish(self, pixels: Tensor, todo: Tensor, device: torch.device) -> Tensor:
        """What the training device does with a batch.

        Args:
            pixels: (B, H, W, 3) uint8, on the CPU.
            todo: (B, n) int64 on the CPU, as the workers returned it.
            device: of the result.

        Returns:
            (B, 3, H, W) float32, flipped, normalised and erased.
        """
        mean, std = (torch.as_tensor(v)[:, None, None].to(device) for v in (self.normalize.mean, self.normalize.std))
        flip = todo[:, 0].bool()[:, None, None, None].to(device)
        images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous()  # (B, H, W, 3) -> (B, 3, H, W)
        if self.flip_rate:
            images = torch.where(flip, images.flip(3), images)
        images = images.float().div_(255).sub_(mean).div_(std)
        if self.erase is not None:
            generator = torch.Generator(device)
            for image, (_, seed, *boxes) in zip(images, todo.tolist(), strict=True):
                if not any(boxes):
                    continue
                generator.manual_seed(seed)
                for top, bottom, left, right in zip(*[iter(boxes)] * 4, strict=True):
                    self._fill(image[:, top:bottom, left:right], generator)
        return images

    def _fill(self, box: Tensor, generator: torch.Generator) -> None:
        """Erase a box (3, h, w) as timm does: noise per pixel, one normal colour, or the mean colour."""
        if self.erase.per_pixel or self.erase.rand_color:
            shape = box.shape if self.erase.per_pixel else (3, 1, 1)
            box.copy_(torch.randn(shape, device=box.device, generator=generator))
        else:
            box.zero_()


def _as_image(pixels: Array) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W), channels last


class _Notes:
    """An image for timm's `RandomErasing` that takes down the boxes instead of erasing them."""

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self.shape, self.boxes = (3, height, width), []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], colour: Tensor) -> None:
        _, rows, columns = where
        self.boxes += [rows.start, rows.stop, columns.start, columns.stop]


def on_arrays(step: Callable) -> Callable[[Array], Array]:
    """A transform of Pillow images as one of arrays: RandAugment's operations in OpenCV, anything else in Pillow."""
    if not isinstance(step, RandAugment):
        return partial(_in_pillow, step)
    step = copy.deepcopy(step)
    for op in step.ops:
        op.aug_fn = OPERATIONS.get(op.aug_fn) or partial(_in_pillow, op.aug_fn)
    step.ops = np.array(step.ops)  # numpy draws from it, and would make an array of a list each time
    return step


def _in_pillow(function: Callable, image: Array, *args: object, **kwargs: object) -> Array:
    return np.array(function(Image.fromarray(image), *args, **kwargs))


# ---- the operations of timm.data.auto_augment, which passes `fillcolor` and `resample` (bicubic) to all of them


def _histograms(image: Array) -> Array:
    return np.stack([cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)])  # (3, 256)


def _look_up(image: Array, tables: Array) -> Array:
    """Replace every value; `tables` is (256,), or (3, 256) with one table a channel."""
    tables = np.clip(tables, 0, 255).astype(np.uint8)
    return cv2.LUT(image, tables if tables.ndim == 1 else np.ascontiguousarray(tables.T)[None])


LEVELS = np.arange(256)


def auto_contrast(image: Array, **_: object) -> Array:
    tables = []
    for histogram in _histograms(image):
        low, high = np.flatnonzero(histogram)[[0, -1]]
        tables.append((LEVELS - low) * (255 / (high - low)) if high > low else LEVELS)
    return _look_up(image, np.stack(tables))


def equalize(image: Array, **_: object) -> Array:
    tables = []
    for histogram in _histograms(image).astype(np.int64):
        used = histogram[histogram > 0]
        step = (used.sum() - used[-1]) // 255
        before = np.cumsum(histogram) - histogram
        tables.append((before + step // 2) // step if step else LEVELS)
    return _look_up(image, np.stack(tables))


def invert(image: Array, **_: object) -> Array:
    return cv2.bitwise_not(image)


def posterize(image: Array, bits_to_keep: int, **_: object) -> Array:
    return image & np.uint8(256 - (1 << (8 - bits_to_keep))) if bits_to_keep < 8 else image


def solarize(image: Array, thresh: int, **_: object) -> Array:
    return _look_up(image, np.where(thresh > LEVELS, LEVELS, 255 - LEVELS))


def solarize_add(image: Array, add: int, thresh: int = 128, **_: object) -> Array:
    return _look_up(image, np.where(thresh > LEVELS, LEVELS + add, LEVELS))


def brightness(image: Array, factor: float, **_: object) -> Array:
    return _look_up(image, LEVELS * factor)


def contrast(image: Array, factor: float, **_: object) -> Array:
    grey = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _look_up(image, grey + (LEVELS - grey) * factor)


def color(image: Array, factor: float, **_: object) -> Array:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


SMOOTH = np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


def sharpness(image: Array, factor: float, **_: object) -> Array:
    smooth = image.copy()  # the border stays as it is
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, SMOOTH)[1:-1, 1:-1]
    return cv2.addWeighted(image, factor, smooth, 1 - factor, 0)


def _affine(image: Array, a: float, b: float, c: float, d: float, e: float, f: float, fillcolor: tuple) -> Array:
    """Take the pixel at (x, y) from (a x + b y + c, d x + e y + f), bicubic; coordinates are of pixel corners."""
    matrix = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])  # OpenCV's are of pixel centres
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, image.shape[1::-1], flags=flags, borderValue=fillcolor)


def shear_x(image: Array, factor: float, fillcolor: tuple, **_: object) -> Array:
    return _affine(image, 1, factor, 0, 0, 1, 0, fillcolor)


def shear_y(image: Array, factor: float, fillcolor: tuple, **_: object) -> Array:
    return _affine(image, 1, 0, 0, factor, 1, 0, fillcolor)


def _translate(image: Array, pixels: float, fillcolor: tuple) -> Array:
    """Take every pixel from `pixels` further right: a whole number of them and, for the rest, Pillow's bicubic."""
    width = image.shape[1]
    whole = min(max(math.floor(pixels), 1 - width), width - 1)
    d = pixels - math.floor(pixels)
    weights = [-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, -(d**2) + d**3]  # of the pixels -1 to 2
    image = cv2.filter2D(image, -1, np.float32([weights]), anchor=(1, 0), borderType=cv2.BORDER_REPLICATE)
    left, right = max(0, -whole), max(0, whole)
    return cv2.copyMakeBorder(image[:, right : width - left], 0, 0, left, right, cv2.BORDER_CONSTANT, value=fillcolor)


def translate_x_rel(image: Array, pct: float, fillcolor: tuple, **_: object) -> Array:
    return _translate(image, pct * image.shape[1], fillcolor)


def translate_y_rel(image: Array, pct: float, fillcolor: tuple, **_: object) -> Array:
    return cv2.transpose(_translate(cv2.transpose(image), pct * image.shape[0], fillcolor))


def rotate(image: Array, degrees: float, fillcolor: tuple, **_: object) -> Array:
    angle, x, y = -math.radians(degrees), image.shape[1] / 2, image.shape[0] / 2
    sin, cos = math.sin(angle), math.cos(angle)
    return _affine(image, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y, fillcolor)


OPERATIONS = {
    getattr(timm_ops, function.__name__): function
    for function in (
        auto_contrast, equalize, invert, posterize, solarize, solarize_add, brightness, contrast, color, sharpness,
        shear_x, shear_y, translate_x_rel, translate_y_rel, rotate,
    )
}  # fmt: skip
