"""Processes: started by torchrun or alone, one device each."""

import os
import random
import re

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def init_device(name: str | None) -> torch.device:
    """The device of this process, and the process group when torchrun started several.

    Args:
        name: "cuda", "cpu" or, for a single process, "cuda:i"; None takes CUDA where there is a GPU, else the CPU.

    Raises:
        UserError: no such device, or fewer GPUs than processes on this machine.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: cuda and cpu are supported")
    device = torch.device(name)
    if device.type == "cuda":
        gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: this torch finds no GPU; leave --device out to train on the CPU")
        if processes > gpus:
            raise UserError(f"{processes} processes, but {gpus} GPUs on this machine")
        if device.index is not None and (processes > 1 or device.index >= gpus):
            raise UserError(f"--device {name}: {processes} processes, {gpus} GPUs; under torchrun say --device cuda")
        device = torch.device("cuda", local_rank() if device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 products remain
    if world_size() > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def seed_everything(*entropy: int) -> None:
    """Seed every generator of this process, differently on every rank (drop path and mixup differ)."""
    words = np.random.SeedSequence((*entropy, rank())).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(words[1])
    random.seed(int(words[2]))


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself, or wrapped for several processes."""
    if world_size() == 1:
        return model
    # Blocks are compiled one by one, so that gradients travel between them anyway; cutting their graphs at the borders
    # of buckets, as the compiler would under DDP, only undoes what it fuses.
    torch._dynamo.config.optimize_ddp = False
    devices = [device] if device.type == "cuda" else None
    # buffers are constants of the sizes: the same everywhere, and no reason to send them with every batch
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)


def reduce_sum(values: Tensor) -> Tensor:
    """Element-wise sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: object) -> list:
    """The values of all processes, by rank; they are pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values
