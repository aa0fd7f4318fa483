"""Transforms of images, and loaders whose samples do not depend on the number of processes or workers."""

import math
from io import BytesIO

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from util.data.decode import BrokenImage
from util.data.readers import Source, open_source
from util.data.transforms import PillowTransform
from util.data.uint8_transform import Uint8Transform
from util.files import printable
from util.seeding import preserve_generators, seed_sample


class ImageDataset(Dataset):
    """Images of a source: what the transform makes of them, and its numbers followed by the label.

    Args:
        source: encoded images.
        transform: content of an image file -> tensor, numbers; its `finish` makes images of a batch of them.
    """

    def __init__(self, source: Source, transform: PillowTransform | Uint8Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, list[float]]:
        """Return a sample; raise `BrokenImage` with the name of what cannot be read or decoded."""
        try:
            pixels, numbers = self.transform(self._read(index))
        except BrokenImage as error:
            raise BrokenImage(f"{self.source.name(index)}: {error}") from error
        return pixels, [*numbers, self.source.labels[index]]

    def _read(self, index: int) -> bytes:
        try:
            return self.source.read(index)
        except OSError as error:
            raise BrokenImage(error.strerror or printable(str(error))) from error

    def blank(self) -> tuple[Tensor, list[float]]:
        """A black sample with the label -1, in the place of a broken one."""
        file = BytesIO()
        Image.new("RGB", (1, 1)).save(file, "PNG")
        pixels, numbers = self.transform(file.getvalue())
        return pixels, [*numbers, -1]


def image_dataset(data_path: str, split: str, transform: transforms.Compose, loader: str) -> ImageDataset:
    """The images of `--data_path` as "fast" or "pil" loads them.

    Raises:
        UserError: the data is not there, or not of the form asked for.
    """
    return ImageDataset(open_source(data_path, split), pixels_by(loader, transform))


def pixels_by(loader: str, transform: transforms.Compose) -> PillowTransform | Uint8Transform:
    """A transform of the content of image files, carried out as "fast" or "pil" does."""
    return {"fast": Uint8Transform, "pil": PillowTransform}[loader](transform)


class SeededSamples(Dataset):
    """Draws the random transforms of a sample from (seed, epoch, index) alone.

    A sample then looks the same in whatever process, worker or batch it is drawn, so runs on any number of them see
    the same images. Items are asked for by (epoch, index), as `EpochSampler` yields them. An item is a sample and the
    broken images that stood in its place, by index; the next image that is not broken has taken it.

    Args:
        dataset: an `ImageDataset`.
        seed: of the run.
        max_broken: after so many and one in a row, a blank sample takes the place.
    """

    def __init__(self, dataset: ImageDataset, seed: int, max_broken: float = math.inf) -> None:
        self.dataset, self.seed, self.max_broken = dataset, seed, max_broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> tuple[tuple, dict[int, str]]:
        return self.__getitems__([epoch_and_index])[0]

    def __getitems__(self, epochs_and_indices: list[tuple[int, int]]) -> list[tuple[tuple, dict[int, str]]]:
        with preserve_generators():
            return [self._sample(epoch, index) for epoch, index in epochs_and_indices]

    def _sample(self, epoch: int, index: int) -> tuple[tuple, dict[int, str]]:
        broken, place = {}, ()
        while len(broken) <= min(self.max_broken, len(self) - 1):
            seed_sample(self.seed, epoch, index, *place)
            try:
                return self.dataset[index], broken
            except BrokenImage as error:
                broken[index] = str(error)
                place = place or (index,)  # what takes it looks different from where it has its own
                index = (index + 1) % len(self)
        return self.dataset.blank(), broken


class EverySample(Dataset):
    """Every sample as it is: nothing takes the place of a broken one, which is blank and has the label -1."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[tuple, dict[int, str]]:
        try:
            return self.dataset[index], {}
        except BrokenImage as error:
            return self.dataset.blank(), {index: str(error)}
