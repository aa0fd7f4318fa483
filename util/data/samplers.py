"""Which samples each process sees, and in which order."""

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import Dataset, DistributedSampler, Sampler

from util.distributed.processes import rank, world_size


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
