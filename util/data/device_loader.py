"""Batches on the training device: copied ahead on a side stream, finished there, broken images counted."""

import logging
import math
import re
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from util.distributed.processes import gather
from util.errors import RunError

LOGGER = logging.getLogger(__name__)

# messages of torch and the system about processes that load images -> what helps
REMEDIES = {
    "Bus error|shared memory|No space left on device": "/dev/shm is full: a smaller --num_workers or --batch_size "
    "needs less of it, --num_workers 0 none; or make it larger (docker run --shm-size=8g)",
    "Too many open files|ancdata": "a smaller --num_workers needs fewer files; or raise the limit (ulimit -n)",
    "killed by signal: Killed": "if memory has run out, a smaller --num_workers or --batch_size needs less",
}


class DeviceLoader:
    """Passes over a `DataLoader` whose batches are (pixels, numbers, broken images).

    Args:
        loader: its batches are a tensor; an array (B, n + 1) float64 of n numbers and the label for each image; and a
            dict of the broken images that were met, by their index in the data.
        finish: (tensor, (B, n) float64, device) -> images (B, 3, H, W) float32 on the device.
        device: where the batches go.
        max_broken: so many different broken images are left to the caller in one pass; one more ends the run.
        advice: what a user can do about them.
    """

    def __init__(
        self,
        loader: DataLoader,
        finish: Callable[..., Tensor],
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
    def sampler(self) -> Sampler:
        return self.loader.sampler

    def __iter__(self) -> Iterator[list[Tensor]]:
        """Batches of images (B, 3, H, W) float32 and labels (B,) int64, on the device.

        Raises:
            RunError: more than `max_broken` images are broken, or the workers lack memory or open files.
        """
        self.broken = {}
        if self.device.type == "cuda":
            yield from self._ahead()
        else:
            yield from map(self._to_device, self._loaded())

    def _loaded(self) -> Iterator[tuple[Tensor, np.ndarray, dict[int, str]]]:
        """Batches of the loader; what its processes lack ends the run with what helps."""
        try:
            yield from self.loader
        except (OSError, RuntimeError) as error:
            remedy = next((text for words, text in REMEDIES.items() if re.search(words, str(error))), None)
            if remedy is None:
                raise
            for frame, _ in traceback.walk_tb(error.__traceback__):
                unfinished = frame.f_locals.get("self")
                if hasattr(unfinished, "_shutdown_workers"):  # torch's iterator: its __del__ would print a traceback
                    unfinished._shutdown = True
            raise RunError(f"{str(error).splitlines()[-1]}; {remedy}") from error

    def _to_device(self, batch: tuple[Tensor, np.ndarray, dict[int, str]]) -> list[Tensor]:
        pixels, numbers, broken = batch
        for index in broken.keys() - self.broken.keys():
            LOGGER.error("broken image: %s", broken[index])
        self.broken |= broken
        self._listed(self.broken)
        numbers = torch.from_numpy(numbers)
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        labels = numbers.to(self.device, non_blocking=True)[:, -1].long()
        return [self.finish(pixels, numbers[:, :-1], self.device), labels]

    def _ahead(self) -> Iterator[list[Tensor]]:
        """Copy and finish each batch on a side stream, while the device is still at the step before it."""
        stream, training = _side_stream(self.device), torch.cuda.current_stream(self.device)
        batches = self._loaded()
        while True:
            with torch.cuda.stream(stream):
                batch = next(map(self._to_device, batches), None)
            if batch is None:
                return
            training.wait_stream(stream)
            for tensor in batch:
                tensor.record_stream(training)  # its memory is not given to a later batch before training has read it
            yield batch

    def names(self, places: list[int]) -> list[str]:
        """Names of the samples at these places of a pass of this process, where the sampler yields indices."""
        order, source = list(self.sampler), self.loader.dataset.dataset.source
        return [source.name(order[place]) for place in places]

    def again(self, epoch: int, first: int, count: int) -> list[list[Tensor]]:
        """Batches of an epoch once more, from the given one on, loaded by this process itself."""
        self.sampler.set_epoch(epoch, first * self.loader.batch_size)
        size = self.loader.batch_size
        indices = list(islice(self.sampler, count * size))
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        return [self._to_device(self.loader.collate_fn(self.loader.dataset.__getitems__(part))) for part in parts]

    def _listed(self, broken: dict[int, str]) -> str:
        text = listed([broken[index] for index in sorted(broken)])
        if len(broken) > self.max_broken:
            raise RunError(f"{text}\n{self.advice}")
        return text

    def report(self, say: Callable[[str], None]) -> None:
        """Say which images the last pass met broken on any process; every process calls it.

        Raises:
            RunError: together they are more than `max_broken`.
        """
        broken = {index: name for share in gather(self.broken) for index, name in share.items()}
        text = self._listed(broken)
        if broken:
            say(f"{text}\nthey were skipped; the image after each took its place")


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all passes: freed memory is kept for the stream that it was used on


def allowed_broken(asked: int | None, images: int) -> int:
    """How many broken images of so many a run puts up with: `--max_bad_samples`, else 0.1 %."""
    return images // 1000 if asked is None else asked


def listed(broken: list[str]) -> str:
    """The number of broken images and a line for each."""
    return "\n  ".join([f"{len(broken)} broken images:", *broken])
