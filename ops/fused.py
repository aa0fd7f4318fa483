"""Fused operators: each does in one pass what compiled code does in several. A run chooses which of them it uses."""

import os
from collections.abc import Iterable

import torch

from . import BackendUnavailable, unavailable
from .measured import faster

# What each one joins: the backward pass of SwiGLU's activation and its bias gradients; a residual sum and the layer
# norm after it; four tokens of the convolution, loaded before the first is used; the products between the convolution
# and the scan, whose gradients meet in u; a layer of RandAugment's operations on a batch of images.
FUSED = ("swiglu", "norm", "conv", "projections", "augment")

_USED: set[str] = set()


def use(names: Iterable[str], device: torch.device) -> list[str]:
    """Choose the fused operators of this process, before a model is compiled.

    Args:
        names: of `FUSED`; or "all", "none", or "auto" for those that are measured to be faster on this device.
        device: of the model.

    Returns:
        The chosen ones.

    Raises:
        BackendUnavailable: one was asked for by name and Triton does not work on this device.
    """
    names = list(names)
    _USED.clear()
    if names == ["auto"]:
        works = device.type == "cuda" and unavailable("triton") is None
        _USED.update(name for name in FUSED if works and faster(name, device))
    elif names != ["none"]:
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            raise BackendUnavailable(f"fused operators are Triton kernels for CUDA, and the model is on {device.type}")
        if reason := unavailable("triton"):
            raise BackendUnavailable(f"fused operators need Triton: {reason}")
        _USED.update(FUSED if names == ["all"] else names)
    return [name for name in FUSED if name in _USED]


def uses(name: str) -> bool:
    """Return whether this process uses the fused operator `name`."""
    return name in _USED
