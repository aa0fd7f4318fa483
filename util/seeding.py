"""Seed the random number generators of a process, or for one training sample."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from util.distributed.processes import rank


def seed_everything(*entropy: int, of_rank: int | None = None) -> None:
    """Seed every generator of this process, differently on every rank, for drop path and mixup."""
    key = (rank() if of_rank is None else of_rank,)
    for_torch, for_numpy, for_python = np.random.SeedSequence(entropy, spawn_key=key).generate_state(3)
    _seed_generators(for_python, for_numpy, int(for_torch))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(for_torch))


def seed_sample(*entropy: int) -> None:
    """Seed the three generators that transforms draw from."""
    for_python, for_numpy, high, low = np.random.SeedSequence(entropy).generate_state(4)
    _seed_generators(for_python, for_numpy, int(high) << 31 | int(low) >> 1)


def _seed_generators(for_python: np.uint32, for_numpy: np.uint32, for_torch: int) -> None:
    random.seed(int(for_python))
    np.random.seed(for_numpy)
    # not torch.manual_seed, which first looks for devices and also queues a seed for every GPU: ten times slower
    torch.default_generator.manual_seed(for_torch)


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Restore the state of the three generators that transforms draw from."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
