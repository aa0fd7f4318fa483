"""Sharded training (FSDP2): of every parameter, its gradient and its moments each process keeps its share alone.

A block's parameters are gathered when it runs and dropped afterwards. What leaves a run, checkpoints above all, has no
trace of it: `take_part` and `CheckpointFolder` gather tensor by tensor into the host memory of rank 0, and `like` cuts
what a file holds for the process that reads it.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from util.distributed.processes import world_size


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model in place over all processes, on however many machines; they begin with the weights of rank 0.

    Parameters are other objects afterwards, of the same names: optimizers are made of them then. Parameters, gradients
    and moments stay float32, and so does what travels: autocast casts what is gathered as it casts a whole model's, so
    that a run differs from one under DDP by rounding alone. A policy of bfloat16 parameters would halve what travels,
    but round A_log, D, the step sizes' biases and the norms, which the model computes with in float32.

    Of P parameters on n processes a device then keeps 16 P / n bytes (4 P / n more with an EMA) and the block at work;
    from forward to backward autocast's bfloat16 weights, 2 P bytes; and while the gradients of several batches are
    accumulated their float32 sum, 4 P bytes, since it travels once an update.

    Args:
        model: on `device`, which holds it whole until the end of the call; every element of its `ModuleList`s is a
            block that is gathered by itself, and whatever is outside of them is gathered once a pass.
        device: of this process.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for blocks in model.children():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if hasattr(model, "predicted_images"):
        register_fsdp_forward_method(model, "predicted_images")


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep all parameters of a model gathered, so that each process can run it as often as it likes, or not at all.

    All processes enter it; leaving it waits for nobody. A model that is not sharded is left as it is. Every device
    needs the memory for the whole model, 4 bytes a parameter.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, of the same shape; all processes call it where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_share(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is sharded; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def join_gather(value: object) -> None:
    """Give this process's share of all tensors in nested dicts and lists to the one that calls `full` on each."""
    if isinstance(value, Tensor):
        full_tensor(value)
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            join_gather(part)


def shard_like(value: object, other: Tensor | None) -> object:
    """This process's share of a whole tensor where another one of its shape is sharded; anything else as it is."""
    if not isinstance(other, DTensor) or not isinstance(value, Tensor) or value.shape != other.shape:
        return value
    value = value.to(other.device, other.dtype)
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)  # each has the whole


def distribute(model: nn.Module, device: torch.device, sharded: bool = False) -> nn.Module:
    """The model itself, or wrapped for several processes; from here on all of them have the weights of rank 0.

    Args:
        model: on `device`.
        device: of this process.
        sharded: shard the model itself over the processes, before its optimizer is made; see `shard`.
    """
    if world_size() == 1:
        return model
    if sharded:
        shard(model, device)
        return model
    for buffer in model.buffers():  # the order of clusters may be drawn, by each process otherwise
        dist.broadcast(buffer, 0)
    # Blocks are compiled one by one, so that gradients travel between them anyway; cutting their graphs at the borders
    # of buckets, as the compiler would under DDP, only undoes what it fuses.
    torch._dynamo.config.optimize_ddp = False
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name of broadcast_buffers is unknown to older torch
        # buffers do not change: no reason to send them with every batch
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)


def no_sync(model: nn.Module, wait: bool) -> AbstractContextManager:
    """While it is entered, a backward pass of a distributed model keeps its gradient in this process, if told to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not wait)
    return model.no_sync() if wait and isinstance(model, DistributedDataParallel) else nullcontext()
