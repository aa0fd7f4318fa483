"""Seeds of the random number generators: of a process, and of one training sample."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from util.distributed.processes import rank


def seed_everything(*entropy: int, of_rank: int | None = None) -> None:
    """Seed every generator of this process, differently on every rank (drop path and mixup differ)."""
    key = (rank() if of_rank is None else of_rank,)
    words = np.random.SeedSequence(entropy, spawn_key=key).generate_state(3)
    # not torch.manual_seed, which takes ten times as long to find out which devices there are
    torch.default_generator.manual_seed(int(words[0]))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(words[0]))
    np.random.seed(words[1])
    random.seed(int(words[2]))


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Put back the state of the three generators that transforms draw from."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def seed_sample(*entropy: int) -> None:
    """Seed the three generators that transforms draw from."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # not torch.manual_seed, which also queues a seed for every GPU
    torch.default_generator.manual_seed(int(words[2]) << 31 | int(words[3]) >> 1)
