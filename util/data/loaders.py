"""Loaders and samplers whose samples do not depend on the number of processes or workers."""

import argparse
import math
import os
import signal
import threading
from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from util.data.datasets import PREFETCH, Batches, Item, Samples, SeededSamples
from util.data.device_loader import Batch, DeviceLoader, allowed_broken, too_many_broken
from util.distributed.processes import rank, world_size
from util.distributed.signals import SIGNALS
from util.errors import UserError
from util.hardware import keep_freed_memory


class EpochSampler(DistributedSampler):
    """Yield this rank's share of a new permutation each epoch, as pairs (epoch, index); the shares are disjoint."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        super().__init__(dataset, num_replicas=world_size(), rank=rank(), shuffle=True, seed=seed, drop_last=True)
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the number of this rank's samples to skip because they have been seen already."""
        super().set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in islice(super().__iter__(), self.start, None))


class ShareSampler(Sampler):
    """Yield every n-th index in order; together the ranks yield each index exactly once.

    Args:
        dataset: its length is the number of indices.
        distributed: share the indices among the ranks; otherwise each rank yields all of them.
    """

    def __init__(self, dataset: Sized, distributed: bool) -> None:
        self.distributed = distributed
        self.indices = range(rank(), len(dataset), world_size()) if distributed else range(len(dataset))

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class ChunkSampler(Sampler):
    """Yield every n-th chunk of consecutive indices; together the ranks yield each index exactly once.

    Args:
        images: number of indices.
        size: of a chunk; the last one may be smaller.

    Attributes:
        common: number of chunks that every rank has at least.
    """

    def __init__(self, images: int, size: int) -> None:
        chunks = [list(range(start, min(start + size, images))) for start in range(0, images, size)]
        self.chunks, self.common = chunks[rank() :: world_size()], len(chunks) // world_size()

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.chunks)


class Collate:
    """Collate samples by `collate` of their dataset, and merge {index: reason} of the broken images that were met."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __call__(self, items: list[Item]) -> Batch:
        samples, broken = zip(*items, strict=True)
        return self.batches.collate(samples), {index: reason for found in broken for index, reason in found.items()}


def _begin_worker(_: int) -> None:
    """Prepare a process that loads images."""
    keep_freed_memory(2**25)  # the training process keeps more, which a worker would need for its largest image only
    _ignore_signals()


def _ignore_signals() -> None:
    """Let a worker survive signals to all processes: its death would end the run before the checkpoint is written."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who has sent a signal: a worker obeys everybody
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # obeyed below if the parent sends it
    parent = os.getppid()

    def obey_parent() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


def _loader_options(batches: Batches, args: argparse.Namespace, device: torch.device, workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "timeout": args.worker_timeout if workers > 0 else 0,
        "prefetch_factor": PREFETCH if workers > 0 else None,
        "worker_init_fn": _begin_worker,
        "collate_fn": Collate(batches),
    }


def _lasting(batches: Batches, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the options of a loader with batches of `args.batch_size`, whose workers live as long as it."""
    more = {"batch_size": args.batch_size, "persistent_workers": args.num_workers > 0}
    return _loader_options(batches, args, device, args.num_workers) | more


def train_loader(dataset: Samples, args: argparse.Namespace, device: torch.device) -> DeviceLoader:
    """Return a loader of shuffled batches, `args.batch_size` images per process, without the incomplete last one.

    Raises UserError if there are not enough images for `args.accum_iter` batches on every process.
    """
    max_broken = min(allowed_broken(args.max_bad_samples, len(dataset)), len(dataset) - 1)
    samples = SeededSamples(dataset, args.seed, max_broken)
    sampler = EpochSampler(samples, args.seed)
    loader = DataLoader(samples, sampler=sampler, drop_last=True, **_lasting(dataset, args, device))
    if len(loader) < args.accum_iter:
        raise UserError(
            f"{len(dataset)} training images do not fill one update: batch size {args.batch_size} x {world_size()} "
            f"processes x {args.accum_iter} accumulated batches"
        )
    advice = too_many_broken(max_broken, len(dataset))
    return DeviceLoader(loader, dataset.finish, device, max_broken, advice)


def eval_loader(dataset: Samples, args: argparse.Namespace, device: torch.device) -> DeviceLoader:
    """Return a loader of every sample once, in order: shared by all processes with `args.dist_eval`, else on each.

    The label of a broken image is -1, unless `args.eval_bad` ends the run, as it does where there is no choice (None).
    """
    loader: DataLoader = DataLoader(
        cast(Dataset, dataset), sampler=ShareSampler(dataset, args.dist_eval), **_lasting(dataset, args, device)
    )
    max_broken = math.inf if args.eval_bad == "wrong" else 0
    advice = "repair or remove it" + ", or count it as wrong with --eval_bad wrong" * (args.eval_bad is not None)
    return DeviceLoader(loader, dataset.finish, device, max_broken, advice)


def chunk_loader(
    dataset: Any, batches: Batches, args: argparse.Namespace, device: torch.device, size: int
) -> DeviceLoader:
    """Return a loader of every sample once, whose batches do not depend on the number of processes: see `ChunkSampler`.

    Its workers end with each pass. The label of a broken image is -1.

    Args:
        dataset: an `ImageDataset`, or parts of some.
        batches: makes batches of its samples.
        args: see `arguments.add_machine_arguments`.
        device: of the batches.
        size: images of a batch.
    """
    sampler = ChunkSampler(len(dataset), size)
    options = _loader_options(batches, args, device, min(args.num_workers, len(sampler)))
    return DeviceLoader(DataLoader(dataset, batch_sampler=sampler, **options), batches.finish, device)
