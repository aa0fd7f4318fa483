"""Both ops as `torch.export` shows them to other programs: operators of torch alone, one step of the scan in a graph.

In a loop over 197 tokens every step would be nodes of its own; `torch`'s scan (ONNX: Scan) holds one step's.
Arguments and results are those of `ops.selective_scan` and `ops.causal_conv1d`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan


def _gather(x: Tensor, order: Tensor | None) -> Tensor:
    """out[k, :, t] = x[k, :, order[k, t]] of (K, B, L, D)."""
    if order is None:
        return x
    return torch.stack([x_k.index_select(1, order_k) for x_k, order_k in zip(x, order, strict=True)])


def _inverse(order: Tensor | None) -> Tensor | None:
    return None if order is None else order.argsort(dim=1)


def _steps(x: Tensor, order: Tensor | None) -> Tensor:
    return _gather(x.float(), order).permute(2, 0, 1, 3)  # (K, B, L, D) -> (L, K, B, D)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, order: Tensor | None
) -> Tensor:
    """The recurrence of all directions together, token by token, in float32."""
    delta = F.softplus(dt.float() + dt_bias.float()[:, None, None])
    A = A.float().mT[:, None]  # (K, D, N) -> (K, 1, N, D)

    def step(h: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x, delta, row, column = token  # (K, B, D) or (K, B, N)
        h = h * torch.exp(delta[:, :, None] * A) + x[:, :, None] * column[..., None]  # (K, B, N, D)
        return h, (row[:, :, None] @ h).squeeze(2)

    h = u.new_zeros(*u.shape[:2], A.shape[2], u.shape[3], dtype=torch.float32)
    _, y = scan(step, h, tuple(_steps(x, order) for x in (delta * u, delta, C, B)))
    y = _gather(y.permute(1, 2, 0, 3), _inverse(order))  # (L, K, B, D) -> (K, B, L, D)
    return (y + D.float()[:, None, None] * u).to(u.dtype)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """The sum of the shifted tokens, in float32."""
    (K, _, W), L = weight.shape, x.shape[1]
    past = F.pad(_gather(x.float().expand(K, *x.shape), order), (0, 0, W - 1, 0))  # (K, B, W - 1 + L, D)
    y = bias.float()[:, None, None] + sum(weight.float()[:, None, None, :, j] * past[:, :, j : j + L] for j in range(W))
    return _gather(F.silu(y), _inverse(order)).to(x.dtype)
