"""Kernels and switches that are measured to be faster, and on which GPUs: "auto" and the defaults use them there."""

from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

# Name -> compute capability -> the file of `RESULTS` that shows it. Elsewhere it is used only if its switch asks for
# it: --scan_backend for "cuda", --cuda_graph for "cuda_graph", --fused_ops for the others.
FASTER: dict[str, dict[tuple[int, int], str]] = {
    "cuda": {},
    "cuda_graph": {},
    "swiglu": {},
    "norm": {},
    "conv": {},
    "projections": {},
    "casts": {},
    "augment": {},
}


def faster(name: str, device: torch.device) -> bool:
    """Return whether a committed measurement shows that `name`, a key of `FASTER`, is faster on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in FASTER[name]
