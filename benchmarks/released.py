"""The released composition of ARM, as the yardstick of bench_train.py: what its training step does, written anew.

Four separate scans on flipped and transposed copies, each with its own gate; every projection a call of its own; an
optimizer that walks through the parameters; loss scaling; and a host that waits for the device after every step.
"""

import math
import types
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba import Mixer
from ops import causal_conv1d, selective_scan
from util.train_loop import autocast


def to_columns(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Row-major tokens around a class token in the middle, column-major: (B, L, C) -> (B, L, C)."""
    middle = grid[0] * grid[1] // 2
    patches = torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1)  # (B, M, C)
    patches = patches.unflatten(1, grid).transpose(1, 2).flatten(1, 2)  # (B, columns * rows, C)
    return torch.cat([patches[:, :middle], x[:, middle : middle + 1], patches[:, middle:]], dim=1)


def mix(mixer: Mixer, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """`Mixer.forward` with one scan after the other; `grid` in place of the map of steps to tokens."""
    xz = mixer.in_proj(x)  # (B, L, 2C)
    results = []
    for s in mixer.directions:
        sequence = to_columns(xz, grid) if s.startswith("_c") else xz
        sequence = sequence.flip(1) if s.endswith("_b") else sequence
        u, z = sequence.chunk(2, dim=-1)  # (B, L, C) each
        conv, project, step = (mixer.get_submodule(f"{name}{s}") for name in ("conv1d", "x_proj", "dt_proj"))
        u = causal_conv1d(u, conv.weight.view(1, -1, conv.kernel_size[0]), conv.bias[None], backend=mixer.scan_backend)
        dt, b, c = project(u[0]).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        dt = F.linear(dt, step.weight)
        A, skip = -mixer.get_parameter(f"A{s}_log").exp(), mixer.get_parameter(f"D{s}")
        inputs = (u, dt[None], A[None], b[None], c[None], skip[None], step.bias[None])
        y = selective_scan(*inputs, backend=mixer.scan_backend)[0] * F.silu(z)
        y = y.flip(1) if s.endswith("_b") else y
        results.append(to_columns(y, grid[::-1]) if s.startswith("_c") else y)
    return mixer.out_proj(sum(results) / len(results))


def use_released_mixers(model: nn.Module) -> None:
    """Let every block of a model mix as the released code does."""
    grid = getattr(model, "grid_size", None)
    for layer in model.layers:
        layer.mixer.forward = types.MethodType(lambda mixer, x, order=None: mix(mixer, x, grid), layer.mixer)


def train_steps(
    model: nn.Module,
    batches: Iterable[list[Tensor]],
    compute_loss: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    clip_grad: float | None,
    after_update: Callable[[], None],
) -> None:
    """Train as the MAE line of code does, one update a batch."""
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    for batch in batches:
        with autocast(device):
            loss = compute_loss(*batch)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()}")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after_update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
