"""Data parallelism: replicated (DDP), or sharded (FSDP2), where each process keeps a share of every parameter.

With FSDP2, gradients and moments are sharded, too. A block's parameters are gathered when it runs and dropped
afterwards. Checkpoints are not sharded: rank 0 gathers tensor by tensor into its host memory (`CheckpointFolder`) while
the other ranks call `join_gather`, and `shard_like` cuts what a file holds into shares.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.distributed.processes import world_size

# Functions import FSDP and DTensor themselves: that takes half a second, which --help and a user's mistake need not.


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model in place over all processes, on one or more machines. All start from the weights of rank 0.

    Parameters become other objects with the same names: make the optimizer afterwards. Parameters, gradients and
    moments stay float32, also when they are communicated. Autocast treats gathered parameters as those of an unsharded
    model, so a run differs from one under DDP by rounding only. A bfloat16 policy would halve the traffic, but round
    A_log, D, the biases of the step sizes and the norms, which the model computes with in float32.

    With P parameters on n processes, each device keeps 16 P / n bytes (4 P / n more with an EMA) and the gathered
    block; from forward to backward also autocast's bfloat16 weights, 2 P bytes; and under gradient accumulation the
    float32 sum of the gradients, 4 P bytes, which is all-reduced once per update.

    Args:
        model: on `device`, which needs memory for the unsharded model. Every element of the `ModuleList`s of the model,
            or of its `backbone`, is a block that is gathered by itself; everything else is gathered once per pass.
        device: of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for blocks in getattr(model, "backbone", model).children():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if hasattr(model, "predicted_images"):
        register_fsdp_forward_method(model, "predicted_images")


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep all parameters of a model gathered inside the block, so that processes can run it unequally often.

    All processes must enter it; leaving does not wait for the others. An unsharded model is left as it is. Every device
    needs memory for the unsharded model, 4 bytes per parameter.
    """
    from torch.distributed.fsdp import FSDPModule

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
    """Gather a sharded tensor, which all processes must call; return an unsharded tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_share(tensor: Tensor) -> Tensor:
    """Return this process's share of a sharded tensor; return an unsharded tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def join_gather(value: object) -> None:
    """Call `full_tensor` on all tensors in nested dicts and lists, for the process that keeps the results."""
    if isinstance(value, Tensor):
        full_tensor(value)
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            join_gather(part)


def shard_like(value: object, other: Tensor | None) -> object:
    """Shard a tensor like another one of the same shape; return it as it is where that one is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor) or not isinstance(value, Tensor) or value.shape != other.shape:
        return value
    value = value.to(other.device, other.dtype)
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)  # every rank has it all


def distribute(model: nn.Module, device: torch.device, sharded: bool = False) -> nn.Module:
    """Return the model, wrapped for DDP if there are several processes. All processes get the weights of rank 0.

    With `sharded`, shard the model itself instead, before its optimizer is made; see `shard`.
    """
    if world_size() == 1:
        return model
    if sharded:
        shard(model, device)
        return model
    for buffer in model.buffers():  # each process may have drawn its own order of the clusters
        dist.broadcast(buffer, 0)
    # Blocks are compiled one by one, so gradients are all-reduced between them anyway. Under DDP the compiler would cut
    # their graphs at the borders of buckets, and lose fusions.
    torch._dynamo.config.optimize_ddp = False
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name of broadcast_buffers is unknown to older torch
        # buffers do not change during training
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)


def no_sync(model: nn.Module, wait: bool) -> AbstractContextManager:
    """Return a context in which backward passes of a distributed model do not all-reduce gradients, if `wait`."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not wait)
    return model.no_sync() if wait and isinstance(model, DistributedDataParallel) else nullcontext()
