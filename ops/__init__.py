"""Selective scan and causal convolution: one public function each, one file per backend."""

import logging
import os
from functools import cache

import torch
from torch import Tensor

from . import operators
from .operators import backend_module

BACKENDS = ("auto", "torch", "cpu", "triton", "mamba_ssm", "export")
FASTEST_FIRST = {"cpu": ("cpu", "torch"), "cuda": ("triton", "mamba_ssm", "torch")}  # of "auto", by kind of device


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot work here."""


@cache
def unavailable(name: str) -> str | None:
    """Return why backend `name` cannot work on this machine, None if it can; tried once per process."""
    try:
        if name in ("cpu", "triton"):
            backend_module(name).load()
        elif name == "mamba_ssm":
            backend_module(name)
    except (ImportError, OSError) as error:  # not installed, or built for another torch or CUDA
        if name == "cpu":  # there is nothing to install
            return str(error)
        how = {"mamba_ssm": "--no-build-isolation -r requirements-cuda.txt"}.get(name, name)
        return f"{error}; to install it: pip install {how}"
    except BackendUnavailable as error:
        return str(error)
    return None


def misfit(name: str, device: torch.device, dtype: torch.dtype, width: int, states: int = 1) -> str | None:
    """Return what backend `name` does not compute about these activations, None if it computes them."""
    here, halves = f"{dtype} on {device.type}", (torch.bfloat16, torch.float16)
    if name == "cpu" and (device.type != "cpu" or dtype != torch.float32):
        return here
    if name in ("triton", "mamba_ssm") and dtype not in (torch.float32, *halves):
        return here
    if name == "mamba_ssm" and device.type != "cuda":
        return here
    if name == "triton":
        if device.type != ("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"):
            return here
        if width % 32:
            return f"{width} channels, which 32 does not divide,"
        if states & (states - 1):
            return f"{states} states, no power of 2,"
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


@torch.compiler.assume_constant_result
def choose_backend(name: str, device: torch.device, dtype: torch.dtype, width: int, states: int = 1) -> str:
    """Turn the requested backend into the one that computes; the only place where that is decided.

    "auto" is the first of `FASTEST_FIRST` that computes these activations and works on this machine; on other kinds of
    device it is torch. Each decision is logged once per process (rank 0), as a warning where torch takes the place of
    kernels that do not work here.

    Args:
        name: one of `BACKENDS`.
        device: where the activations are.
        dtype: of the activations.
        width: their channels.
        states: of a channel, in the scan.

    Returns:
        One of `BACKENDS`, not "auto".

    Raises:
        ValueError, BackendUnavailable: see `check_backend`.
        TypeError: the backend asked for does not compute these activations.
    """
    check_backend(name)
    if name != "auto":
        if problem := misfit(name, device, dtype, width, states):
            raise TypeError(f"backend {name!r} does not compute {problem}: use backend 'torch'")
        return name
    broken = []
    for candidate in FASTEST_FIRST.get(device.type, ("torch",)):
        if misfit(candidate, device, dtype, width, states):
            continue
        if not (reason := unavailable(candidate)):
            break  # at torch at the latest
        broken.append(f"{candidate}: {reason}")
    level = logging.WARNING if broken and candidate == "torch" else logging.INFO
    note = f", several times slower than what does not work here ({'; '.join(broken)})" if broken else ""
    _log_once(level, f"scan backend for {dtype} on {device.type}: {candidate}{note}")
    return candidate


def _check(device: torch.device, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ValueError unless each tensor (None passes) has its shape and lies on `device`: kernels read by address."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and (tensor.shape != shape or tensor.device != device):
            found = f"{tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must have shape {shape} and be on {device}, got {found}")


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
    float64 inputs) whatever autocast says; each gradient has the dtype of its input.

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
        ValueError: a shape or a device does not fit, or see `choose_backend`.
        IndexError: `order` names a token that does not exist (on CUDA as the device reports it).
        BackendUnavailable, TypeError: see `choose_backend`.
    """
    K, batch, L, width = u.shape
    N = A.shape[-1]
    inputs, rows = (K, batch, L, width), (K, batch, L, N)
    _check(u.device, dt=(dt, inputs), A=(A, (K, width, N)), B=(B, rows), C=(C, rows))
    _check(u.device, D=(D, (K, width)), dt_bias=(dt_bias, (K, width)), order=(order, (K, L)))
    tensors = (u, dt, A, B, C, D, dt_bias)
    name = choose_backend(backend, u.device, u.dtype, width, N)
    if name in ("mamba_ssm", "export"):
        return backend_module(name).selective_scan(*tensors, order)
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
        ValueError, IndexError, BackendUnavailable, TypeError: as `selective_scan`.
    """
    _, L, width = x.shape
    K, _, W = weight.shape
    _check(x.device, weight=(weight, (K, width, W)), bias=(bias, (K, width)), order=(order, (K, L)))
    name = choose_backend(backend, x.device, x.dtype, width)
    if name in ("mamba_ssm", "export"):
        return backend_module(name).causal_conv1d(x, weight, bias, order)
    return operators.causal_conv1d(x, weight, bias, order, name)
