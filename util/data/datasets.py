"""Datasets: decoded, transformed and labelled images, and what takes the place of broken ones."""

import logging
import math
from functools import cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

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

Sample = tuple[Tensor, list[float]]  # pixels; the numbers of the transform, followed by the label
Item = tuple[Sample, dict[int, str]]  # a sample, and {index: reason} of the broken images that were met


class ImageDataset(Dataset):
    """Images of a source after a transform; a broken image becomes a blank sample with the label -1.

    Args:
        source: encoded images and their labels.
        transform: content of an image file -> (pixels, numbers); its `finish` turns a batch of both into images.
    """

    def __init__(self, source: Source, transform: PillowTransform | Uint8Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> Item:
        try:
            return self.sample(index), {}
        except BrokenImage as error:
            return self.blank(), {index: str(error)}

    def sample(self, index: int) -> Sample:
        """Return a sample; raise `BrokenImage`, which names the image, if it cannot be read or decoded."""
        try:
            pixels, numbers = self.transform(self.source.read(index))
        except (BrokenImage, OSError) as error:
            reason = getattr(error, "strerror", None) or printable(str(error))
            raise BrokenImage(f"{self.source.name(index)}: {reason}") from error
        return pixels, [*numbers, self.source.labels[index]]

    def blank(self) -> Sample:
        """Return a black sample with the label -1, in place of a broken one."""
        pixels, numbers = self.transform(arrays.blank(self.transform.pixels))
        return pixels, [*numbers, -1]


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

    def __init__(self, dataset: ImageDataset, seed: int, max_broken: float = math.inf) -> None:
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
