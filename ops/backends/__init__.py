"""The backends of the scan and the convolution, one file each, and the choice between them.

A new backend is a file NAME_backend.py with the interface that torch_backend.py shows, and a line in `BACKENDS`.
"""

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from ..measured import FASTER, faster

# Name of each backend -> the kinds of device on which "auto" tries it, fastest first. A backend that is also in
# `FASTER` is tried only where a measurement shows it to be faster.
BACKENDS: dict[str, Sequence[str]] = {
    "auto": [],
    "cpu": ["cpu"],
    "cuda": ["cuda"],
    "triton": ["cuda"],
    "mamba_ssm": ["cuda"],
    "torch": ["cpu", "cuda"],
    "export": [],
}


Function = TypeVar("Function", bound=Callable)


def constant(function: Function) -> Function:
    """Make `torch.compile` call a function while it traces, and use the result as a constant.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler, which takes a second.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


class BackendUnavailable(RuntimeError):
    """A backend was requested by name and cannot work on this machine."""


def backend_module(name: str) -> ModuleType:
    """Return the module of backend `name`."""
    return importlib.import_module(f".{name}_backend", __package__)


@cache
def unavailable(name: str) -> str | None:
    """Return why backend `name` cannot work on this machine, None if it can; tested once per process."""
    if name == "auto":
        return None
    module = backend_module(name)
    try:
        module.load()
    except BackendUnavailable as error:
        return str(error)
    except (ImportError, OSError) as error:  # not installed, or built for another torch or CUDA
        return f"{error}; to install it: pip install {module.INSTALL}" if module.INSTALL else str(error)
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


@constant
def choose_backend(name: str, device: torch.device, dtype: torch.dtype, width: int, states: int = 16) -> str:
    """Return the backend that computes where `name` is requested; the only place where that is decided.

    "auto" is the first of `BACKENDS` for this kind of device that computes these activations and works on this machine,
    and torch on other kinds of device. A backend with a fallback leaves to it what it does not compute. Each decision
    is logged once per process (rank 0), as a warning where torch replaces kernels that do not work here.

    Args:
        name: one of `BACKENDS`.
        device: where the activations are.
        dtype: of the activations.
        width: number of channels.
        states: per channel, in the scan; the convolution has none, and every backend computes 16.

    Returns:
        One of `BACKENDS`, not "auto".

    Raises:
        ValueError, BackendUnavailable: see `check_backend`.
        TypeError: the requested backend does not compute these activations.
    """
    check_backend(name)
    activations = device, dtype, width, states
    if name != "auto":
        if problem := backend_module(name).misfit(*activations):
            other = getattr(backend_module(name), "FALLBACK", None)
            if other and not backend_module(other).misfit(*activations):
                return fall_back(name, problem)
            raise TypeError(f"backend {name!r} does not compute {problem}: use backend 'torch'")
        return name
    chosen, broken = "torch", []
    for candidate, kinds in BACKENDS.items():
        if device.type not in kinds or backend_module(candidate).misfit(*activations):
            continue
        if candidate in FASTER and not faster(candidate, device):
            continue
        if not (reason := unavailable(candidate)):
            chosen = candidate
            break
        broken.append(f"{candidate}: {reason}")
    level = logging.WARNING if broken and chosen == "torch" else logging.INFO
    note = f"; faster backends do not work here ({'; '.join(broken)})" if broken else ""
    _log_once(level, f"scan backend for {dtype} on {device.type}: {chosen}{note}")
    return chosen


@constant
def fall_back(name: str, problem: str) -> str:
    """Log once what backend `name` does not compute; return the backend that does."""
    other: str = backend_module(name).FALLBACK
    _log_once(logging.INFO, f"scan backend {name} does not compute {problem}: {other} does")
    return other


@constant
def computes_whole(name: str) -> bool:
    """Return whether backend `name` computes whole ops with their gradients, not wrapped by `ops.operators`."""
    return hasattr(backend_module(name), "selective_scan")


@constant
def row_alignment(name: str) -> int:
    """Return the alignment in bytes of the rows that backend `name` reads, all in one dtype; 0: it reads any."""
    return getattr(backend_module(name), "ROW_ALIGNMENT", 0)


def check_rows(name: str, rows: Sequence[Tensor], *strides: int) -> str:
    """Return backend `name`, or its fallback if it cannot read rows with these dtypes and strides.

    Addresses are not checked, because `torch.compile` does not know them: the backend itself copies a tensor that
    begins at another address, or whose channels are not contiguous.

    Args:
        name: a backend that computes these activations.
        rows: the activations, (..., channels).
        *strides: of further rows, in elements of the dtype of the first tensor.
    """
    if not (alignment := row_alignment(name)):
        return name
    dtype, size = rows[0].dtype, rows[0].itemsize
    if odd := [x.dtype for x in rows if x.dtype != dtype]:
        return fall_back(name, f"activations of {odd[0]} beside {str(dtype).removeprefix('torch.')}")
    strides += tuple(stride for x in rows if x.stride(-1) == 1 for stride in x.stride()[:-1])
    if any(stride * size % alignment for stride in strides):
        return fall_back(name, f"rows that do not begin at multiples of {alignment} bytes")
    return name
