"""Carry out training and evaluation transforms on arrays of pixels, several times faster than in Pillow.

A worker decodes and crops, and lets timm draw RandAugment's operations, their magnitudes and the boxes to erase. The
training device carries these out on whole batches, flips and normalises.
"""

import copy
import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from util.data import arrays, decode
from util.data.randaugment import NO_OPERATION, NOTE, carry_out_layers, recording_copy, runs_on_device
from util.data.transforms import Recipe, check_resized

Array = np.ndarray  # (H, W, C): uint8 if C is 1 or 3, else float32
RANDOM_CROPS = transforms.RandomResizedCrop, RandomResizedCropAndInterpolation
CONVERSIONS = transforms.ToTensor, MaybeToTensor


class Uint8Transform:
    """Carry out a transform of Pillow images on uint8 pixels, with the same random numbers.

    Images of other than one or three channels, of which Pillow has none, are cropped and flipped in float32.

    Args:
        transform: a random resized crop, or a resize and a centre crop; then any of flip, RandAugment or other
            transforms of images, conversion, normalisation, random erasing.
    """

    carry_out = staticmethod(carry_out_layers)  # `kernels.fuse_augmentation` may replace it

    def __init__(self, transform: Recipe) -> None:
        self.pixels = transform.pixels
        missing: Any = None  # torchvision and timm do not type their steps
        self.crop = self.resize = self.centre = self.erase = self.normalize = self.draw = missing
        self.fill, self.flip_rate = (0,), 0.0
        self.augment: list[Any] = []  # transforms of Pillow images
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
                self.augment.append(step)
        if self.augment and runs_on_device(self.augment[-1]):
            self.fill = self.augment[-1].ops[0].kwargs["fillcolor"]
            self.draw = recording_copy(self.augment.pop())

    def __call__(self, data: bytes) -> tuple[Tensor, list[float]]:
        """Do the worker's part for the content of an image file.

        Returns:
            pixels (H, W, C) uint8, or float32 from 0 to 1, and the numbers for `finish`: whether to flip, and those of
            `drawn`.

        Raises:
            BrokenImage: with the reason.
        """
        pixels = self._cropped(data)
        flip = int(torch.rand(1) < self.flip_rate) if self.flip_rate else 0
        for step in self.augment:
            image = step(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))
            pixels = np.array(image).reshape(image.height, image.width, -1)  # (H, W) or (H, W, 3) -> (H, W, C)
        height, width = pixels.shape[:2]
        return torch.from_numpy(pixels), [flip, *self.drawn(height, width)]

    def drawn(self, height: int, width: int) -> list[float]:
        """Draw the device's part for an image of this size, except its flip.

        Returns:
            The `NOTE` numbers of each operation of RandAugment, a seed, and top, bottom, left and right of each box.
        """
        todo: list[float] = []
        if self.draw is not None:
            notes = self.draw([])
            todo += notes + NO_OPERATION * (self.draw.num_layers - len(notes) // NOTE)
        if self.erase is not None:
            recorder = _BoxRecorder(self.pixels.channels, height, width)
            self.draw_boxes(recorder)
            boxes = recorder.boxes + [0, 0, 0, 0] * (self.erase.max_count - len(recorder.boxes) // 4)
            todo += [random.getrandbits(52), *boxes]
        return todo

    def _cropped(self, data: bytes) -> Array:
        if self.crop is None:

            def checked(height: int, width: int) -> tuple[int, int, int, int]:
                check_resized(height, width, self.resize.size)
                return 0, 0, height, width

            pixels = self._decoded(data, checked)
            image = F.resize(_as_image(pixels), self.resize.size, self.resize.interpolation)
            return F.center_crop(image, self.centre.size).permute(1, 2, 0).numpy()  # (C, H, W) -> (H, W, C)

        def draw(height: int, width: int) -> tuple[int, int, int, int]:
            image = torch.empty(1).expand(1, height, width)  # torchvision and timm read only its size
            top, left, h, w = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
            return min(top, height - 1), min(left, width - 1), max(h, 1), max(w, 1)  # timm's crop can be empty

        pixels = self._decoded(data, draw, self.crop.size)
        image = F.resize_image(_as_image(pixels), self.crop.size, self.crop.interpolation)
        return image.permute(1, 2, 0).numpy()  # (C, H, W) -> (H, W, C)

    def _decoded(self, data: bytes, crop: decode.Crop, size: tuple[int, int] | None = None) -> Array:
        if self.pixels.as_stored:
            return arrays.crop_of(data, crop, self.pixels)
        return decode.crop_of(data, crop, size, self.pixels)

    def finish(self, pixels: Tensor, todo: Tensor, device: torch.device) -> Tensor:
        """Do the device's part for a batch.

        Args:
            pixels: (B, H, W, C) uint8, or float32 from 0 to 1, on the CPU.
            todo: (B, n) float64 on the CPU: the numbers of each image, from the worker.
            device: of the result.

        Returns:
            (B, C, H, W) float32, augmented, flipped, normalised and erased.
        """
        mean, std = (torch.as_tensor(v)[:, None, None].to(device) for v in (self.normalize.mean, self.normalize.std))
        fill = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None].to(device)
        noted = range(1, 1 + NOTE * (0 if self.draw is None else self.draw.num_layers), NOTE)
        notes, erasures = todo[:, : noted.stop], todo[:, noted.stop :]
        order = notes[:, 1::NOTE].argsort(dim=0, stable=True)  # (B, layers); on the CPU, so that the host does not wait
        sent = torch.cat([notes, order], dim=1).to(device, non_blocking=True)
        images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
        images = images.clone(memory_format=torch.contiguous_format)
        images = self.carry_out(images, notes[:, 1:], sent[:, 1 : noted.stop], sent[:, noted.stop :].long(), fill)
        if self.flip_rate:
            images = torch.where(sent[:, 0].bool()[:, None, None, None], images.flip(3), images)
        if not self.pixels.as_stored:
            images = images.float().div_(255)
        images = images.sub_(mean).div_(std)
        if self.erase is not None:
            generator = torch.Generator(device)
            for image, (seed, *boxes) in zip(images, erasures.long().tolist(), strict=True):
                if not any(boxes):
                    continue
                generator.manual_seed(seed)
                for top, bottom, left, right in zip(*[iter(boxes)] * 4, strict=True):
                    self._fill(image[:, top:bottom, left:right], generator)
        return images

    def _fill(self, box: Tensor, generator: torch.Generator) -> None:
        """Erase a box (C, h, w) as timm does: with noise per pixel, a single random colour, or the mean colour."""
        if self.erase.per_pixel or self.erase.rand_color:
            shape = box.shape if self.erase.per_pixel else (len(box), 1, 1)
            box.copy_(torch.randn(shape, device=box.device, generator=generator))
        else:
            box.zero_()


def _as_image(pixels: Array) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, C) -> (C, H, W), channels last


class _BoxRecorder:
    """Stand in for an image in timm's `RandomErasing`, and record the boxes instead of erasing them."""

    dtype = torch.float32

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.shape = (channels, height, width)
        self.boxes: list[int] = []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], colour: Tensor) -> None:
        _, rows, columns = where
        self.boxes += [rows.start, rows.stop, columns.start, columns.stop]
