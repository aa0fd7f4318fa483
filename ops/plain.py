"""Both ops in plain PyTorch without a registration and a choice of backends, for a file that stands alone.

`tools/standalone.py` puts them in place of those in `ops`, whose arguments and results they have. `backend` is only for
the interface: there is one. Neither has second derivatives.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends.torch_backend import conv_backward, conv_forward, scan_backward, scan_forward


def check_backend(name: str) -> None:
    """Raise ValueError for another scan than the one that there is, "torch"."""
    if name not in ("auto", "torch"):
        raise ValueError(f"no scan backend {name!r} in this file: choose 'torch' or 'auto', which is the same")


class SelectiveScan(torch.autograd.Function):
    """The scan, and its gradients."""

    @staticmethod
    def forward(ctx: Any, order: Tensor | None, trains: bool, *inputs: Tensor) -> Tensor:
        """Return y; where it `trains`, keep the inputs and the states for `backward`."""
        y, states = scan_forward(inputs, order, trains)
        if trains:
            ctx.save_for_backward(order, states, *inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs from that of y, each in the dtype of its input."""
        order, states, *inputs = ctx.saved_tensors
        grads = scan_backward(dy, inputs, order, states)
        return None, None, *(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))


class CausalConv(torch.autograd.Function):
    """The convolution, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
        """Return the convolution after SiLU."""
        ctx.save_for_backward(x, weight, bias, order)
        return conv_forward(x, weight, bias, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias from that of the result, each in the dtype of its input."""
        x, weight, bias, order = ctx.saved_tensors
        inputs = x, weight, bias
        grads = conv_backward(dy, *inputs, order)
        return *(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)), None


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    order: Tensor | None = None, backend: str = "torch",
) -> Tensor:  # fmt: skip
    """Selective scan (S6; Mamba, Gu & Dao 2023, algorithm 2) along K directions at once.

    In each direction, with delta = softplus(dt + dt_bias) and no state before the first token:
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = <C_t, h_t> + D u_t. The state is float32 (float64 for
    float64 inputs) whatever autocast says.

    Args:
        u: (K, B, L, D) in token order, as `dt`, `B` and `C`; floating point.
        dt: (K, B, L, D), step sizes before bias and softplus.
        A: (K, D, N), negative.
        B: (K, B, L, N).
        C: (K, B, L, N).
        D: (K, D).
        dt_bias: (K, D).
        order: (K, L) int64; direction k reads token order[k, t] at step t. A permutation; None is left to right.
        backend: not used.

    Returns:
        y (K, B, L, D) in token order, dtype of `u`.
    """
    inputs = (u, dt, A, B, C, D, dt_bias)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return SelectiveScan.apply(order, trains, *inputs)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None = None, backend: str = "torch"
) -> Tensor:
    """Causal depthwise convolution and SiLU along K directions at once (Mamba, Gu & Dao 2023, section 3.4).

    out[k, :, order[k, t]] = silu(bias[k] + sum_j weight[k, :, W - 1 - j] * x[:, order[k, t - j]]), where tokens before
    the first count as 0.

    Args:
        x: (B, L, D), shared by all directions; floating point.
        weight: (K, D, W).
        bias: (K, D).
        order: (K, L) int64 as in `selective_scan`.
        backend: not used.

    Returns:
        (K, B, L, D) in token order, dtype of `x`.
    """
    return CausalConv.apply(x, weight, bias, order)
