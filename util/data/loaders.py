"""Loaders whose samples do not depend on the number of processes or workers."""

import argparse
import math
import os
import signal
import threading

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from util.data.datasets import EverySample, ImageDataset, SeededSamples
from util.data.device_loader import DeviceLoader, allowed_broken
from util.data.samplers import EpochSampler, ShareSampler
from util.distributed.processes import world_size
from util.distributed.signals import SIGNALS
from util.errors import UserError

PREFETCH = 2  # batches that each worker makes ahead


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
