"""Selective scan and causal convolution: one public function each, one file per backend."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, operators
from .backends import BACKENDS, BackendUnavailable, check_backend, choose_backend, unavailable  # noqa: F401


@backends.constant  # the compiler guards on both by itself
def transformed() -> bool:
    """Return whether forward-mode derivatives or a transform of `torch.func` may be active."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def _check(x: Tensor, sizes: dict[str, int], **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check the inputs, because kernels read them by address.

    Args:
        x: the activations.
        sizes: sizes that must be at least 1, by the name of what they count.
        **tensors: `order` and the other tensors, with the shape that each must have; None passes.

    Raises:
        TypeError: `x` is not floating point, or `order` does not hold integers.
        ValueError: a size is 0, or a tensor has another shape or is on another device than `x`.
    """
    order, _ = tensors["order"]
    if not x.is_floating_point() or (order is not None and order.dtype not in (torch.int64, torch.int32)):
        dtypes = f"{x.dtype}" + ("" if order is None else f" and {order.dtype}")
        raise TypeError(f"activations must be floating point, and order int64, got {dtypes}")
    if empty := [name for name, size in sizes.items() if size == 0]:
        raise ValueError(f"there must be at least one {empty[0]}")
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and (tensor.shape != shape or tensor.device != x.device):
            found = f"{tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must have shape {shape} and be on {x.device}, got {found}")


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    order: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Selective scan (S6; Mamba, Gu & Dao 2023, algorithm 2) along K directions at once.

    In each direction, with delta = softplus(dt + dt_bias) and no state before the first token:
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = <C_t, h_t> + D u_t. The state is float32 (float64 for
    float64 inputs) whatever autocast says; each gradient has the dtype of its input. Under forward-mode derivatives and
    transforms of `torch.func`, the backend "export" replaces the requested one, because it has all derivatives.

    Args:
        u: (K, B, L, D) in token order, any strides, as `dt`, `B` and `C`; floating point.
        dt: (K, B, L, D), step sizes before bias and softplus.
        A: (K, D, N), negative.
        B: (K, B, L, N).
        C: (K, B, L, N).
        D: (K, D).
        dt_bias: (K, D).
        order: (K, L) int64; direction k reads token order[k, t] at step t. A permutation; None is left to right.
        backend: one of `BACKENDS`, see `choose_backend`.

    Returns:
        y (K, B, L, D) in token order, dtype of `u`.

    Raises:
        ValueError: a shape or a device does not fit, there is no direction, token or state, or see `choose_backend`.
        IndexError: `order` names a token that does not exist (on CUDA the device reports it later).
        TypeError: `u` is not floating point, `order` does not hold integers, or see `choose_backend`.
        BackendUnavailable: see `choose_backend`.
        NotImplementedError: a second derivative is requested of a backend other than "export".
    """
    K, batch, L, width = u.shape
    N = A.shape[-1]
    inputs, rows, channels = (K, batch, L, width), (K, batch, L, N), (K, width)
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]]
    shapes = {"dt": (dt, inputs), "A": (A, (*channels, N)), "B": (B, rows), "C": (C, rows)}
    shapes |= {"D": (D, channels), "dt_bias": (dt_bias, channels), "order": (order, (K, L))}
    _check(u, {"direction": K, "token": L, "state": N}, **shapes)
    tensors = (u, dt, A, B, C, D, dt_bias)
    name = "export" if transformed() else choose_backend(backend, u.device, u.dtype, width, N)
    if backends.computes_whole(name):
        return backends.backend_module(name).selective_scan(*tensors, order)
    name = backends.check_rows(name, [u, dt, B, C])
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return operators.selective_scan(*tensors, order, name, trains)[0]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Causal depthwise convolution and SiLU along K directions at once (Mamba, Gu & Dao 2023, section 3.4).

    out[k, :, order[k, t]] = silu(bias[k] + sum_j weight[k, :, W - 1 - j] * x[:, order[k, t - j]]), where tokens before
    the first count as 0.

    Args:
        x: (B, L, D), shared by all directions, any strides; floating point.
        weight: (K, D, W).
        bias: (K, D).
        order: (K, L) int64 as in `selective_scan`.
        backend: one of `BACKENDS`, see `choose_backend`.

    Returns:
        (K, B, L, D) in token order, dtype of `x`.

    Raises:
        ValueError, IndexError, TypeError, BackendUnavailable, NotImplementedError: as `selective_scan`.
    """
    _, L, width = x.shape
    K, _, W = weight.shape
    shapes = {"weight": (weight, (K, width, W)), "bias": (bias, (K, width)), "order": (order, (K, L))}
    _check(x, {"direction": K, "token": L, "tap": W}, **shapes)
    name = "export" if transformed() else choose_backend(backend, x.device, x.dtype, width)
    if backends.computes_whole(name):
        return backends.backend_module(name).causal_conv1d(x, weight, bias, order)
    return operators.causal_conv1d(x, weight, bias, order, name)
