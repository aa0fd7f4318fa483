"""Transforms of images, and loaders whose samples do not depend on the number of processes or workers."""

import argparse
import math
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import islice

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, get_worker_info
from torchvision import transforms

from util import decode
from util.augment import Uint8Transform, check_resized
from util.decode import BrokenImage
from util.device_loader import DeviceLoader, allowed_broken
from util.dist import rank, world_size
from util.errors import UserError
from util.files import printable
from util.interrupt import SIGNALS
from util.sources import Source, open_source

NORMALIZE = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
BICUBIC = transforms.InterpolationMode.BICUBIC
PREFETCH = 2  # batches that each worker makes ahead


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
        with _generators_kept():
            return [self._sample(epoch, index) for epoch, index in epochs_and_indices]

    def _sample(self, epoch: int, index: int) -> tuple[tuple, dict[int, str]]:
        broken, place = {}, ()
        while len(broken) <= min(self.max_broken, len(self) - 1):
            _seed_generators(self.seed, epoch, index, *place)
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


class Batches:
    """Makes a batch of samples, in memory that is shared with the training process and used over and over.

    A page fault for every 4 KiB of fresh shared memory would take a tenth of the time of an image. A worker works
    ahead by `PREFETCH` batches; the one before those has been finished with when the training process asks for more.
    """

    def __init__(self) -> None:
        self.memory: list[Tensor] = []

    def __call__(
        self, items: list[tuple[tuple[Tensor, list[float]], dict[int, str]]]
    ) -> tuple[Tensor, np.ndarray, dict[int, str]]:
        samples, broken = zip(*items, strict=True)
        pixels, numbers = zip(*samples, strict=True)
        # an array of few numbers travels faster from a worker than a tensor, whose memory is shared by a handshake
        return (
            torch.stack(pixels, out=self._memory(pixels[0], len(pixels))),
            np.array(numbers, dtype=np.float64),
            {index: name for found in broken for index, name in found.items()},
        )

    def _memory(self, sample: Tensor, count: int) -> Tensor | None:
        if get_worker_info() is None:
            return None
        memory = self.memory.pop(0) if len(self.memory) > PREFETCH else None
        if memory is None or memory.shape[1:] != sample.shape or len(memory) < count:
            memory = torch.empty(count, *sample.shape, dtype=sample.dtype).share_memory_()
        self.memory.append(memory)
        return memory[:count]


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put back the state of the three generators that transforms draw from."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _seed_generators(*entropy: int) -> None:
    """Seed the three generators that transforms draw from."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # not torch.manual_seed, which also queues a seed for every GPU
    torch.default_generator.manual_seed(int(words[2]) << 31 | int(words[3]) >> 1)


class EpochSampler(DistributedSampler):
    """This rank's share of a new permutation each epoch, as pairs (epoch, index); no image is in two shares."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        super().__init__(dataset, num_replicas=world_size(), rank=rank(), shuffle=True, seed=seed, drop_last=True)
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the next pass: the epoch, and how many samples of this rank have been seen of it already."""
        super().set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in islice(super().__iter__(), self.start, None))


class ShareSampler(Sampler):
    """Every n-th sample in order, nothing repeated: the shares of all ranks hold each sample exactly once."""

    def __init__(self, dataset: Dataset, distributed: bool) -> None:
        self.distributed = distributed
        self.indices = range(rank(), len(dataset), world_size()) if distributed else range(len(dataset))

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def _leave_signals_to_the_run(_: int) -> None:
    """A worker that went at a signal to all processes would end the run before it has written its checkpoint."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # for this one it matters who sends it
    parent = os.getppid()

    def obey_parent() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


def _loading(args: argparse.Namespace, device: torch.device) -> dict:
    return {
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "persistent_workers": args.num_workers > 0,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "timeout": args.worker_timeout if args.num_workers > 0 else 0,
        "prefetch_factor": PREFETCH if args.num_workers > 0 else None,
        "worker_init_fn": _leave_signals_to_the_run,
        "collate_fn": Batches(),
    }


def train_loader(dataset: ImageDataset, args: argparse.Namespace, device: torch.device) -> DeviceLoader:
    """Shuffled batches of `args.batch_size` a process; the incomplete last one is left out.

    Raises:
        UserError: the data does not fill `args.accum_iter` batches on every process.
    """
    max_broken = min(allowed_broken(args.max_bad_samples, len(dataset)), len(dataset) - 1)
    samples = SeededSamples(dataset, args.seed, max_broken)
    sampler = EpochSampler(samples, args.seed)
    loader = DataLoader(samples, sampler=sampler, drop_last=True, **_loading(args, device))
    if len(loader) < args.accum_iter:
        raise UserError(
            f"{len(dataset)} training images do not fill one update: batch size {args.batch_size} x {world_size()} "
            f"processes x {args.accum_iter} accumulated batches"
        )
    advice = f"these are more than {max_broken} of {len(dataset)}: mend or remove them, or raise --max_bad_samples"
    return DeviceLoader(loader, dataset.transform.finish, device, max_broken, advice)


def eval_loader(dataset: ImageDataset, args: argparse.Namespace, device: torch.device) -> DeviceLoader:
    """Batches in order, every sample once, over all processes with `args.dist_eval`, else on each of them.

    The label of a broken image is -1, where `args.eval_bad` does not end the run.
    """
    samples = EverySample(dataset)
    loader = DataLoader(samples, sampler=ShareSampler(samples, args.dist_eval), **_loading(args, device))
    max_broken = 0 if args.eval_bad == "stop" else math.inf
    advice = "mend or remove it, or say --eval_bad wrong to count it as wrong"
    return DeviceLoader(loader, dataset.transform.finish, device, max_broken, advice)
