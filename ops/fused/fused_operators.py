"""The fused operators (see __init__.py) as torch operators, `arm::...`: each is one node of a compiled model.

Their kernels are in triton_fused.py; the products around the scan call a scan backend.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import backend_module
from ..operators import as_inputs, empty_grads, empty_states, operator, register_scan_grads, save, split_projected


def _kernels() -> ModuleType:
    import ops.fused.triton_fused as kernels  # imports Triton

    return kernels


# ---- SwiGLU ----


@operator(lambda x, bias: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
def swiglu(x: Tensor, bias: Tensor) -> Tensor:
    """Return silu(gate) * value of x (..., 2 H); x already includes `bias` (2 H,), which gets a gradient here."""
    return _kernels().swiglu_forward(x)


@operator(lambda dy, x, bias: empty_grads(x, bias), differentiable=False)
def swiglu_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias."""
    return as_inputs(_kernels().swiglu_backward(dy, x), (x, bias))


swiglu.register_autograd(
    lambda ctx, dy: swiglu_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# ---- residual sums and layer norms ----


def _empty_norm(h: Tensor, stand_in: Tensor | None, branch: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    total = h.new_zeros(1).expand(h.shape) if branch is None else torch.empty_like(h)
    return torch.empty_like(h, dtype=others[-1]), total, h.new_empty(2, *h.shape[:-1])


@operator(_empty_norm)
def norm(
    h: Tensor, stand_in: Tensor | None, branch: Tensor | None, keep: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the layer norm of h + keep * branch in `dtype`, that sum, and the statistics for `norm_backward`.

    The gradient of h goes to `stand_in`. Without a branch the sum is a stand-in for h, one expanded number, and h gets
    the gradient. Operators that use h too send its gradient to the stand-in, and this operator adds it in the pass that
    computes its own gradient. Shapes are those of `triton_fused.norm_forward`.
    """
    normed = torch.empty_like(h, dtype=dtype)
    total, statistics = _kernels().norm_forward(h, branch, keep, weight, bias, eps, normed)
    return normed, h.new_zeros(1).expand(h.shape) if branch is None else total, statistics


def _empty_norm_grads(dnormed: Tensor, dtotal: Tensor | None, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dbranch = x.new_empty(0) if others[-1] is None else torch.empty_like(x, dtype=others[-1])
    return torch.empty_like(x), dbranch, x.new_empty(2, x.shape[-1])


@operator(_empty_norm_grads, differentiable=False)
def norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, x: Tensor, keep: Tensor | None, weight: Tensor, statistics: Tensor,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of h, of the branch in `dtype` (None: there was none), of weight and bias (2, C)."""
    args = (dnormed.contiguous(), dtotal, x, keep, weight, statistics, dtype)
    dh, dbranch, sums = _kernels().norm_backward(*args)
    return dh, x.new_empty(0) if dbranch is None else dbranch, sums


def _norm_context(ctx: Any, inputs: tuple, output: Any) -> None:
    h, _, branch, keep, weight, *_ = inputs
    ctx.branch = None if branch is None else branch.dtype
    save(ctx, [h if branch is None else output[1], keep, weight], output[2:])


def _norm_grads(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None, _: Tensor | None) -> tuple:
    total, keep, weight, statistics = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(total)
    dh, dbranch, sums = norm_backward(dnormed, dtotal, total, keep, weight, statistics, ctx.branch)
    dweight, dbias = sums.to(weight.dtype).unbind()  # (2, C) -> (C,) each
    first = (dh, None, None) if ctx.branch is None else (None, dh, dbranch)
    return *first, None, dweight, dbias, None, None


norm.register_autograd(_norm_grads, setup_context=_norm_context)


def _empty_norm_cat(xs: list[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    *rows, C = xs[0].shape
    return xs[0].new_empty(*rows, len(xs) * C, dtype=others[-1]), xs[0].new_empty(len(xs), 2, *rows)


@operator(_empty_norm_cat)
def norm_cat(
    xs: list[Tensor], weights: list[Tensor], biases: list[Tensor], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return n layer norms (B, L, C) concatenated in `dtype`, (B, L, n * C), and the statistics for the gradients."""
    normed = xs[0].new_empty(*xs[0].shape[:-1], len(xs) * xs[0].shape[-1], dtype=dtype)
    slices, forward = normed.chunk(len(xs), dim=-1), _kernels().norm_forward
    inputs = zip(xs, weights, biases, slices, strict=True)
    return normed, torch.stack([forward(x, None, None, w, b, eps, s)[1] for x, w, b, s in inputs])


def _empty_norm_cat_grads(dnormed: Tensor, xs: list[Tensor], *_: Any) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(x) for x in xs], xs[0].new_empty(len(xs), 2, xs[0].shape[-1])


@operator(_empty_norm_cat_grads, differentiable=False)
def norm_cat_backward(
    dnormed: Tensor, xs: list[Tensor], weights: list[Tensor], statistics: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of xs, and those of weights and biases (n, 2, C)."""
    slices, backward = dnormed.contiguous().chunk(len(xs), dim=-1), _kernels().norm_backward
    inputs = zip(slices, xs, weights, statistics, strict=True)
    dxs, _, sums = zip(*(backward(s, None, x, None, w, found, None) for s, x, w, found in inputs), strict=True)
    return list(dxs), torch.stack(sums)


def _norm_cat_context(ctx: Any, inputs: tuple, output: Any) -> None:
    xs, weights, *_ = inputs
    ctx.count = len(xs)
    save(ctx, [*xs, *weights], output[1:])


def _norm_cat_grads(ctx: Any, dnormed: Tensor | None, _: Tensor | None) -> tuple:
    n = ctx.count
    if dnormed is None:
        return [None] * n, [None] * n, [None] * n, None, None
    *tensors, statistics = ctx.saved_tensors
    weights = tensors[n:]
    dxs, sums = norm_cat_backward(dnormed, tensors[:n], weights, statistics)
    dweights, dbiases = sums.to(weights[0].dtype).unbind(1)  # (n, 2, C) -> (n, C) each
    return dxs, list(dweights.unbind()), list(dbiases.unbind()), None, None


norm_cat.register_autograd(_norm_cat_grads, setup_context=_norm_cat_context)


# ---- the products around the scan ----


def _empty_ssm(u: Tensor, x_proj: Tensor, dt_proj: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, ...]:
    projected = u.new_empty(len(u), u.shape[1] * u.shape[2], x_proj.shape[1])
    return u.new_empty(u.shape), projected, u.new_empty(u.shape), empty_states(u, A, *others[-2:])


@operator(_empty_ssm)
def selective_ssm(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
    order: Tensor | None, backend: str, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the output of x_proj, steps before bias and softplus, and the states (empty unless it `trains`)."""
    projected = u.flatten(1, 2) @ x_proj.mT  # (K, B * L, R + 2N)
    low, b, c = split_projected(projected, dt_proj, u)
    dt = (low @ dt_proj.mT).view(u.shape)  # (K, B * L, C) -> (K, B, L, C)
    y, states = backend_module(backend).scan_forward((u, dt, A, b, c, D, dt_bias), order, trains)
    return y.contiguous(), projected, dt, u.new_empty(0) if states is None else states


@operator(lambda dy, *inputs: empty_grads(*inputs[:6]), differentiable=False)
def selective_ssm_backward(
    dy: Tensor, u: Tensor, x_proj: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
    order: Tensor | None, projected: Tensor, dt: Tensor, states: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of u, x_proj, dt_proj, A, D and dt_bias."""
    low, b, c = split_projected(projected, dt_proj, u)
    scanned = (u, dt, A, b, c, D, dt_bias)
    du, ddt, dA, db, dc, dD, dbias = backend_module(backend).scan_backward(dy, scanned, order, states)
    dprojected = torch.empty_like(projected)
    dlow, *slices = split_projected(dprojected, dt_proj, u)
    for part, grad in zip(slices, (db, dc), strict=True):
        part.copy_(grad)
    ddt = ddt.to(u.dtype).flatten(1, 2)  # (K, B, L, C) -> (K, B * L, C)
    torch.bmm(ddt, dt_proj, out=dlow)
    ddt_proj = ddt.mT @ low  # (K, C, R)
    dx_proj = dprojected.mT @ u.flatten(1, 2)  # (K, R + 2N, C)
    # In place: torch.baddbmm would begin with a copy of du.
    du = du.to(u.dtype).flatten(1, 2).baddbmm_(dprojected, x_proj).view(u.shape)
    inputs = (u, x_proj, dt_proj, A, D, dt_bias)
    return as_inputs((du, dx_proj, ddt_proj, dA, dD, dbias), inputs)


register_scan_grads(selective_ssm, selective_ssm_backward)
