"""The reference: both ops as loops over time, simple enough to check by reading; autograd computes the gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, order: Tensor | None = None
) -> Tensor:
    """Compute `ops.selective_scan`, with its arguments and result, one direction and one token at a time."""
    K, batch, L, width = u.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    paths = [range(L)] * K if order is None else order.tolist()
    x, A, B, C, D = (t.to(dtype) for t in (u, A, B, C, D))
    delta = F.softplus(dt.to(dtype) + dt_bias.to(dtype)[:, None, None])
    directions = []
    for k in range(K):
        x_k, delta_k, B_k, C_k = (tensor[k].unbind(1) for tensor in (x, delta, B, C))  # L of (B, D) or (B, N)
        h = x.new_zeros(batch, width, A.shape[-1])
        y = {}  # by token
        for t in paths[k]:
            decay = torch.exp(delta_k[t][..., None] * A[k])  # (B, D, N)
            h = decay * h + (delta_k[t] * x_k[t])[..., None] * B_k[t][:, None]  # (B, D, N)
            y[t] = (h * C_k[t][:, None]).sum(-1) + D[k] * x_k[t]  # (B, D)
        directions.append(torch.stack([y[t] for t in range(L)], 1))  # (B, L, D)
    return torch.stack(directions).to(u.dtype)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None = None) -> Tensor:
    """Compute `ops.causal_conv1d`, with its arguments and result, one direction and one token at a time."""
    K, _, W = weight.shape
    L = x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    paths = [range(L)] * K if order is None else order.tolist()
    tokens, weight, bias = x.to(dtype).unbind(1), weight.to(dtype), bias.to(dtype)  # L tokens of (B, D)
    directions = []
    for k in range(K):
        path, y = paths[k], {}
        for t in range(L):
            past = [weight[k, :, W - 1 - j] * tokens[path[t - j]] for j in range(min(W, t + 1))]
            y[path[t]] = F.silu(sum(past) + bias[k])  # (B, D)
        directions.append(torch.stack([y[t] for t in range(L)], 1))  # (B, L, D)
    return torch.stack(directions).to(x.dtype)
