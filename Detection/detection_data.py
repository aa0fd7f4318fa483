"""Images with boxes and masks on a canvas of one size: large-scale jitter in training, whole images in evaluation.

The part of an image that the canvas shows is chosen before it is decoded, so that little more is decoded, resized and
rasterised; the transforms of torchvision decode and resize all of it. Boxes and polygons follow in closed form, and
polygons are rasterised at the size of the canvas.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from util.data import arrays, decode
from util.data.datasets import Item, SharedStack, named_if_broken, sample_or_blank
from util.data.decode import BrokenImage, as_broken_image
from util.data.pixels import Pixels
from util.data.sources.coco import CocoSource, Segment, mask_library, to_rle
from util.data.sources.source import Source


class Placement(NamedTuple):
    """Where on the canvas a part of an image lies: from its upper left corner.

    Args:
        crop: top, left, height and width of the part in the image.
        size: height and width of the part on the canvas.
        flip: whether left and right are exchanged.
        seed: for random choices that depend on the image.
    """

    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False
    seed: int = 0

    def move(self, points: np.ndarray) -> np.ndarray:
        """Return points (..., 2), x and y in pixels of the image, in pixels of the canvas."""
        top, left, height, width = self.crop
        moved = (points - [left, top]) * [self.size[1] / width, self.size[0] / height]
        if self.flip:
            moved[..., 0] = self.size[1] - moved[..., 0]
        return moved


class Jitter:
    """Place images at random: large-scale jitter (Ghiasi et al. 2021) and horizontal flips.

    A scale is drawn. At 1 the whole image just fits into the canvas. Where it is larger, a random part is taken.

    Args:
        size: height and width of the canvas.
        scale: least and largest scale.
        flip: share of images that are flipped.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float] = (0.1, 2.0), flip: float = 0.5) -> None:
        self.size, self.scale, self.flip = size, scale, flip

    def __call__(self, height: int, width: int) -> Placement:
        """Draw a placement for an image of this size, from torch's generator."""
        drawn, down, right, side = torch.rand(4, dtype=torch.float64).tolist()
        low, high = self.scale
        ratio = (low + drawn * (high - low)) * min(self.size[0] / height, self.size[1] / width)
        top, part_height, h = _part(height, self.size[0], ratio, down)
        left, part_width, w = _part(width, self.size[1], ratio, right)
        seed = int(torch.randint(2**31, ()))
        return Placement((top, left, part_height, part_width), (h, w), side < self.flip, seed)


class Fit:
    """Place whole images: as large as the canvas, `size` (height, width), allows."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, height: int, width: int) -> Placement:
        """Return the placement of an image of this size."""
        ratio = min(self.size[0] / height, self.size[1] / width)
        return Placement((0, 0, height, width), (max(1, round(height * ratio)), max(1, round(width * ratio))))


def _part(length: int, canvas: int, ratio: float, drawn: float) -> tuple[int, int, int]:
    """Return where the part of a side starts, how long it is, and how long it is on the canvas."""
    if length * ratio <= canvas:
        return 0, length, max(1, round(length * ratio))
    part = min(length, max(1, round(canvas / ratio)))
    return int(drawn * (length - part + 1)), part, canvas


class Sample(NamedTuple):
    """An image and its objects on the canvas (H, W).

    Args:
        pixels: (H, W, C), uint8, or float32 for other than 1 or 3 channels; 0 beside the image.
        numbers: height and width on the canvas and of the image, its index, and a seed.
        boxes: (m, 4) float32.
        labels: (m,) int64 from 1.
        masks: (m, H, ceil(W / 8)) uint8, eight pixels each; None without masks.
    """

    pixels: Tensor
    numbers: tuple[int, ...]
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None


class DetectionDataset(Dataset):
    """Images of a source and their objects on a canvas; see `util.data.datasets.Samples`.

    Boxes and masks belong to the image as it is decoded: turned, if `pixels.exif` says so. If their file gives another
    size of the image, it counts as broken. Objects that stand for a group are left out, and so are those of which the
    canvas shows nothing. If the canvas shows a part of an object, its box is that of the mask, as in ViTDet, or without
    masks the part of the box.

    Args:
        source: images and objects.
        place: a `Jitter` or `Fit`.
        pixels: how images are decoded and normalised.
        masks: whether objects have masks.

    Raises:
        UserError: some objects have no mask, or faster-coco-eval is not installed.
    """

    def __init__(self, source: CocoSource, place: Jitter | Fit, pixels: Pixels, masks: bool = False) -> None:
        if masks:
            mask_library()
            source.check_masks()
        self.source, self.place, self.pixels, self.masks = source, place, pixels, masks
        self.stack = SharedStack()

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> Item:
        return sample_or_blank(self, index)

    def sample(self, index: int) -> Sample:
        """Return an image and its objects; raise `BrokenImage`, which names it, if it cannot be read or decoded."""
        height, width = self.source.sizes[index].tolist()
        placed = self.place(height, width)
        with named_if_broken(self.source, index):
            canvas = self._on_canvas(self._decoded(self.source.read(index), placed, height, width), placed)
            boxes, labels, masks = self._objects(index, placed)
        return Sample(canvas, (*placed.size, height, width, index, placed.seed), boxes, labels, masks)

    def blank(self) -> Sample:
        """Return an empty canvas with the index -1, in place of a broken image."""
        dtype = torch.float32 if self.pixels.as_stored else torch.uint8
        canvas = torch.zeros((*self.place.size, self.pixels.channels), dtype=dtype)
        masks = np.zeros((0, *self._packed_size()), np.uint8) if self.masks else None
        numbers = (*self.place.size, *self.place.size, -1, 0)
        return Sample(canvas, numbers, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), masks)

    def _decoded(self, data: bytes, placed: Placement, height: int, width: int) -> np.ndarray:
        """Return the part of an image (h, w, C) that the canvas shows."""

        def crop(found_height: int, found_width: int) -> tuple[int, int, int, int]:
            if (found_height, found_width) != (height, width):
                found = f"{found_width} x {found_height}"
                raise BrokenImage(f"it has {found} pixels, and its annotations are for {width} x {height}")
            return placed.crop

        if self.pixels.as_stored:
            return arrays.crop_of(data, crop, self.pixels)
        return decode.crop_of(data, crop, placed.size, self.pixels)

    def _on_canvas(self, part: np.ndarray, placed: Placement) -> Tensor:
        """Lay the part of an image (h, w, C) on a canvas (H, W, C)."""
        image = torch.from_numpy(part).permute(2, 0, 1)  # (h, w, C) -> (C, h, w)
        image = _resized(image, placed.size)
        canvas = torch.zeros((*self.place.size, len(image)), dtype=image.dtype)
        canvas[: placed.size[0], : placed.size[1]] = (image.flip(2) if placed.flip else image).permute(1, 2, 0)
        return canvas  # (C, h, w) -> (h, w, C)

    def _objects(self, index: int, placed: Placement) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        found = self.source.objects(index)
        corners = np.sort(placed.move(found.boxes.reshape(-1, 2, 2).astype(np.float64)), axis=1)  # (m, 4) -> (m, 2, 2)
        limits = placed.size[::-1]
        boxes = np.clip(corners, 0, limits).reshape(-1, 4).astype(np.float32)  # (m, 2, 2) -> (m, 4)
        kept = ~found.crowd & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        if not self.masks:
            return boxes[kept], found.labels[kept] + 1, None
        cut = (boxes != corners.reshape(-1, 4).astype(np.float32)).any(axis=1)
        packed = np.zeros((len(boxes), *self._packed_size()), np.uint8)
        for place in np.flatnonzero(kept):
            top, left, mask = self._mask(found.segments[place], placed, index)
            kept[place] = mask.any()
            if kept[place] and cut[place]:
                rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
                boxes[place] = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
            bits = np.packbits(mask, axis=1)
            packed[place, top : top + len(bits), left // 8 : left // 8 + bits.shape[1]] = bits
        return boxes[kept], found.labels[kept] + 1, packed[kept]

    def _packed_size(self) -> tuple[int, int]:
        return self.place.size[0], -(-self.place.size[1] // 8)

    def _mask(self, segment: Segment, placed: Placement, index: int) -> tuple[int, int, np.ndarray]:
        """Return the part of an object that the canvas shows, or a larger part of the canvas.

        Returns:
            Its top and left on the canvas, left a multiple of 8, and the mask (h, w), not zero inside of the object.
        """
        library = mask_library()
        if isinstance(segment, dict):
            top, left, height, width = placed.crop
            with as_broken_image():
                whole = library.decode(to_rle(segment, *self.source.sizes[index].tolist()))
            part = torch.from_numpy(whole[top : top + height, left : left + width] * np.uint8(255))
            mask = _resized(part[None], placed.size)[0].numpy() > 127
            return 0, 0, mask[:, ::-1] if placed.flip else mask
        polygons = [placed.move(part.reshape(-1, 2)) for part in segment or ()]  # (2 k,) -> (k, 2)
        limits = np.array(placed.size[::-1])
        points = np.concatenate(polygons).clip(0, limits)
        left, top = np.floor(points.min(axis=0)).clip(max=limits - 1).astype(int).tolist()
        right, bottom = np.ceil(points.max(axis=0)).astype(int).tolist()
        left -= left % 8
        moved = [(polygon - [left, top]).ravel() for polygon in polygons]  # (k, 2) -> (2 k,)
        return top, left, library.decode(to_rle(moved, max(1, bottom - top), max(1, right - left)))

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return a batch of samples: their pixels stacked, and their objects one image after the other."""
        batch = {
            "pixels": self.stack([sample.pixels for sample in samples]),
            "numbers": np.array([(*sample.numbers, len(sample.boxes)) for sample in samples]),
            "boxes": np.concatenate([sample.boxes for sample in samples]),
            "labels": np.concatenate([sample.labels for sample in samples]),
        }
        if self.masks:
            batch["masks"] = torch.from_numpy(np.concatenate([sample.masks for sample in samples]))
        return batch

    def finish(self, batch: dict[str, Any], device: torch.device) -> list[Any]:
        """Return images (B, C, H, W) float32, normalised and 0 beside the image, and a dict for each.

        Its values are `size`, height and width on the canvas; `original`, those of the image; `index`, -1 for a broken
        image; `seed`; `boxes` (m, 4) float32 in pixels of the canvas; `labels` (m,) int64, from 1; and with masks
        `masks` (m, H, W) uint8.
        """

        def send(values: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(values)
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        images = batch["pixels"].to(device, non_blocking=True).permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
        images = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        mean, std = (
            torch.tensor(values, device=device)[:, None, None] for values in (self.pixels.mean, self.pixels.std)
        )
        images = images.div_(1 if self.pixels.as_stored else 255).sub_(mean).div_(std)
        counts = batch["numbers"][:, -1].tolist()
        columns = [send(batch["boxes"]).split(counts), send(batch["labels"]).split(counts)]
        if self.masks:
            columns.append(self._unpacked(batch["masks"].to(device, non_blocking=True)).split(counts))
        targets = []
        for image, numbers, *objects in zip(images, batch["numbers"].tolist(), *columns, strict=True):
            height, width, original_height, original_width, index, seed, _ = numbers
            image[:, height:] = 0
            image[:, :, width:] = 0
            target = {
                "size": (height, width),
                "original": (original_height, original_width),
                "index": index,
                "seed": seed,
            }
            targets.append(target | dict(zip(("boxes", "labels", "masks"), objects, strict=False)))
        return [images, targets]

    def _unpacked(self, packed: Tensor) -> Tensor:
        """Return masks (m, H, W) uint8 of their bits (m, H, ceil(W / 8)) uint8."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
        return (packed[..., None] >> shifts & 1).flatten(2)[:, :, : self.place.size[1]]  # (m, H, n, 8) -> (m, H, 8 n)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (C, H, W) to a height and width."""
    return F.resize_image(image, list(size), F.InterpolationMode.BILINEAR, antialias=True)


class NewImages(DetectionDataset):
    """Whole images of any source, of which no objects are known; see `DetectionDataset`.

    Args:
        source: images.
        place: the canvas.
        pixels: how images are decoded and normalised.
    """

    def __init__(self, source: Source, place: Fit, pixels: Pixels) -> None:
        super().__init__(cast(CocoSource, source), place, pixels)

    def sample(self, index: int) -> Sample:
        """Return an image without objects; see `DetectionDataset.sample`."""
        with named_if_broken(self.source, index):
            return self.whole(self.source.read(index), index)

    def whole(self, data: bytes, index: int) -> Sample:
        """Return the sample of the content of an image file; raise `BrokenImage`."""
        crop_of = arrays.crop_of if self.pixels.as_stored else decode.crop_of
        image = crop_of(data, lambda height, width: (0, 0, height, width), pixels=self.pixels)
        height, width = image.shape[:2]
        placed = self.place(height, width)
        numbers = (*placed.size, height, width, index, placed.seed)
        return Sample(self._on_canvas(image, placed), numbers, np.zeros((0, 4), np.float32), np.zeros(0, int), None)
