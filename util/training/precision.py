"""Mixed precision: the dtype of activations."""

import torch


def activation_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on a GPU, which needs no loss scaling, else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Return a context that casts activations to `activation_dtype`."""
    dtype = activation_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
