"""Batches on the training device: copied ahead on a side stream, finished there, with broken images counted."""

import logging
import math
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from util.distributed.processes import gather
from util.errors import RunError

LOGGER = logging.getLogger(__name__)

# error messages of torch and the system about worker processes -> the remedy
REMEDIES = {
    "Bus error|shared memory|No space left on device": "/dev/shm is full: use a smaller --num_workers or --batch_size, "
    "or --num_workers 0, which needs none of it; or make it larger (docker run --shm-size=8g)",
    "Too many open files|ancdata": "use a smaller --num_workers, or raise the limit (ulimit -n)",
    "killed by signal: Killed": "if memory ran out, use a smaller --num_workers or --batch_size",
}

Batch = tuple[Any, dict[int, str]]  # of a worker: what `finish` takes, and {index: reason} of the broken images


class DeviceLoader:
    """Iterate over a `DataLoader` and deliver its batches on the training device.

    Args:
        loader: its batches are pairs: what `finish` takes, and {index: reason} of the broken images that were met.
        finish: (batch, device) -> the batch on the device, see `Batches.finish`.
        device: of the batches.
        max_broken: largest number of different broken images in one pass; one more ends the run.
        advice: the remedy that the message then names.
    """

    def __init__(
        self,
        loader: DataLoader,
        finish: Callable[[Any, torch.device], list[Any]],
        device: torch.device,
        max_broken: float = math.inf,
        advice: str = "",
    ) -> None:
        self.loader, self.finish, self.device = loader, finish, device
        self.max_broken, self.advice = max_broken, advice
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self) -> Any:
        """The sampler of the `DataLoader`: an `EpochSampler` in training, a `ShareSampler` in evaluation."""
        return self.loader.sampler

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield batches on the device.

        Raises:
            RunError: more than `max_broken` images are broken, or the workers lack memory or open files.
        """
        self.broken = {}
        if self.device.type == "cuda":
            yield from self._ahead()
        else:
            yield from map(self._to_device, self._loaded())

    def _loaded(self) -> Iterator[Batch]:
        """Yield the batches of the loader; raise RunError with a remedy if its processes lack a resource."""
        try:
            yield from self.loader
        except (OSError, RuntimeError) as error:
            remedy = next((text for words, text in REMEDIES.items() if re.search(words, str(error))), None)
            if remedy is None:
                raise
            for frame, _ in traceback.walk_tb(error.__traceback__):
                iterator: Any = frame.f_locals.get("self")
                if hasattr(iterator, "_shutdown_workers"):  # torch's iterator: its __del__ would print a traceback
                    iterator._shutdown = True
            raise RunError(f"{str(error).splitlines()[-1]}; {remedy}") from error

    def _to_device(self, batch: Batch) -> list[Any]:
        samples, broken = batch
        for index in broken.keys() - self.broken.keys():
            LOGGER.error("broken image: %s", broken[index])
        self.broken |= broken
        self._checked_list(self.broken)
        return self.finish(samples, self.device)

    def _ahead(self) -> Iterator[list[Any]]:
        """Copy and finish each batch on a side stream while the device computes the step before it."""
        stream, training = _side_stream(self.device), torch.cuda.current_stream(self.device)
        batches = self._loaded()
        while True:
            with torch.cuda.stream(stream):
                batch = next(map(self._to_device, batches), None)
            if batch is None:
                return
            training.wait_stream(stream)
            for tensor in tensors_in(batch):
                tensor.record_stream(training)  # its memory is not reused for a later batch before training has read it
            yield batch

    def names(self, places: Sequence[int]) -> list[str]:
        """Return the names of the samples at these places in a pass of this process; for a `ShareSampler`."""
        dataset: Any = self.loader.dataset
        order = list(self.sampler)
        return [dataset.source.name(order[place]) for place in places]

    def again(self, epoch: int, first: int, count: int) -> list[list[Any]]:
        """Load `count` batches of an epoch once more, from the given one on, in this process."""
        loader: Any = self.loader  # torch's types do not tell which dataset it has
        size = loader.batch_size
        self.sampler.set_epoch(epoch, first * size)
        indices = list(islice(self.sampler, count * size))
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        return [self._to_device(loader.collate_fn(loader.dataset.__getitems__(part))) for part in parts]

    def _checked_list(self, broken: dict[int, str]) -> str:
        text = list_broken([broken[index] for index in sorted(broken)])
        if len(broken) > self.max_broken:
            raise RunError(f"{text}\n{self.advice}")
        return text

    def report(self, say: Callable[[str], None]) -> None:
        """Report the broken images that any process met in the last pass; raise RunError for more than `max_broken`.

        Every process must call it.
        """
        broken = {index: reason for share in gather(self.broken) for index, reason in share.items()}
        text = self._checked_list(broken)
        if broken:
            say(f"{text}\nthey were skipped; the image after each took its place")


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all passes: freed memory is kept for the stream that used it


def allowed_broken(limit: int | None, images: int) -> int:
    """Return how many of the images may be broken: `--max_bad_samples`, by default 0.1 %."""
    return images // 1000 if limit is None else limit


def too_many_broken(allowed: int, images: int) -> str:
    """Return the message for training data with too many broken images."""
    few = " (by default 1 in 1000)" if images < 1000 and not allowed else ""
    return f"these are more than {allowed} of {images}{few}: repair or remove them, or raise --max_bad_samples"


def list_broken(reasons: list[str]) -> str:
    """Return the number of broken images and a line for each."""
    return "\n  ".join([f"{len(reasons)} broken images:", *reasons])
