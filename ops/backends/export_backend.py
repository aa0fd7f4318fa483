"""Both ops composed of torch's own operators, for `torch.export` and for derivatives that kernels do not have.

Exported programs run without this repository. Run eagerly, both ops have every derivative that torch's operators have:
forward mode, double backward, `torch.func`. Arguments and results are those of `ops.selective_scan` and
`ops.causal_conv1d`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from .torch_backend import INSTALL, in_state_dtype, load, misfit  # noqa: F401 - they are of the interface


def _gather(x: Tensor, order: Tensor | None) -> Tensor:
    """Return out with out[k, :, t] = x[k, :, order[k, t]]; both are (K, B, L, D)."""
    if order is None:
        return x
    return torch.stack([x_k.index_select(1, order_k) for x_k, order_k in zip(x, order, strict=True)])


def _inverse(order: Tensor | None) -> Tensor | None:
    if order is None:
        return None
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, steps)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, order: Tensor | None
) -> Tensor:
    """Compute all directions together, token by token."""
    result = u.dtype
    u, dt, A, B, C, D, dt_bias = in_state_dtype(u, dt, A, B, C, D, dt_bias)
    delta = F.softplus(dt + dt_bias[:, None, None])
    A = A.mT  # (K, D, N) -> (K, N, D)

    def step(h: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x, delta, row, column = token  # (K, B, D) or (K, B, N)
        h = h * torch.exp(delta[:, :, None] * A[:, None]) + x[:, :, None] * column[..., None]  # (K, B, N, D)
        return h, (row[..., None] * h).sum(2)

    h = u.new_zeros(*u.shape[:2], *A.shape[1:])
    # (K, B, L, D or N) -> (L, K, B, D or N)
    tokens = tuple(_gather(x, order).permute(2, 0, 1, 3) for x in (delta * u, delta, C, B))
    if torch.compiler.is_compiling():  # in ONNX: Scan; it holds the graph of one step, not of every token
        _, y = scan(step, h, tokens)
    else:  # scan lacks forward mode and loses parts of second derivatives
        outputs = []
        for token in zip(*(x.unbind() for x in tokens), strict=True):
            h, output = step(h, token)
            outputs.append(output)
        y = torch.stack(outputs)
    y = _gather(y.permute(1, 2, 0, 3), _inverse(order))  # (L, K, B, D) -> (K, B, L, D)
    return (y + D[:, None, None] * u).to(result)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """Compute the convolution as a sum of shifted tokens."""
    (K, _, W), L, result = weight.shape, x.shape[1], x.dtype
    x, weight, bias = in_state_dtype(x, weight, bias)
    past = F.pad(_gather(x.expand(K, *x.shape), order), (0, 0, W - 1, 0))  # (K, B, W - 1 + L, D)
    y = bias[:, None, None] + sum(weight[:, None, None, :, j] * past[:, :, j : j + L] for j in range(W))
    return _gather(F.silu(y), _inverse(order)).to(result)
