"""The processes of a run, alone or started by torchrun, one device each, and how they communicate."""

import datetime
import os
import pickle
import re
import time
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from util.errors import UserError, as_user_error
from util.hardware import keep_freed_memory

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process among all of the run; raises UserError."""
    return _from_environment("RANK", 0)


def world_size() -> int:
    """Return the number of processes of the run; raises UserError."""
    return _from_environment("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the number of this process among those of this machine; raises UserError."""
    return _from_environment("LOCAL_RANK", 0)


def is_main() -> bool:
    """Return whether this process is rank 0; raises UserError."""
    return rank() == 0


def _from_environment(variable: str, least: int) -> int:
    """Read a number that torchrun sets, else the least one; raise UserError, which names the variable, for any text."""
    text = os.environ.get(variable, str(least))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(
            f"the environment variable {variable} is {text!r}, not an integer of at least {least}: unset it, or start "
            "with torchrun, which sets it"
        )
    return int(text)


def check_one_machine() -> None:
    """Raise UserError if the run has processes on several machines; for scripts whose processes share a file."""
    if world_size() != _from_environment("LOCAL_WORLD_SIZE", 1):
        raise UserError("the processes share a file: run all of them on one machine")


def init_device(name: str | None, timeout: float = 600, deterministic: bool = False) -> torch.device:
    """Return the device of this process; create the process groups if torchrun started several processes.

    Args:
        name: "cuda", "cpu" or, for a single process, "cuda:i"; None takes CUDA if there is a GPU, else the CPU.
        timeout: of collectives, in seconds.
        deterministic: use deterministic algorithms, which are slower.

    Raises:
        UserError: no such device, or fewer GPUs than processes on this machine.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        why = "; Apple's GPUs do not compute float64, which training needs" * name.startswith("mps")
        raise UserError(f"--device {name}: cuda and cpu are supported{why}")
    kind, _, index = name.partition(":")
    device = torch.device(kind)
    if kind == "cuda":
        gpus, processes = torch.cuda.device_count(), _from_environment("LOCAL_WORLD_SIZE", 1)
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: this torch finds no GPU; leave --device out to train on the CPU")
        if processes > gpus:
            raise UserError(f"{processes} processes, but {gpus} GPUs on this machine")
        if index and (processes > 1 or index not in map(str, range(gpus))):  # torch.device takes 999 as 65511
            raise UserError(f"--device {name}: {processes} processes, {gpus} GPUs; under torchrun say --device cuda")
        device = torch.device(kind, int(index) if index else local_rank())
        torch.cuda.set_device(device)
        torch.cuda.init()
        torch.set_float32_matmul_precision("high")  # TF32 where float32 products remain
    else:
        keep_freed_memory()
    if world_size() > 1:
        _init_groups("nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout))
    return device


_STORE: dist.Store | None = None
_CONTROL: dist.ProcessGroup | None = None


def _init_groups(backend: str, timeout: datetime.timedelta) -> None:
    """Create the group for training, and one on the CPUs for messages that must not wait for a GPU."""
    global _STORE, _CONTROL
    with as_user_error(ValueError, prefix="WORLD_SIZE is set, but not all that torchrun sets: "):
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    _STORE = dist.PrefixStore(_meet(store, time.monotonic() + timeout.total_seconds()), store)
    # The CPUs' group must time out first, and say which process is stuck: NCCL's watchdog ends processes silently.
    later = timeout + datetime.timedelta(seconds=60 if backend == "nccl" else 0)
    dist.init_process_group(backend, store=_STORE, rank=rank(), world_size=world_size(), timeout=later)
    _CONTROL = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))  # every rank is a member


def end_groups() -> None:
    """Destroy the process groups. Not for use after an error: it waits for processes that may have ended.

    Every process must call it before Python ends: a thread of gloo that frees a tensor later aborts the process.
    """
    global _STORE, _CONTROL
    if dist.is_initialized():
        _STORE = _CONTROL = None  # a group's threads end with the last reference to it
        dist.destroy_process_group()


def _meet(store: dist.Store, deadline: float) -> str:
    """Return a prefix for keys of the store that only the processes of this start use.

    torchrun's store outlives the processes that torchrun restarts, and still holds their dead addresses. So rank 0
    opens a new round, and announces it as complete once all processes have joined. A process that joined an older
    round moves to the new one.

    Raises:
        RuntimeError: not all processes have joined by the deadline, a time of `time.monotonic`.
    """
    joined = 0
    while time.monotonic() < deadline:
        if not joined and is_main():
            joined = store.add("rounds", 1)
            store.add(f"round {joined}", 1)
        elif not is_main() and store.add("rounds", 0) > joined:
            joined = store.add("rounds", 0)
            store.add(f"round {joined}", 1)
        if joined and store.add(f"round {joined}", 0) == world_size():  # a round of an earlier start has more
            if is_main():
                store.set(f"round {joined} is complete", "")
            if store.check([f"round {joined} is complete"]):
                return f"round {joined}"
        time.sleep(0.05)
    raise RuntimeError(f"timed out: {store.add(f'round {joined}', 0)} of {world_size()} processes have come")


def control_group() -> dist.ProcessGroup | None:
    """Return the group of all processes on their CPUs; None stands for torch's default group."""
    return _CONTROL


def _store() -> dist.Store:
    if _STORE is None:
        raise RuntimeError("call init_device first")
    return _STORE


def missing_ranks(wait: float = 5) -> list[int]:
    """Return the ranks that reported no timeout within `wait` seconds. Every rank that met a timeout calls it."""
    store, end = _store(), time.monotonic() + wait
    store.set(f"gave up/{rank()}", "")
    while True:
        missing = [r for r in range(world_size()) if not store.check([f"gave up/{r}"])]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.2)


def on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 only; every rank returns its result, or raises its `UserError`."""
    if world_size() == 1:
        return function()
    outcome: list = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, group=_CONTROL)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier(_CONTROL)


def reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, element by element and in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_rows(values: Tensor) -> Tensor:
    """Return the rows of all ranks, rank after rank, on every rank: (n, m) with any n on each -> (sum of n, m)."""
    if world_size() == 1:
        return values
    counts = gather(len(values))
    content = values.contiguous().view(torch.uint8)  # not every backend sends every type of number
    padded = content.new_zeros(max(counts), content.shape[1])
    padded[: len(content)] = content
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).view(values.dtype)


def gather_late(value: T) -> list[T]:
    """Return the values of all ranks, in order: an all-gather without timeout, for ranks that finish far apart.

    All processes must call it equally often. If one dies, torchrun ends the others. Values are pickled.
    """
    if world_size() == 1:
        return [value]
    store = _store()
    key = f"late {store.add(f'calls of {rank()}', 1)} of "
    store.set(f"{key}{rank()}", pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes, too
    while not store.check([f"{key}{r}" for r in range(world_size())]):
        time.sleep(0.1)
    return [pickle.loads(store.get(f"{key}{r}")) for r in range(world_size())]


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in order; values are pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=_CONTROL)
    return values
