"""Image folders, their transforms, and loaders whose samples do not depend on the number of processes or workers."""

import argparse
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from util.dist import rank, world_size
from util.errors import UserError

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


def eval_transform(size: tuple[int, int], resize: str) -> Callable:
    """Resize and centre crop, bicubic: image -> (3, H, W) float32.

    Args:
        size: height and width of the input. Up to 224 pixels the crop is 0.875 of the resized image; larger inputs
            are not cropped.
        resize: "square" resizes to (H, W) / 0.875 whatever the aspect ratio, as the released finetuning code does;
            "shorter" keeps the aspect ratio and resizes the shorter side, as MAE does.
    """
    crop_ratio = 224 / 256 if max(size) <= 224 else 1.0
    resized = [int(side / crop_ratio) for side in size]
    if resize == "shorter":
        # the shorter side of an image is laid onto the longer side of the input, so that the crop always fits
        resized = max(resized)
    return transforms.Compose(
        [transforms.Resize(resized, BICUBIC), transforms.CenterCrop(size), transforms.ToTensor(), NORMALIZE]
    )


def image_folder(data_path: str, split: str, transform: Callable) -> ImageFolder:
    """The folder `data_path/split` with one folder of images a class.

    Raises:
        UserError: the folder or the split is missing, holds no class, or a class holds no image.
    """
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data_path {data_path}: no such folder")
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"--data_path {data_path}: there is no folder {split!r} in it")
    try:
        return ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {error}") from error


class SeededSamples(Dataset):
    """Draws the random transforms of a sample from (seed, epoch, index) alone.

    A sample then looks the same in whatever process, worker or batch it is drawn, so runs on any number of them see
    the same images. Items are asked for by (epoch, index), as `EpochSampler` yields them.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> tuple:
        epoch, index = epoch_and_index
        with _generators_seeded(self.seed, epoch, index):
            return self.dataset[index]


@contextmanager
def _generators_seeded(*entropy: int) -> Iterator[None]:
    """Seed the three generators that transforms draw from, and put back their state afterwards."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # not torch.manual_seed, which also queues a seed for every GPU
    torch.default_generator.manual_seed(int(words[2]) << 31 | int(words[3]) >> 1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class EpochSampler(DistributedSampler):
    """This rank's share of a new permutation each epoch, as pairs (epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        super().__init__(dataset, num_replicas=world_size(), rank=rank(), shuffle=True, seed=seed)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


class ShareSampler(Sampler):
    """Every n-th sample in order, nothing repeated: the shares of all ranks hold each sample exactly once."""

    def __init__(self, dataset: Dataset, distributed: bool) -> None:
        self.distributed = distributed
        self.indices = range(rank(), len(dataset), world_size()) if distributed else range(len(dataset))

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def _loading(args: argparse.Namespace, device: torch.device) -> dict:
    return {
        "num_workers": args.num_workers,
        "persistent_workers": args.num_workers > 0,
        "pin_memory": args.pin_mem and device.type == "cuda",
    }


def train_loader(dataset: Dataset, args: argparse.Namespace, device: torch.device) -> DataLoader:
    """Shuffled batches of `args.batch_size` a process; the incomplete last one is left out.

    Raises:
        UserError: the data does not fill `args.accum_iter` batches on every process.
    """
    dataset = SeededSamples(dataset, args.seed)
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=EpochSampler(dataset, args.seed),
        drop_last=True,
        **_loading(args, device),
    )
    if len(loader) < args.accum_iter:
        raise UserError(
            f"{len(dataset)} training images do not fill one update: batch size {args.batch_size} x {world_size()} "
            f"processes x {args.accum_iter} accumulated batches"
        )
    return loader


def eval_loader(dataset: Dataset, args: argparse.Namespace, device: torch.device) -> DataLoader:
    """Batches in order, every sample once, over all processes with `args.dist_eval`, else on each of them."""
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=ShareSampler(dataset, args.dist_eval),
        **_loading(args, device),
    )
