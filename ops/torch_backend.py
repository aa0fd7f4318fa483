"""Both ops in plain PyTorch, for any device and float dtype. All directions go through time together."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """(K, B, L, D) in token order -> (L, K, B, D) in the order of reading."""
    return x[torch.arange(len(x), device=x.device), :, order.mT]


def _scatter(x: Tensor, order: Tensor) -> Tensor:
    """(L, K, B, D) in the order of reading -> (K, B, L, D) in token order."""
    out = torch.empty_like(x.permute(1, 2, 0, 3), memory_format=torch.contiguous_format)  # (K, B, L, D)
    out[torch.arange(len(out), device=x.device), :, order.mT] = x
    return out


class _Move(torch.autograd.Function):
    """`_gather` or `_scatter`, each the backward of the other: autograd's own adds up where these only move."""

    @staticmethod
    def forward(ctx, x, order, move, back):
        ctx.save_for_backward(order)
        ctx.back = back
        return move(x, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.back(grad, *ctx.saved_tensors), None, None, None


def _to_time(x: Tensor, order: Tensor | None) -> Tensor:
    return x.permute(2, 0, 1, 3) if order is None else _Move.apply(x, order, _gather, _scatter)  # (L, K, B, D)


def _to_tokens(x: Tensor, order: Tensor | None) -> Tensor:
    return x.permute(1, 2, 0, 3) if order is None else _Move.apply(x, order, _scatter, _gather)  # (K, B, L, D)


class _Scan(torch.autograd.Function):
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = <C_t, h_t>; of the (K, B, N, D) tensors only h is kept.

    u, delta (L, K, B, D); A (K, N, D); B, C (L, K, B, N); y (L, K, B, D). Channels come last so that every product
    runs along contiguous memory, and the decay is a power of 2, which torch computes faster than a power of e.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        L, K, batch, width = u.shape
        x, step, column, A2 = (delta * u)[..., None, :], delta[..., None, :], B[..., None], A[:, None] / math.log(2)
        h = u.new_empty(L + 1, K, batch, A.shape[1], width)
        h[0] = 0
        decay = torch.empty_like(h[0])
        for t in range(L):
            torch.mul(step[t], A2, out=decay).exp2_()
            torch.mul(x[t], column[t], out=h[t + 1]).addcmul_(decay, h[t])
        ctx.save_for_backward(u, delta, A, B, C, h)
        return (C[..., None, :] @ h[1:]).squeeze(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, delta, A, B, C, h = ctx.saved_tensors
        x, step, A = (delta * u)[..., None, :], delta[..., None, :], A[:, None]
        A2, row, column, dy = A / math.log(2), B[..., None, :], C[..., None], dy[..., None, :]
        du, ddelta, dB, dC = (tensor.new_empty(tensor.shape) for tensor in (u, delta, B, C))
        dA, dh, decay, product = (torch.zeros_like(h[0]) for _ in range(4))
        with torch.autocast(u.device.type, enabled=False):
            for t in reversed(range(len(u))):
                dh.addcmul_(dy[t], column[t])
                torch.sum(torch.mul(dy[t], h[t + 1], out=product), -1, out=dC[t])
                torch.sum(torch.mul(x[t], dh, out=product), -1, out=dB[t])
                du[t] = (row[t] @ dh).squeeze(-2)
                dh.mul_(torch.mul(step[t], A2, out=decay).exp2_())
                torch.mul(dh, h[t], out=product)  # the gradient of delta_t A
                dA.addcmul_(product, step[t])
                torch.sum(product.mul_(A), -2, out=ddelta[t])
        return du * delta, ddelta.addcmul_(du, u), dA.sum(1), dB, dC


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, order: Tensor | None = None
) -> Tensor:
    """Selective scan of `ops.selective_scan`; args and result are the same."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        x, dt, A, B, C, D, dt_bias = (tensor.to(dtype) for tensor in (u, dt, A, B, C, D, dt_bias))
        delta = F.softplus(dt + dt_bias[:, None, None])
        y = _Scan.apply(
            _to_time(x, order), _to_time(delta, order), A.mT.contiguous(), _to_time(B, order), _to_time(C, order)
        )
        return (_to_tokens(y, order) + D[:, None, None] * x).to(u.dtype)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution and SiLU of `ops.causal_conv1d`; args and result are the same."""
    K, _, W = weight.shape
    L = x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = weight.to(dtype), bias.to(dtype)
        past = _to_time(x.to(dtype).expand(K, *x.shape), order)  # (L, K, B, D)
        past = F.pad(past, (0, 0, 0, 0, 0, 0, W - 1, 0))  # (W - 1 + L, K, B, D)
        y = bias[:, None] + sum(weight[:, None, :, j] * past[j : j + L] for j in range(W))  # (L, K, B, D)
        return _to_tokens(F.silu(y), order).to(x.dtype)
