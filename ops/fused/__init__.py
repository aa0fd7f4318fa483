"""Steps of the model that have a fused operator, and the choice of the operators that a run uses.

Each function computes its formula in torch, which a compiler turns into several passes over memory. If the run uses the
fused operator, that computes the step in one pass.
"""

import os
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import selective_scan, transformed
from ..backends import BackendUnavailable, check_rows, choose_backend, computes_whole, unavailable
from ..measured import faster
from ..operators import split_projected

FUSED = (  # what each operator fuses
    "swiglu",  # the backward pass of SwiGLU's activation and its bias gradients
    "norm",  # a residual sum and the layer norm after it
    "conv",  # the loads of four tokens of the convolution, before the first is used
    "projections",  # the products between the convolution and the scan, whose gradients are added to that of u
    "casts",  # the casts of a block's weights, in a compiled model
    "augment",  # a layer of RandAugment's operations on a batch of images
)

_USED: set[str] = set()


def use(names: Iterable[str], device: torch.device, idle: Collection[str] = ()) -> list[str]:
    """Choose the fused operators of this process, before a model is compiled.

    Args:
        names: of `FUSED`; or "all", "none", or "auto" for those that are measured to be faster on this device.
        device: of the model.
        idle: operators that have nothing to do in this run; they are left out.

    Returns:
        The chosen operators.

    Raises:
        ValueError: "all", "none" or "auto" is given together with other names.
        BackendUnavailable: an operator was requested by name and Triton does not work on this device.
    """
    names = list(names)
    if len(names) > 1 and (word := {"all", "none", "auto"}.intersection(names)):
        raise ValueError(f"{min(word)} decides for all operators and cannot be combined with other names")
    _USED.clear()
    if names == ["auto"]:
        works = device.type == "cuda" and unavailable("triton") is None
        _USED.update(name for name in FUSED if works and faster(name, device))
    elif names != ["none"]:
        if device.type not in ("cuda", triton_device()):
            raise BackendUnavailable(f"fused operators are Triton kernels for CUDA, and the model is on {device.type}")
        if reason := unavailable("triton"):
            raise BackendUnavailable(f"fused operators need Triton: {reason}")
        _USED.update(FUSED if names == ["all"] else names)
    _USED.difference_update(idle)
    return [name for name in FUSED if name in _USED]


def uses(name: str) -> bool:
    """Return whether this process uses the fused operator `name`."""
    return name in _USED


def triton_device() -> str:
    """Return the kind of device on which Triton's kernels run: with TRITON_INTERPRET=1 "cpu", slowly, for tests."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def compile_options() -> dict[str, dict[str, bool]]:
    """Return keyword arguments of `torch.compile`: with "casts" it joins small independent kernels."""
    return {"options": {"combo_kernels": True}} if uses("casts") else {}


def _fuses(name: str, x: Tensor, *dtypes: torch.dtype) -> bool:
    """Return whether the fused operator `name` replaces its formula for activations like x."""
    if not uses(name) or transformed():
        return False
    return x.device.type == triton_device() and x.dtype in (dtypes or (torch.float32, torch.bfloat16, torch.float16))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to which a matrix product casts x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return SiLU of the first half of a linear layer's outputs, times the second half (Shazeer 2020): (..., H).

    x is (..., C), weight (2 H, C) and bias (2 H,).
    """
    if _fuses("swiglu", x):
        from .fused_operators import swiglu as operator

        return operator(F.linear(x, weight, bias.detach()), bias)
    gate, value = F.linear(x, weight, bias).chunk(2, dim=-1)  # (..., H) each
    return F.silu(gate) * value


def add_branches(
    h: Tensor, branches: Sequence[tuple[nn.LayerNorm, Callable[[Tensor], Tensor]]], keep: Tensor | None = None
) -> Tensor:
    """Add branches to a residual stream, one after the other; each reads the normed stream.

    Args:
        h: (B, L, C), or (1, L, C) if all images start from the same stream, which the formula always computes.
        branches: layer norm and function of each branch, (B or 1, L, C) -> (B, L, C).
        keep: (len(branches), B, 1, 1), factor of each branch for each image (stochastic depth); None is 1.

    Returns:
        (B, L, C).
    """
    if _fuses("norm", h, torch.float32) and len(h) != 1:
        return _add_branches_fused(h.contiguous(), branches, keep)
    for i, (norm, branch) in enumerate(branches):
        out = branch(norm(h))
        h = h + (out if keep is None else keep[i] * out)
    return h


def _add_branches_fused(h: Tensor, branches: Sequence, keep: Tensor | None) -> Tensor:
    from . import fused_operators

    dtype = _autocast_dtype(h)
    # (branches, B, 1, 1) -> (branches, B)
    factors = [None] * len(branches) if keep is None else keep.flatten(1).float()
    (norm, branch), *others = branches
    normed, stand_in, _ = fused_operators.norm(h, None, None, None, norm.weight, norm.bias, norm.eps, dtype)
    out = branch(normed)
    for (norm, branch), factor in zip(others, factors[:-1], strict=True):
        added = (h.detach(), stand_in, out, factor)
        normed, h, _ = fused_operators.norm(*added, norm.weight, norm.bias, norm.eps, dtype)
        stand_in, out = h, branch(normed)
    # The stand-in carries the gradient of h, where h is the input.
    return h + (out if keep is None else keep[-1] * out)


def norm_cat(xs: Sequence[Tensor], norms: Sequence[nn.LayerNorm]) -> Tensor:
    """Return the layer norms of n tensors (B, L, C), concatenated: (B, L, n * C)."""
    if _fuses("norm", xs[0], torch.float32):
        from .fused_operators import norm_cat as operator

        weights, biases = [norm.weight for norm in norms], [norm.bias for norm in norms]
        xs = [x.contiguous() for x in xs]
        return operator(xs, weights, biases, norms[0].eps, _autocast_dtype(xs[0]))[0]
    return torch.cat([norm(x) for x, norm in zip(xs, norms, strict=True)], dim=-1)


def selective_ssm(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
    order: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Selective state space model along K directions: B, C and the step of each token are linear in the token.

    Args:
        u: (K, B, L, C).
        x_proj: (K, R + 2N, C), projects a token to its low-rank step (R), B (N) and C (N).
        dt_proj: (K, C, R), projects the low-rank step to the step of each channel.
        A: (K, C, N), negative.
        D: (K, C).
        dt_bias: (K, C).
        order: (K, L) int64, see `ops.selective_scan`.
        backend: see `ops.choose_backend`.

    Returns:
        y (K, B, L, C), dtype of `u`.

    Raises:
        ValueError, IndexError, TypeError, BackendUnavailable, NotImplementedError: see `ops.selective_scan`.
    """
    if _fuses("projections", u) and u.dtype == _autocast_dtype(u):
        name = choose_backend(backend, u.device, u.dtype, u.shape[-1], A.shape[-1])
        if not computes_whole(name):
            from .fused_operators import selective_ssm as operator

            name = check_rows(name, [u], x_proj.shape[1])  # B and C are parts of such rows
            tensors = (u, x_proj.to(u.dtype), dt_proj.to(u.dtype), A, D, dt_bias)
            trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            return operator(*tensors, order, name, trains)[0]
    projected = torch.bmm(u.flatten(1, 2), x_proj.mT)  # (K, B * L, R + 2N)
    low, b, c = split_projected(projected, dt_proj, u)
    dt = torch.bmm(low, dt_proj.mT).view(u.shape)  # (K, B * L, R) -> (K, B * L, C) -> (K, B, L, C)
    return selective_scan(u, dt, A, b, c, D, dt_bias, order, backend)
