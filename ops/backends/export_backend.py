"""Both ops composed of torch's own operators, for `torch.export` and for derivatives that kernels do not have.

Exported programs run without this repository. Run eagerly, both ops have every derivative that torch's operators have:
forward mode, double backward, `torch.func`. Arguments and results are those of `ops.selective_scan` and
`ops.causal_conv1d`.

Exporters treat every operator of every block several times, and runtimes pay for every operator of the loop at every
token: both are kept few.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from .torch_backend import INSTALL, in_state_dtype, load, misfit  # noqa: F401 - they are of the interface


def _places(order: Tensor | None, K: int, batch: int, L: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where tokens are read and where their results lie, so that one Gather moves those of all directions.

    Returns:
        int64: (L, K, B), at each step the row of (K * B * L, ...) in token order; (K, B, L), of each token the row of
        (L * K * B, ...) in reading order.
    """
    steps = torch.arange(L, device=device).expand(K, L)
    order = steps if order is None else order
    inverse = torch.zeros_like(order).scatter(1, order, steps)
    sequences = torch.arange(K * batch, device=device).view(K, batch)  # (K * B,) -> (K, B)
    return order.mT[..., None] + L * sequences, K * batch * inverse[:, None] + sequences[..., None]


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """Return rows[places]: (R, D) at (x, y, z) is (x, y, z, D)."""
    return rows.index_select(0, places.flatten()).view(*places.shape, rows.shape[1])  # (x * y * z, D) -> (x, y, z, D)


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)).

    A program composes it of operators of which onnxruntime has fast kernels, and which overflow nowhere: its Softplus
    takes four times as long. The slope at 0 is right, 1/2; for second derivatives there, torch's operator is needed.
    """
    if not torch.compiler.is_compiling():
        return F.softplus(x)
    size = x.abs()
    return (x + size) / 2 + torch.log1p(torch.exp(-size))


def _step(h: Tensor, x: Tensor, delta: Tensor, row: Tensor, column: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state (K * B, N, D) after a token, and its output (K * B, 1, D).

    x and delta are (K * B, 1, D), the row C (K * B, 1, N), the column B (K * B, N, 1), A (K * B, N, D).
    """
    h = torch.exp(delta * A) * h + x * column
    return h, torch.bmm(row, h)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, order: Tensor | None
) -> Tensor:
    """Compute all directions together, token by token."""
    (K, batch, L, width), N, result, kind = u.shape, A.shape[2], u.dtype, u.device.type
    u, dt, A, B, C, D, dt_bias = in_state_dtype(u, dt, A, B, C, D, dt_bias)
    delta = _softplus(dt + dt_bias[:, None, None])
    # (K, D, N) -> (K, N, D) -> (K, B, N, D) -> (K * B, N, D)
    A = A.mT.contiguous()[:, None].expand(-1, batch, -1, -1).reshape(K * batch, N, width)
    read, written = _places(order, K, batch, L, u.device)
    joined = torch.cat([delta * u, delta, C, B], dim=-1).flatten(0, 2)  # (K, B, L, D or N) -> (K * B * L, 2 D + 2 N)
    # (L, K, B, 2 D + 2 N) -> (L, K * B, 1, 2 D + 2 N): as operands of the loop, which then moves no axes
    joined = _take(joined, read).view(L, K * batch, 1, 2 * (width + N))
    x, delta, row, column = joined.split([width, width, N, N], dim=-1)
    h, tokens = u.new_zeros(K * batch, N, width), (x, delta, row, column.mT)
    # Autocast is left only where it is on, because programs record that too.
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        if torch.compiler.is_compiling():  # in ONNX: Scan; it holds the graph of one step, not of every token
            _, y = scan_op(_step, [h], [*tokens], (A,))
        else:  # scan lacks forward mode and loses parts of second derivatives
            outputs = []
            for operands in zip(*(part.unbind() for part in tokens), strict=True):
                h, output = _step(h, *operands, A)  # type: ignore[call-arg]  # tuples of one length
                outputs.append(output)
            y = torch.stack(outputs)
    y = _take(y.flatten(0, 2), written)  # (L, K * B, 1, D) -> (L * K * B, D) -> (K, B, L, D)
    return (y + D[:, None, None] * u).to(result)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """Compute the convolution as a sum of shifted tokens."""
    (K, _, W), (batch, L, _), result = weight.shape, x.shape, x.dtype
    x, weight, bias = in_state_dtype(x, weight, bias)
    read, written = _places(order, K, batch, L, x.device)
    read = read - batch * L * torch.arange(K, device=x.device)[:, None]  # all directions read the same x
    read = _take(x.flatten(0, 1), read)  # (B, L, D) -> (B * L, D) -> (L, K, B, D)
    past = F.pad(read, (0, 0, 0, 0, 0, 0, W - 1, 0))  # (W - 1 + L, K, B, D)
    y = bias[:, None]
    for j, tap in enumerate(weight[:, None].unbind(-1)):  # (K, 1, D) each
        y = y + tap * past[j : j + L]
    return _take(F.silu(y).flatten(0, 2), written).to(result)  # (L, K, B, D) -> (L * K * B, D) -> (K, B, L, D)
