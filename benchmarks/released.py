"""The training step of the released ARM, written for this repository; bench_train.py compares with it.

It has four separate scans on flipped and transposed copies, each with its own gate and its own projections; two
products in SwiGLU; an optimizer that loops over the parameters; loss scaling; and a host that waits for the device
after every step. Decoder, loss, layer norms and stochastic depth are those of this repository, which are rather faster.
"""

import math
import types
from collections.abc import Callable, Iterable
from functools import partial, reduce

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mamba import Mixer, SwiGLU
from models_classifier import ARMClassifier
from models_pretrain import PretrainModel
from ops import causal_conv1d, selective_scan
from util.training.precision import autocast


def kernels(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return convolution and gated scan of one direction, channels first, with the interface of mamba-ssm's packages.

    With a backend other than mamba_ssm they call `ops`.
    """
    if backend == "mamba_ssm":
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return (
            lambda x, weight, bias: causal_conv1d_fn(x, weight, bias, activation="silu"),
            lambda x, dt, A, B, C, D, z, bias: selective_scan_fn(x, dt, A, B, C, D, z, bias, delta_softplus=True),
        )

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x.mT, weight[None], bias[None], backend=backend)[0].mT

    compute: Callable[..., Tensor] = partial(selective_scan, backend=backend)

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        inputs = (x.mT, dt.mT, A, B.mT, C.mT, D, bias)
        return compute(*(tensor[None] for tensor in inputs))[0].mT * F.silu(z)

    return conv, scan


def to_columns(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reorder patches around the class token in the middle from rows to columns: (B, C, L) -> (B, C, L)."""
    middle = grid[0] * grid[1] // 2
    patches = torch.cat([x[..., :middle], x[..., middle + 1 :]], dim=-1)  # (B, C, M)
    patches = patches.unflatten(-1, grid).mT.flatten(-2)  # (B, C, rows, columns) -> (B, C, columns * rows)
    return torch.cat([patches[..., :middle], x[..., middle : middle + 1], patches[..., middle:]], dim=-1)


def mix(mixer: Mixer, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute `Mixer.forward` with one scan after the other; `grid` replaces the scan order."""
    conv, scan = kernels(mixer.scan_backend)
    batch = len(x)
    xz = rearrange(mixer.in_proj.weight @ rearrange(x, "b l c -> c (b l)"), "c (b l) -> b c l", b=batch)  # (B, 2C, L)
    results = []
    for s in mixer.directions:
        sequence = to_columns(xz, grid) if s.startswith("_c") else xz
        sequence = sequence.flip(-1) if s.endswith("_b") else sequence
        u, z = sequence.chunk(2, dim=1)  # (B, C, L) each
        u = conv(u, mixer.get_parameter(f"conv1d{s}.weight").squeeze(1), mixer.get_parameter(f"conv1d{s}.bias"))
        projected = mixer.get_submodule(f"x_proj{s}")(rearrange(u, "b c l -> (b l) c"))  # (B * L, R + 2N)
        dt, b, c = projected.split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        dt = rearrange(mixer.get_parameter(f"dt_proj{s}.weight") @ dt.mT, "c (b l) -> b c l", b=batch)
        b, c = (rearrange(tensor, "(b l) n -> b n l", b=batch).contiguous() for tensor in (b, c))
        A, skip = -mixer.get_parameter(f"A{s}_log").exp(), mixer.get_parameter(f"D{s}")
        y = scan(u, dt, A, b, c, skip, z, mixer.get_parameter(f"dt_proj{s}.bias"))  # (B, C, L)
        y = y.flip(-1) if s.endswith("_b") else y
        results.append(to_columns(y, grid[::-1]) if s.startswith("_c") else y)
    return mixer.out_proj((reduce(torch.add, results) / len(results)).mT)


def use_released_blocks(model: PretrainModel | ARMClassifier) -> None:
    """Make every block of a model compute as the released code does."""
    grid = model.grid_size

    def forward_mixer(mixer: Mixer, x: Tensor, order: Tensor | None = None) -> Tensor:
        return mix(mixer, x, grid)

    def forward_mlp(mlp: SwiGLU, x: Tensor) -> Tensor:
        return mlp.w3(F.silu(mlp.w1(x)) * mlp.w2(x))

    for layer in model.layers:
        for name, forward in (("mixer", forward_mixer), ("mlp", forward_mlp)):
            module = layer.get_submodule(name)
            module.forward = types.MethodType(forward, module)


def train_steps(
    model: nn.Module,
    batches: Iterable[list[Tensor]],
    compute_loss: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    clip_grad: float | None,
    ema: ModelEmaV3 | None,
) -> None:
    """Train as MAE's code does, one update for each batch."""
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
        if ema is not None:
            ema.update(model)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
