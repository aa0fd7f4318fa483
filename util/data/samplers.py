"""Samplers: the samples that each process sees, and their order."""

from collections.abc import Iterator, Sized
from itertools import islice

from torch.utils.data import Dataset, DistributedSampler, Sampler

from util.distributed.processes import rank, world_size


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
