"""Both ops in plain PyTorch, for any device and float dtype, and the reference for the interface of a backend.

Every backend has `INSTALL`, `load` and `misfit`. It has either `scan_states`, `scan_forward`, `scan_backward`,
`conv_forward` and `conv_backward`, which `ops.operators` turns into torch operators, or `selective_scan` and
`causal_conv1d` with gradients of their own, which take the arguments of those in `ops` except `backend`. Importing the
module must work on every machine: optional packages are imported in functions. Two constants are optional:

    FALLBACK: the backend that computes what `misfit` or `ROW_ALIGNMENT` excludes; a line in the log says so.
    ROW_ALIGNMENT: in bytes, of the rows of u, dt, B and C in memory, which must then have one dtype.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

INSTALL = ""  # arguments of `pip install` that bring missing packages; empty: no package is needed

aten = torch.ops.aten


def load() -> object:
    """Prove that the backend works on this machine; called once by `ops.unavailable`.

    Raises:
        ImportError, OSError: a package cannot be imported; `INSTALL` is added to the message.
        BackendUnavailable: it cannot work here for another reason.
    """


def misfit(device: torch.device, dtype: torch.dtype, width: int, states: int) -> str | None:
    """Return what the backend does not compute, None if it computes such activations.

    Args:
        device: where the activations are.
        dtype: of the activations.
        width: number of channels.
        states: per channel, in the scan.

    Returns:
        Words that follow "does not compute", such as "torch.float64 on cuda".
    """


def _to_time(x: Tensor, order: Tensor | None) -> Tensor:
    """Permute (K, B, L, D) in token order to (L, K, B, D) in reading order."""
    if order is None:
        return x.permute(2, 0, 1, 3)
    return x[torch.arange(len(x), device=x.device), :, order.mT]


def _to_tokens(x: Tensor, order: Tensor | None) -> Tensor:
    """Permute (L, K, B, D) in reading order to (K, B, L, D) in token order."""
    if order is None:
        return x.permute(1, 2, 0, 3)
    out = torch.empty_like(x.permute(1, 2, 0, 3), memory_format=torch.contiguous_format)  # (K, B, L, D)
    out[torch.arange(len(out), device=x.device), :, order.mT] = x
    return out


def in_state_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of the state: float64 if the first one is, else float32."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(x if x.dtype == dtype else x.to(dtype) for x in tensors)  # programs would record a `to` without effect


def dense_channels(x: Tensor) -> Tensor:
    """Return x, or a copy if its channels are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def scan_states(u: Tensor, A: Tensor) -> Tensor:
    """Return an empty tensor of the shape and dtype of the states that `scan_forward` returns for these inputs."""
    K, batch, L, width = u.shape
    return u.new_empty(L + 1, K, batch, A.shape[-1], width, dtype=torch.promote_types(u.dtype, torch.float32))


def scan_forward(inputs: Sequence[Tensor], order: Tensor | None, trains: bool) -> tuple[Tensor, Tensor | None]:
    """Return y of `ops.selective_scan` and, where it `trains`, the states that `scan_backward` needs (else None).

    `inputs` are u, dt, A, B, C, D and dt_bias of `ops.selective_scan`.
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = <C_t, h_t> + D u_t. Channels come last so that every product
    runs along contiguous memory, and the decay is a power of 2, which torch computes faster than a power of e.
    """
    dtype = inputs[0].dtype
    u, dt, A, B, C, D, dt_bias = in_state_dtype(*inputs)
    h = scan_states(u, A)  # (L + 1, K, B, N, D): the state before each token, and after the last
    delta = F.softplus(dt + dt_bias[:, None, None])
    x, delta, B, C = (_to_time(tensor, order) for tensor in (delta * u, delta, B, C))  # (L, K, B, D or N)
    x, step, column = x[..., None, :], delta[..., None, :], B[..., None]
    A2 = A.mT.contiguous()[:, None] / math.log(2)  # (K, 1, N, D)
    h[0] = 0
    decay = torch.empty_like(h[0])
    for t in range(len(x)):
        torch.mul(step[t], A2, out=decay).exp2_()
        torch.mul(x[t], column[t], out=h[t + 1]).addcmul_(decay, h[t])
    with torch.autocast(u.device.type, enabled=False):
        y = (C[..., None, :] @ h[1:]).squeeze(-2)  # (L, K, B, D)
    y = (_to_tokens(y, order) + D[:, None, None] * u).to(dtype)
    return y, h if trains else None


def scan_backward(dy: Tensor, inputs: Sequence[Tensor], order: Tensor | None, states: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs from that of y, in float32 or float64."""
    u, dt, A, B, C, D, dt_bias, dy = in_state_dtype(*inputs, dy)
    raw = dt + dt_bias[:, None, None]
    delta = F.softplus(raw)
    x, step, dy_t, B_t, C_t = (_to_time(tensor, order) for tensor in (delta * u, delta, dy, B, C))  # (L, K, B, D or N)
    dx, ddecay, dB, dC = (tensor.new_empty(tensor.shape) for tensor in (x, step, B_t, C_t))
    A = A.mT.contiguous()[:, None]  # (K, 1, N, D)
    x, step, dy_t, row = (tensor[..., None, :] for tensor in (x, step, dy_t, B_t))
    column = C_t[..., None]
    A2 = A / math.log(2)
    dA, dh, decay, product = (torch.zeros_like(states[0]) for _ in range(4))
    with torch.autocast(u.device.type, enabled=False):
        for t in reversed(range(len(x))):
            dh.addcmul_(dy_t[t], column[t])
            torch.sum(torch.mul(dy_t[t], states[t + 1], out=product), -1, out=dC[t])
            torch.sum(torch.mul(x[t], dh, out=product), -1, out=dB[t])
            dx[t] = (row[t] @ dh).squeeze(-2)
            dh.mul_(torch.mul(step[t], A2, out=decay).exp2_())
            torch.mul(dh, states[t], out=product)  # the gradient of delta_t A
            dA.addcmul_(product, step[t])
            torch.sum(product.mul_(A), -2, out=ddecay[t])
    dx, ddecay, dB, dC = (_to_tokens(grad, order) for grad in (dx, ddecay, dB, dC))  # (K, B, L, D or N)
    ddt = aten.softplus_backward(ddecay + dx * u, raw, 1, 20)
    du = dx * delta + D[:, None, None] * dy
    return du, ddt, dA.sum(1).mT, dB, dC, (dy * u).sum((1, 2)), ddt.sum((1, 2))


def _taps(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Return the input of each tap, a list of W tensors (L, K, B, D), and their weighted sum before SiLU."""
    (K, _, W), L = weight.shape, x.shape[1]
    past = F.pad(_to_time(x.expand(K, *x.shape), order), (0, 0, 0, 0, 0, 0, W - 1, 0))  # (W - 1 + L, K, B, D)
    read = [past[j : j + L] for j in range(W)]
    return read, bias[:, None] + sum(weight[:, None, :, j] * tap for j, tap in enumerate(read))


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """Return the result of `ops.causal_conv1d`."""
    dtype = x.dtype
    x, weight, bias = in_state_dtype(x, weight, bias)
    _, y = _taps(x, weight, bias, order)
    return _to_tokens(F.silu(y), order).to(dtype)


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias from that of the result, in float32 or float64."""
    x, dy, weight, bias = in_state_dtype(x, dy, weight, bias)
    read, y = _taps(x, weight, bias, order)
    dy = aten.silu_backward(_to_time(dy, order), y)  # (L, K, B, D)
    dweight = torch.stack([(dy * tap).sum((0, 2)) for tap in read], dim=-1)  # (K, D, W)
    W, L = len(read), len(dy)
    dpast = dy.new_zeros(W - 1 + L, *dy.shape[1:])
    for j in range(W):
        dpast[j : j + L].addcmul_(weight[:, None, :, j], dy)
    return _to_tokens(dpast[W - 1 :], order).sum(0), dweight, dy.sum((0, 2))
