"""Mixed precision: which dtype activations have on a device."""

import torch


def activation_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, where it needs no loss scaling; float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to `activation_dtype`."""
    dtype = activation_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
