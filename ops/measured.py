"""Which kernels and switches are known to be faster, and where: what `auto` and the defaults take on a GPU."""

from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

# Name -> compute capability -> the file of `RESULTS` that shows it. What stands in no file waits behind its
# switch: "cuda" behind --scan_backend, "cuda_graph" behind its own, the others behind --fused_ops.
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
