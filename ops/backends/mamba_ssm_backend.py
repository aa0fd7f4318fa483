"""Both ops on the kernels of the packages mamba-ssm and causal-conv1d (CUDA), one call per direction."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import operators

INSTALL = "--no-build-isolation -r requirements-cuda.txt"


def load() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return the scan and the convolution of the packages.

    Raises:
        ImportError, OSError: a package is not installed, or was built for another torch or CUDA.
    """
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn, causal_conv1d_fn


def misfit(device: torch.device, dtype: torch.dtype, width: int, states: int) -> str | None:
    """See torch_backend.py."""
    fits = device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return None if fits else f"{dtype} on {device.type}"


def _to_time(x: Tensor, order: Tensor | None) -> Tensor:
    """Permute (B, L, D) in token order to (B, D, L) in reading order, contiguous in time."""
    return (x if order is None else x.index_select(1, order)).mT.contiguous()


def _to_tokens(x: Tensor, order: Tensor | None) -> Tensor:
    """Permute (B, D, L) in reading order to (B, L, D) in token order."""
    x = x.mT  # (B, L, D)
    return x if order is None else torch.empty_like(x).index_copy_(1, order, x)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, order: Tensor | None = None
) -> Tensor:
    """Selective scan of `ops.selective_scan`; arguments and result are the same, u in float32, bfloat16 or float16."""
    selective_scan_fn, _ = load()
    # The kernel wants all tensors with a time axis in one dtype, and the parameters in float32.
    dt, B, C = (x.to(u.dtype) for x in (dt, B, C))
    A, D, dt_bias = (x.float() for x in (A, D, dt_bias))
    directions = []
    for k in range(len(u)):
        path = None if order is None else order[k]
        x, delta, b, c = (_to_time(tensor[k], path) for tensor in (u, dt, B, C))
        y = selective_scan_fn(x, delta, A[k], b, c, D[k], delta_bias=dt_bias[k], delta_softplus=True)
        directions.append(_to_tokens(y, path))
    return torch.stack(directions)  # (K, B, L, D)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution and SiLU of `ops.causal_conv1d`; arguments and result are the same."""
    if not 2 <= weight.shape[-1] <= 4:  # the widths that the kernel supports
        return operators.causal_conv1d(x, weight, bias, order, "torch")
    _, causal_conv1d_fn = load()
    weight, bias = weight.float(), bias.float()
    directions = []
    for k in range(len(weight)):
        path = None if order is None else order[k]
        y = causal_conv1d_fn(_to_time(x, path), weight[k], bias[k], activation="silu")
        directions.append(_to_tokens(y, path))
    return torch.stack(directions)  # (K, B, L, D)
