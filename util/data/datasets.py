"""Datasets: decoded, transformed and labelled images, and what takes the place of broken ones."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from util.data import arrays
from util.data.decode import BrokenImage
from util.data.pixels import Pixels
from util.data.sources.readers import open_source
from util.data.sources.source import Source
from util.data.transforms import PillowTransform, Recipe, eval_transform
from util.data.uint8_transform import Uint8Transform
from util.files import printable
from util.seeding import preserve_generators, seed_sample

LOGGER = logging.getLogger("arm")

PREFETCH = 2  # batches that each worker prepares ahead

Sample = tuple[Tensor, list[float]]  # pixels; the numbers of the transform, followed by the label
Item = tuple[Any, dict[int, str]]  # a sample, and {index: reason} of the broken images that were met


class Batches(Protocol):
    """Make batches of samples."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Return what a worker sends to the training process."""

    def finish(self, batch: Any, device: torch.device) -> list[Any]:
        """Return images and what belongs to them on the device, in nested lists and dicts of tensors."""


class Samples(Batches, Protocol):
    """A dataset that the loaders accept. Its random transforms draw from the generators of `seed_sample`."""

    @property
    def source(self) -> Source:
        """The encoded images."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> Item:
        """Return a sample, or a blank one in place of a broken image."""

    def sample(self, index: int) -> Any:
        """Return a sample; raise `BrokenImage`, which names the image, if it cannot be read or decoded."""

    def blank(self) -> Any:
        """Return a sample in place of a broken one."""


class SharedStack:
    """Stack the pixels of a batch in memory that is shared with the training process and reused.

    The page faults of new shared memory, one per 4 KiB, would take a tenth of the time of an image. A worker is ahead
    by `PREFETCH` batches; the batch before those is no longer needed when the training process requests another one.
    """

    def __init__(self) -> None:
        self.memory: list[Tensor] = []

    def __call__(self, pixels: Sequence[Tensor]) -> Tensor:
        """Return the tensors, all of one shape, as one: B of (...) -> (B, ...)."""
        return torch.stack(list(pixels), out=self._memory(pixels[0], len(pixels)))

    def _memory(self, sample: Tensor, count: int) -> Tensor | None:
        if get_worker_info() is None:
            return None
        memory = self.memory.pop(0) if len(self.memory) > PREFETCH else None
        if memory is None or memory.shape[1:] != sample.shape or len(memory) < count:
            memory = torch.empty(count, *sample.shape, dtype=sample.dtype).share_memory_()
        self.memory.append(memory)
        return memory[:count]


class LabelledBatches:
    """Make batches of pixels, numbers of a transform and labels; see `Batches`.

    Args:
        transform: of the images; its `finish` turns pixels and numbers of a batch into images.
    """

    def __init__(self, transform: PillowTransform | Uint8Transform) -> None:
        self.transform, self.stack = transform, SharedStack()

    def collate(self, samples: Sequence[Sample]) -> tuple[Tensor, np.ndarray]:
        """Return the pixels, and (B, n + 1) float64 with the n numbers and the label of each image."""
        pixels, numbers = zip(*samples, strict=True)
        # a small array is sent faster from a worker than a tensor, whose memory is shared by a handshake
        return self.stack(pixels), np.array(numbers, dtype=np.float64)

    def finish(self, batch: tuple[Tensor, np.ndarray], device: torch.device) -> list[Tensor]:
        """Return images (B, in_chans, H, W) float32 and labels (B,) int64, on the device."""
        pixels, numbers = batch[0], torch.from_numpy(batch[1])
        if device.type == "cuda":
            numbers = numbers.pin_memory()
        labels = numbers.to(device, non_blocking=True)[:, -1].long()
        return [self.transform.finish(pixels, numbers[:, :-1], device), labels]


class ImageDataset(LabelledBatches, Dataset):
    """Images of a source after a transform; a broken image becomes a blank sample with the label -1.

    Args:
        source: encoded images and their labels.
        transform: content of an image file -> (pixels, numbers); its `finish` turns a batch of both into images.
    """

    def __init__(self, source: Source, transform: PillowTransform | Uint8Transform) -> None:
        super().__init__(transform)
        self.source = source

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> Item:
        return sample_or_blank(self, index)

    def sample(self, index: int) -> Sample:
        """Return a sample; raise `BrokenImage`, which names the image, if it cannot be read or decoded."""
        with named_if_broken(self.source, index):
            pixels, numbers = self.transform(self.source.read(index))
        return pixels, [*numbers, self.source.labels[index]]

    def blank(self) -> Sample:
        """Return a black sample with the label -1, in place of a broken one."""
        pixels, numbers = self.transform(arrays.blank(self.transform.pixels))
        return pixels, [*numbers, -1]


def sample_or_blank(dataset: Samples, index: int) -> Item:
    """Return a sample and {}, or a blank one and {index: reason} in place of a broken image."""
    try:
        return dataset.sample(index), {}
    except BrokenImage as error:
        return dataset.blank(), {index: str(error)}


@contextmanager
def named_if_broken(source: Source, index: int) -> Iterator[None]:
    """Turn an image that cannot be read or decoded into a `BrokenImage` that names it."""
    try:
        yield
    except (BrokenImage, OSError) as error:
        reason = getattr(error, "strerror", None) or printable(str(error))
        raise BrokenImage(f"{source.name(index)}: {reason}") from error


def image_dataset(data_path: str, split: str, transform: Recipe, loader: str) -> ImageDataset:
    """Open the images of `--data_path` by `open_source`, with the transform carried out as `--loader` says."""
    return ImageDataset(open_source(data_path, split), pixels_by(loader, transform))


def pixels_by(loader: str, transform: Recipe) -> PillowTransform | Uint8Transform:
    """Return a transform of the content of image files, for the loader "fast" or "pil".

    Images that Pillow has no mode for are the same with both, and one line says so.
    """
    if loader == "pil" and transform.pixels.as_stored:
        _say_as_stored(transform.pixels.channels)
        loader = "fast"
    return Uint8Transform(transform) if loader == "fast" else PillowTransform(transform)


def model_input(data: bytes, size: tuple[int, int], resize: str, pixels: Pixels) -> Tensor:
    """Return the input (C, H, W) float32 of a model for the content of an image file; raise `BrokenImage`.

    For `size` and `resize` see `eval_transform`.
    """
    transform = pixels_by("pil", eval_transform(size, resize, pixels))
    image, numbers = transform(data)
    return transform.finish(image[None], torch.tensor([numbers]), torch.device("cpu"))[0]


@cache
def _say_as_stored(channels: int) -> None:
    LOGGER.info("images of %d channels are resized in float32, not in Pillow, whatever the loader", channels)


class SeededSamples(Dataset):
    """Samples whose random transforms depend on (seed, epoch, index) only.

    A sample looks the same in every process, worker and batch, so runs on any number of them see the same images.
    Samples are requested by (epoch, index), as `EpochSampler` yields them. In place of a broken image comes the next
    one that is not broken.

    Args:
        dataset: the images.
        seed: of the run.
        max_broken: a blank sample is returned after more than this number of broken images in a row.
    """

    def __init__(self, dataset: Samples, seed: int, max_broken: float = math.inf) -> None:
        self.dataset, self.seed, self.max_broken = dataset, seed, max_broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> Item:
        return self.__getitems__([epoch_and_index])[0]

    def __getitems__(self, epochs_and_indices: list[tuple[int, int]]) -> list[Item]:
        with preserve_generators():
            return [self._sample(epoch, index) for epoch, index in epochs_and_indices]

    def _sample(self, epoch: int, index: int) -> Item:
        broken: dict[int, str] = {}
        first: tuple[int, ...] = ()
        while len(broken) <= min(self.max_broken, len(self) - 1):
            seed_sample(self.seed, epoch, index, *first)
            try:
                return self.dataset.sample(index), broken
            except BrokenImage as error:
                broken[index] = str(error)
                first = first or (index,)  # so that a substitute differs from the same image at its own place
                index = (index + 1) % len(self)
        return self.dataset.blank(), broken
