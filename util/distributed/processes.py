"""Processes: started by torchrun or alone, one device each."""

import datetime
import os
import pickle
import re
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from util.errors import UserError, as_user_error

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def init_device(name: str | None, timeout: float = 600, deterministic: bool = False) -> torch.device:
    """The device of this process, and the process group when torchrun started several.

    Args:
        name: "cuda", "cpu" or, for a single process, "cuda:i"; None takes CUDA where there is a GPU, else the CPU.
        timeout: seconds that a process waits for the others before it ends the run.
        deterministic: take algorithms that give equal results in every run, at the cost of speed.

    Raises:
        UserError: no such device, or fewer GPUs than processes on this machine.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise UserError(f"--device {name}: cuda and cpu are supported")
    kind, _, index = name.partition(":")
    device = torch.device(kind)
    if kind == "cuda":
        gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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
    if world_size() > 1:
        _init_groups("nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout))
    return device


_STORE: dist.Store | None = None
_CONTROL: dist.ProcessGroup | None = None


def _init_groups(backend: str, timeout: datetime.timedelta) -> None:
    """The group that trains, and one on the CPUs for what must not wait for a GPU."""
    global _STORE, _CONTROL
    with as_user_error(ValueError, prefix="WORLD_SIZE is set, but not all that torchrun sets: "):
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    _STORE = dist.PrefixStore(_meet(store, time.monotonic() + timeout.total_seconds()), store)
    # the CPUs' group finds a process that is stuck; it has to do so before NCCL's watchdog ends the others wordlessly
    later = timeout + datetime.timedelta(seconds=60 if backend == "nccl" else 0)
    dist.init_process_group(backend, store=_STORE, rank=rank(), world_size=world_size(), timeout=later)
    _CONTROL = dist.new_group(backend="gloo", timeout=timeout)


def end_groups() -> None:
    """Leave the other processes; not after an error, since it waits for some that may be gone.

    Every process has to before Python ends: a thread of gloo that gives back a tensor after that aborts it.
    """
    global _STORE, _CONTROL
    if dist.is_initialized():
        _STORE = _CONTROL = None  # a group's threads end with the last that knows it
        dist.destroy_process_group()


def _meet(store: dist.Store, deadline: float) -> str:
    """A prefix that the processes of this start alone have.

    torchrun's store outlives the processes that it restarts, and what they have left there are dead addresses. So rank
    0 opens a new round, and when all have joined it, says so; who joined an older one goes on to the next.

    Raises:
        RuntimeError: they have not all come by the deadline, of `time.monotonic`.
    """
    joined = 0
    while time.monotonic() < deadline:
        if not joined and is_main():
            joined = store.add("rounds", 1)
            store.add(f"round {joined}", 1)
        elif not is_main() and store.add("rounds", 0) > joined:
            joined = store.add("rounds", 0)
            store.add(f"round {joined}", 1)
        if joined and store.add(f"round {joined}", 0) == world_size():  # and not more: an old one that was complete
            if is_main():
                store.set(f"round {joined} is complete", "")
            if store.check([f"round {joined} is complete"]):
                return f"round {joined}"
        time.sleep(0.05)
    raise RuntimeError(f"timed out: {store.add(f'round {joined}', 0)} of {world_size()} processes have come")


def control_group() -> dist.ProcessGroup:
    """The group of all processes on their CPUs."""
    return _CONTROL


def missing_ranks(wait: float = 5) -> list[int]:
    """The processes that do not say within `wait` seconds that they, too, have given up waiting; all that have ask."""
    _STORE.set(f"gave up/{rank()}", "")
    end = time.monotonic() + wait
    while True:
        missing = [r for r in range(world_size()) if not _STORE.check([f"gave up/{r}"])]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.2)


def on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone; every rank returns what it returned, or raises its `UserError`."""
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
    """Element-wise sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_late(value: T) -> list[T]:
    """The values of all processes, by rank, where some come long after the others: nobody is missed meanwhile.

    All call it, as often as each other. A process that dies ends the others through torchrun.
    """
    if world_size() == 1:
        return [value]
    key = f"late {_STORE.add(f'calls of {rank()}', 1)} of "
    _STORE.set(f"{key}{rank()}", pickle.dumps(value))
    while not _STORE.check([f"{key}{r}" for r in range(world_size())]):
        time.sleep(0.1)
    return [pickle.loads(_STORE.get(f"{key}{r}")) for r in range(world_size())]


def gather(value: object) -> list:
    """The values of all processes, by rank; they are pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=_CONTROL)
    return values
