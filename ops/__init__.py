"""Selective scan and causal convolution: one public function each, one file per backend."""

import logging
import os
from functools import cache

import torch
from torch import Tensor

from . import operators
from .measured import faster
from .operators import backend_module

BACKENDS = ("auto", "torch", "cpu", "triton", "mamba_ssm", "export", "cuda")
# Of "auto", by kind of device; "cuda" only where a measurement shows it to be faster.
FASTEST_FIRST = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "mamba_ssm", "torch")}


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot work here."""


@cache
def unavailable(name: str) -> str | None:
    """Return why backend `name` cannot work on this machine, None if it can; tried once per process."""
    try:
        if name in ("cpu", "triton", "cuda"):
            backend_module(name).load()
        elif name == "mamba_ssm":
            backend_module(name)
    except (ImportError, OSError) as error:  # not installed, or built for another torch or CUDA
        if name == "cpu":  # there is nothing to install
            return str(error)
        how = {"mamba_ssm": "--no-build-isolation -r requirements-cuda.txt", "cuda": "triton"}.get(name, name)
        return f"{error}; to install it: pip install {how}"
    except BackendUnavailable as error:
        return str(error)
    return None


def misfit(name: str, device: torch.device, dtype: torch.dtype, width: int, states: int = 16) -> str | None:
    """Return what backend `name` does not compute about these activations, None if it computes them."""
    here, halves = f"{dtype} on {device.type}", (torch.bfloat16, torch.float16)
    if name == "cpu" and (device.type != "cpu" or dtype != torch.float32):
        return here
    if name in ("triton", "mamba_ssm") and dtype not in (torch.float32, *halves):
        return here
    if name in ("mamba_ssm", "cuda") and device.type != "cuda":
        return here
    if name == "triton" and device.type != ("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"):
        return here
    if name == "cuda" and dtype != torch.bfloat16:
        return here
    if name in ("triton", "cuda") and width % 32:
        return f"{width} channels, which 32 does not divide,"
    if name == "triton" and states & (states - 1):
        return f"{states} states, no power of 2,"
    if name == "cuda" and states != 16:
        return f"{states} states, not 16,"
    return None


def check_backend(name: str) -> None:
    """Raise unless backend `name` exists and works on this machine; called when a model is built.

    Raises:
        ValueError: `name` is not one of `BACKENDS`.
        BackendUnavailable: its compiler or package is missing; the message says which.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if reason := unavailable(name):
        raise BackendUnavailable(f"backend {name!r} is not available: {reason}")


@cache
def _log_once(level: int, message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("arm").log(level, message)


@torch.compiler.assume_constant_result  # the compiler guards on both by itself
def transformed() -> bool:
    """Return whether forward-mode derivatives or a transform of `torch.func` may be under way."""
    return operators.in_forward_mode() or torch._C._functorch.maybe_current_level() is not None


@torch.compiler.assume_constant_result
def choose_backend(name: str, device: torch.device, dtype: torch.dtype, width: int, states: int = 16) -> str:
    """Turn the requested backend into the one that computes; the only place where that is decided.

    "auto" is the first of `FASTEST_FIRST` that computes these activations and works on this machine; on other kinds of
    device it is torch. "cuda" leaves to "triton" what it does not compute. Each decision is logged once per process
    (rank 0), as a warning where torch takes the place of kernels that do not work here.

    Args:
        name: one of `BACKENDS`.
        device: where the activations are.
        dtype: of the activations.
        width: their channels.
        states: of a channel, in the scan; the convolution has none, and every backend computes 16.

    Returns:
        One of `BACKENDS`, not "auto".

    Raises:
        ValueError, BackendUnavailable: see `check_backend`.
        TypeError: the backend asked for does not compute these activations.
    """
    check_backend(name)
    if name != "auto":
        if problem := misfit(name, device, dtype, width, states):
            if name == "cuda" and not misfit("triton", device, dtype, width, states):
                return left_to_triton(problem)
            raise TypeError(f"backend {name!r} does not compute {problem}: use backend 'torch'")
        return name
    broken = []
    for candidate in FASTEST_FIRST.get(device.type, ("torch",)):
        if misfit(candidate, device, dtype, width, states):
            continue
        if candidate == "cuda" and not faster("cuda", device):
            continue
        if not (reason := unavailable(candidate)):
            break  # at torch at the latest
        broken.append(f"{candidate}: {reason}")
    level = logging.WARNING if broken and candidate == "torch" else logging.INFO
    note = f", slower than what does not work here ({'; '.join(broken)})" if broken else ""
    _log_once(level, f"scan backend for {dtype} on {device.type}: {candidate}{note}")
    return candidate


@torch.compiler.assume_constant_result
def left_to_triton(what: str) -> str:
    """Say once that backend "cuda" does not compute something; return the backend that does."""
    _log_once(logging.INFO, f"scan backend cuda does not compute {what}: triton does")
    return "triton"


ODD_ROWS = "rows that do not begin at multiples of 16 bytes"


def _rows_misfit(*rows: Tensor) -> str | None:
    """Return what backend "cuda" does not read about these activations, None if it reads them.

    It reads 16 bytes at a time. Strides decide, which `torch.compile` knows as well; the backend itself copies what
    only begins at an odd address or has no contiguous channels.
    """
    if odd := [x.dtype for x in rows if x.dtype != torch.bfloat16]:
        return f"activations of {odd[0]} beside bfloat16"
    if any(x.stride(-1) == 1 and any(stride % 8 for stride in x.stride()[:-1]) for x in rows):
        return ODD_ROWS
    return None


def _check(x: Tensor, sizes: dict[str, int], **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise unless every input is what kernels, which read by address, take it for.

    Args:
        x: the activations.
        sizes: numbers of things of which there must be one at least, by name.
        **tensors: `order` and the others, with the shape that each must have; None passes.

    Raises:
        TypeError: `x` is not floating point, or `order` holds no integers.
        ValueError: a size is 0, or a tensor has another shape or lies elsewhere than `x`.
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
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    order: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Selective scan (S6; Mamba, Gu & Dao 2023, algorithm 2) along K directions at once.

    In each direction, with delta = softplus(dt + dt_bias) and no state before the first token:
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = <C_t, h_t> + D u_t. The state is float32 (float64 for
    float64 inputs) whatever autocast says; each gradient has the dtype of its input. Under forward-mode derivatives and
    the transforms of `torch.func` the backend "export" computes, which has all derivatives, whatever was asked for.

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
        IndexError: `order` names a token that does not exist (on CUDA as the device reports it).
        TypeError: `u` is not floating point, `order` holds no integers, or see `choose_backend`.
        BackendUnavailable: see `choose_backend`.
        NotImplementedError: a second derivative is asked for, of a backend other than "export".
    """
    K, batch, L, width = u.shape
    N = A.shape[-1]
    inputs, rows, channels = (K, batch, L, width), (K, batch, L, N), (K, width)
    shapes = {"dt": (dt, inputs), "A": (A, (*channels, N)), "B": (B, rows), "C": (C, rows)}
    shapes |= {"D": (D, channels), "dt_bias": (dt_bias, channels), "order": (order, (K, L))}
    _check(u, {"direction": K, "token": L, "state": N}, **shapes)
    tensors = (u, dt, A, B, C, D, dt_bias)
    name = "export" if transformed() else choose_backend(backend, u.device, u.dtype, width, N)
    if name in ("mamba_ssm", "export"):
        return backend_module(name).selective_scan(*tensors, order)
    if name == "cuda" and (problem := _rows_misfit(u, dt, B, C)):
        name = left_to_triton(problem)
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
    if name in ("mamba_ssm", "export"):
        return backend_module(name).causal_conv1d(x, weight, bias, order)
    return operators.causal_conv1d(x, weight, bias, order, name)
