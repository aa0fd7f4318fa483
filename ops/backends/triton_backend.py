"""Both ops as Triton kernels for CUDA (triton_kernels.py): their host code, which imports Triton when it is used."""

import math
import subprocess
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import fused
from . import BackendUnavailable
from .torch_backend import dense_channels

if TYPE_CHECKING:
    from triton import JITFunction

INSTALL = "triton"

# Block sizes, the same on every GPU; chosen by counted instructions, and by time on an H200. Steps of 8 spill 1 KB
# per thread; steps of 2 spill nothing and take a fifth more instructions, 12 % more time; a chunk of 4 takes 3 to 8 %
# less time and doubles the memory of the states, 7.5 GB in finetuning ARM-base.
CHUNK = 8  # tokens between two stored states
STEPS = 4  # tokens whose states the backward pass holds in registers, computed again from the stored one
SEGMENT = 32  # tokens of the convolution per program
SCAN_BLOCK = 32  # channels per program: one warp, so that sums over channels and states never leave it
CONV_BLOCK = 128  # at most


def _kernels() -> ModuleType:
    from . import triton_kernels  # imports Triton

    return triton_kernels


@cache
def load() -> None:
    """Prove that the kernels work here: compile the smallest and run it.

    Raises:
        ImportError: Triton is not installed.
        BackendUnavailable: there is no fitting GPU, or what Triton needs at run time (a C compiler, Python's headers)
            is missing.
    """
    import triton

    if triton.knobs.runtime.interpret:
        return
    if not torch.cuda.is_available():
        raise BackendUnavailable("it needs a CUDA GPU")
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        raise BackendUnavailable(f"it needs compute capability 8.0, this GPU has {'.'.join(map(str, capability))}")
    x = torch.zeros(1, 1, 32, device="cuda")
    try:
        conv_forward(x, x.view(1, 32, 1), x.view(1, 32), None)
    except (RuntimeError, OSError, subprocess.CalledProcessError, triton.TritonError) as error:
        raise BackendUnavailable(f"Triton cannot run a kernel: {error}") from error


def misfit(device: torch.device, dtype: torch.dtype, width: int, states: int) -> str | None:
    """See torch_backend.py."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or device.type != fused.triton_device():
        return f"{dtype} on {device.type}"
    if width % SCAN_BLOCK:
        return f"{width} channels (not a multiple of {SCAN_BLOCK})"
    return f"{states} states (not a power of 2)" if states & (states - 1) else None


def _launch(kernel: "JITFunction", paths: int, *args: object, **constants: int) -> None:
    """Start a program for each block of channels of each of `paths` sequences."""
    with torch.cuda.device_of(args[0]):
        kernel[(paths * (constants["WIDTH"] // constants["BLOCK"]),)](*args, **constants, num_warps=1)


_CHECKED = WeakTensorKeyDictionary()  # `order` tensors that were checked: version and length at that time


def checked_order(order: Tensor | None, L: int) -> Tensor | None:
    """Return `order` as the kernels read it, after a check: they would read from any address that it names.

    An order is checked once, not at every use. A GPU reports a token that does not exist when it reaches the check; the
    host does not wait for it.
    """
    if order is None:
        return None
    seen = None if order.is_inference() else (order._version, L)
    if seen is None or _CHECKED.get(order) != seen:
        torch._assert_async(((order >= 0) & (order < L)).all(), f"order names a token beyond the sequence of {L}")
        _CHECKED[order] = seen
    return order.contiguous()


def _scan_setup(
    inputs: Sequence[Tensor], order: Tensor | None
) -> tuple[tuple[Tensor | None, ...], list[int], dict[str, int]]:
    u, dt, A, B, C, D, dt_bias = inputs
    A, D, dt_bias = (x.float().contiguous() for x in (A, D, dt_bias))
    u, dt, B, C = (dense_channels(x) for x in (u, dt, B, C))
    strides = [stride for x in (u, dt, B, C) for stride in x.stride()[:3]]
    (K, _, L, width), N = u.shape, A.shape[-1]
    constants = {"K": K, "WIDTH": width, "N": N, "BLOCK": SCAN_BLOCK, "CHUNK": CHUNK, "T": STEPS}
    return (u, dt, A, B, C, D, dt_bias, checked_order(order, L)), strides, constants | {"ORDERED": order is not None}


def scan_states(u: Tensor, A: Tensor) -> Tensor:
    """Return an empty tensor for the states that `scan_forward` returns: those before every chunk of tokens."""
    K, batch, L, width = u.shape
    return u.new_empty(K, batch, -(-L // CHUNK), width, A.shape[-1], dtype=torch.float32)


def scan_forward(inputs: Sequence[Tensor], order: Tensor | None, trains: bool) -> tuple[Tensor, Tensor | None]:
    """See torch_backend.py."""
    u, _, A, *_ = inputs
    K, batch, L, _ = u.shape
    tensors, strides, constants = _scan_setup(inputs, order)
    y, states = u.new_empty(u.shape), scan_states(u, A) if trains else None
    args = (*tensors, y, states if trains else y, batch, L, *strides)
    _launch(_kernels().scan_forward_kernel, K * batch, *args, **constants, TRAINS=trains)
    return y, states


def scan_backward(dy: Tensor, inputs: Sequence[Tensor], order: Tensor | None, states: Tensor) -> tuple[Tensor, ...]:
    """See torch_backend.py."""
    u, dt, A, *_ = inputs
    (K, batch, L, width), N = u.shape, A.shape[-1]
    tensors, strides, constants = _scan_setup(inputs, order)
    dy = dense_channels(dy)
    blocks = width // SCAN_BLOCK
    du, ddt = u.new_empty(u.shape), dt.new_empty(u.shape)
    # Partial sums, one per program: added up here in a fixed order.
    dA, dD, dbias = (states.new_empty(K, batch, *shape) for shape in ((width, N), (width,), (width,)))
    dB, dC = (states.new_empty(K, batch, L, blocks, N) for _ in range(2))
    args = (*tensors, states, dy, du, ddt, dA, dB, dC, dD, dbias, batch, L, *strides, *dy.stride()[:3])
    _launch(_kernels().scan_backward_kernel, K * batch, *args, **constants)
    return du, ddt, dA.sum(1), dB.sum(3), dC.sum(3), dD.sum(1), dbias.sum(1)


def _conv_setup(
    x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], int, dict[str, int]]:
    """Return the kernels' tensors, sizes and strides of x, the number of segments, and the constants."""
    x, (K, width, W), L = dense_channels(x), weight.shape, x.shape[1]
    constants = {"K": K, "WIDTH": width, "TAPS": W, "BLOCK": math.gcd(width, CONV_BLOCK), "SEGMENT": SEGMENT}
    constants |= {"AHEAD": 4 if fused.uses("conv") else 1, "ORDERED": order is not None}
    tensors = (x, weight.float().contiguous(), bias.float().contiguous(), checked_order(order, L))
    return tensors, (*x.shape[:2], *x.stride()[:2]), -(-L // SEGMENT), constants


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """See torch_backend.py."""
    tensors, layout, segments, constants = _conv_setup(x, weight, bias, order)
    y = x.new_empty(len(weight), *x.shape)
    _launch(_kernels().conv_forward_kernel, len(y) * len(x) * segments, *tensors, y, *layout, **constants)
    return y


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See torch_backend.py."""
    tensors, layout, segments, constants = _conv_setup(x, weight, bias, order)
    dy, (K, width, W) = dense_channels(dy), weight.shape
    dx = x.new_empty(K, *x.shape)
    sums = dx.new_empty(K, len(x), segments, W + 1, width, dtype=torch.float32)
    args = (*tensors, dy, dx, sums, *layout, *dy.stride()[:3])
    _launch(_kernels().conv_backward_kernel, K * len(x) * segments, *args, **constants)
    sums = sums.sum((1, 2))  # (K, W + 1, D)
    # Operators must not return two views of one tensor.
    return dx.sum(0) if K > 1 else dx[0], sums[:, :W].mT, sums[:, W].clone()
