"""Sizes of the models, and parts of the encoder: patch embedding, Mamba mixer, SwiGLU, block, orders of tokens."""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops import causal_conv1d, check_backend
from ops.fused import add_branches, selective_ssm, swiglu

SIZES = {
    # published (paper, section 4.1)
    "arm_base_pz16": {"embed_dim": 768, "depth": 12, "dec_embed_dim": 512},
    "arm_large_pz16": {"embed_dim": 1024, "depth": 24, "dec_embed_dim": 512},
    "arm_huge_pz16": {"embed_dim": 1536, "depth": 24, "dec_embed_dim": 512},
    # ours, for small experiments: the decoder is no wider than the encoder
    "arm_tiny_pz16": {"embed_dim": 192, "depth": 12, "dec_embed_dim": 192},
    "arm_small_pz16": {"embed_dim": 384, "depth": 12, "dec_embed_dim": 384},
}

# Suffixes of the parameters that each scan direction owns; the names are those of the published checkpoints.
ONE_DIRECTION = ("",)  # row-major forward
FOUR_DIRECTIONS = ("", "_b", "_c", "_c_b")  # row-major forward, backward, column-major forward, backward


def scan_orders(grid: tuple[int, int]) -> Tensor:
    """Return the token orders of the four directions over a grid, with a class token in the middle of the sequence.

    The class token has index M // 2 in the row-major sequence of M = rows * columns patches, and in the column-major
    one. A backward direction reads the whole forward sequence in reverse.

    Args:
        grid: rows and columns of patches.

    Returns:
        (4, M + 1) int64, on the CPU; entry [k, t] is the row-major index of the token that direction k reads at step t.
        Directions are in the order of `FOUR_DIRECTIONS`.
    """
    rows, columns = grid
    middle = rows * columns // 2
    patches = torch.arange(rows * columns, device="cpu")
    patches += patches >= middle  # the class token takes index `middle`
    column_major = patches.view(rows, columns).t().flatten()  # (rows, columns) -> (columns * rows,)
    token = torch.tensor([middle], device="cpu")
    forward = [torch.cat([p[:middle], token, p[middle:]]) for p in (patches, column_major)]
    return torch.stack([order for tokens in forward for order in (tokens, tokens.flip(0))])


MAX_SIZE = 2**31  # some 28 billion parameters; ARM-huge has 24 x 1536^2 = 0.03 x 2^31


def check_size(embed_dim: int, depth: int) -> None:
    """Raise ValueError for a width and depth that exceed any memory."""
    if depth * embed_dim**2 > MAX_SIZE:
        raise ValueError(f"{depth} blocks of {embed_dim} channels are too many: depth x channels^2 exceeds {MAX_SIZE}")


def grid_of(img_size: int | tuple[int, int], unit: int, what: str) -> tuple[int, int]:
    """Return the rows and columns of `unit`-pixel squares in an image.

    Raises:
        ValueError: the image does not divide into `what`; the message has the nearest sizes that do.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if unit < 1:
        raise ValueError(f"{what} of {unit} pixels: they need at least one")
    for pixels in size:
        if pixels <= 0 or pixels % unit:
            below = pixels // unit * unit
            nearest = " or ".join(str(s) for s in (below, below + unit) if s > 0)
            raise ValueError(f"image size {pixels} does not divide into {what} of {unit} pixels; nearest: {nearest}")
    return size[0] // unit, size[1] // unit


# From the grid of the clusters' raster indices to their order; None stands for rows, or an order for each image.
ORDERS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "row": lambda grid: None,
    "row_reverse": lambda grid: grid.flatten().flip(0),
    "column": lambda grid: grid.t().flatten(),
    "column_reverse": lambda grid: grid.t().flatten().flip(0),
    # with a separate generator, so that the initial weights do not depend on the order
    "random": lambda grid: torch.randperm(
        grid.numel(), generator=torch.Generator().manual_seed(torch.initial_seed()), device="cpu"
    ),
    "random_per_image": lambda grid: None,
}


def cluster_order(order: str, clusters: tuple[int, int]) -> Tensor | None:
    """Return an order of `ORDERS` for a grid of (rows, columns) clusters; raise ValueError for an unknown one.

    Returns:
        Raster indices, (rows * columns,) int64 on the CPU; None for rows, or where each image has its own order.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; choose from {', '.join(ORDERS)}")
    raster = torch.arange(clusters[0] * clusters[1], device="cpu")
    return ORDERS[order](raster.view(clusters))  # (rows * columns,) -> (rows, columns)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, linearly embedded: (B, in_chans, H, W) -> (B, H / p, W / p, C)."""

    def __init__(self, patch_size: int, embed_dim: int, in_chans: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        # LeCun's normal initialisation of timm before 0.6, which the released code uses. It divides by 0.87962566, the
        # standard deviation of a unit normal truncated at two deviations, but truncates at the values -2 and 2, which
        # no draw reaches. Later versions truncate at two deviations: their standard deviation is 1 / sqrt(fan_in).
        fan_in = self.proj.weight[0].numel()
        nn.init.normal_(self.proj.weight, std=fan_in**-0.5 / 0.87962566)
        nn.init.zeros_(self.get_parameter("proj.bias"))

    def forward(self, imgs: Tensor) -> Tensor:
        if imgs.shape[1] != self.proj.in_channels:
            raise ValueError(f"images of {imgs.shape[1]} channels, the model takes {self.proj.in_channels}: in_chans")
        # One matrix product: a step of ARM-base takes 64 ms on an H200, and 67 ms with cuDNN's convolution.
        p = self.proj.kernel_size[0]
        squares = imgs.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, in_chans, h, p, w, p)
        patches = squares.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, h, w, in_chans p p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # weight (C, in_chans, p, p)


class Mixer(nn.Module):
    """Mamba mixer (Gu & Dao 2023) with expansion 1 and one selective scan per direction.

    The directions share `in_proj`, the gate and `out_proj`; each has its own convolution, projections, A and D.
    The gate of a token is the same in every direction, so gating the mean of the directions once is exact.

    Args:
        dim: channels C.
        out_scale: factor on the initial `out_proj` weight (1 / sqrt(depth) in ARM).
        directions: parameter suffixes, `ONE_DIRECTION` or `FOUR_DIRECTIONS`.
        scan_backend: see `ops.choose_backend`.
        d_state: states N per channel.
        d_conv: width of the causal convolution.
    """

    def __init__(
        self,
        dim: int,
        out_scale: float = 1.0,
        directions: tuple[str, ...] = ONE_DIRECTION,
        scan_backend: str = "auto",
        d_state: int = 16,
        d_conv: int = 4,
    ) -> None:
        super().__init__()
        check_backend(scan_backend)
        self.directions, self.scan_backend, self.d_state = directions, scan_backend, d_state
        self.dt_rank = math.ceil(dim / 16)
        # Registration order is that of the published code: optimizer states are stored by it.
        for s in directions:
            a_log = torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(dim, 1)  # (C, N)
            self.register_parameter(f"A{s}_log", nn.Parameter(a_log))
            self.register_parameter(f"D{s}", nn.Parameter(torch.ones(dim)))
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        for s in directions:
            self.add_module(f"conv1d{s}", nn.Conv1d(dim, dim, d_conv, groups=dim))
            self.add_module(f"x_proj{s}", nn.Linear(dim, self.dt_rank + 2 * d_state, bias=False))
            dt_proj = nn.Linear(self.dt_rank, dim)
            self.add_module(f"dt_proj{s}", dt_proj)
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            if s == "":
                dt = torch.empty(dim).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
                with torch.no_grad():
                    dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            else:
                nn.init.zeros_(dt_proj.bias)  # as in the published code; a pretrained scan overwrites it
        self.out_proj = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight.mul_(out_scale)

    def _stacked(self, name: str) -> Tensor:
        """Stack the parameter `name`, with {} for the suffix, of all K directions: (K, *shape)."""
        return torch.stack([attrgetter(name.format(s))(self) for s in self.directions])

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Mix tokens along each direction and average the directions.

        Args:
            x: (B, L, C).
            order: (K, L) int64 as from `scan_orders`; None means left to right in every direction.

        Returns:
            (B, L, C).
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, C) each
        u = causal_conv1d(
            x, self._stacked("conv1d{}.weight").squeeze(2), self._stacked("conv1d{}.bias"), order, self.scan_backend
        )  # (K, B, L, C)
        y = selective_ssm(
            u,
            self._stacked("x_proj{}.weight"),
            self._stacked("dt_proj{}.weight"),
            -self._stacked("A{}_log").exp(),
            self._stacked("D{}"),
            self._stacked("dt_proj{}.bias"),
            order,
            self.scan_backend,
        )  # (K, B, L, C)
        K = len(y)
        # A sum, not a mean: its gradient is one tensor for all directions, a mean's would be written K times. Without
        # `dtype`, autocast would compute it in float32. The sum over a single direction would be a copy.
        y = y.squeeze(0) if K == 1 else y.sum(dim=0, dtype=y.dtype)  # (K, B, L, C) -> (B, L, C)
        return self.out_proj(y * (F.silu(z) / K))


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x) with hidden width 2/3 of 4 C (Shazeer 2020): (..., C) -> (..., C).

    w1 and w2 keep their names in checkpoints and are concatenated for one product, which reads x once. The hidden width
    is padded with zeros to a multiple of 8 for tensor cores (ARM-large has 2730).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim * 4 * 2 // 3
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for w in (self.w1, self.w2, self.w3):
            nn.init.zeros_(w.bias)

    def forward(self, x: Tensor) -> Tensor:
        pad = -self.w1.out_features % 8
        weight = torch.cat([F.pad(w.weight, (0, 0, 0, pad)) for w in (self.w1, self.w2)])  # (2 * padded hidden, C)
        bias = torch.cat([F.pad(w.bias, (0, pad)) for w in (self.w1, self.w2)])
        hidden = swiglu(x, weight, bias)  # (..., padded hidden)
        return F.linear(hidden, F.pad(self.w3.weight, (0, pad)), self.w3.bias)


class Block(nn.Module):
    """Pre-norm residual block: mixer, then SwiGLU."""

    def __init__(self, dim: int, depth: int, directions: tuple[str, ...], scan_backend: str) -> None:
        super().__init__()
        self.mixer = Mixer(dim, depth**-0.5, directions, scan_backend)
        self.mlp = SwiGLU(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, h: Tensor, order: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Add both branches to h.

        Args:
            h: (B, L, C).
            order: see `Mixer.forward`.
            keep: (2, B, 1, 1), the factor of each branch for each image, see `drop_path_factors`; None is 1.

        Returns:
            (B, L, C).
        """
        return add_branches(h, [(self.norm1, lambda x: self.mixer(x, order)), (self.norm2, self.mlp)], keep)


def drop_path_factors(rates: Tensor, batch: int) -> Tensor:
    """Draw stochastic depth (Huang et al. 2016) for all blocks: factors 0, or 1 / (1 - rate) to keep the mean.

    The factors are inputs of the blocks, so that blocks of different rates share one compiled graph.

    Args:
        rates: (depth,) float32, the rate of each block, below 1.
        batch: images B.

    Returns:
        (depth, 2, B, 1, 1) float32: for each block, branch (mixer, SwiGLU) and image.
    """
    keep = (1 - rates).view(-1, 1, 1, 1, 1).expand(-1, 2, batch, 1, 1)  # (depth,) -> (depth, 2, B, 1, 1)
    return torch.bernoulli(keep) / keep


def run_block(block: nn.Module, recompute: bool, *args: Tensor | None) -> Tensor:
    """Call a block; with `recompute`, it runs again in the backward pass instead of keeping its activations."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def fill_buffers(model: Any, _: object) -> None:
    """Compute the buffers that no state dict holds, after loading one: a model built on "meta" has none yet."""
    model.init_non_persistent_buffers()
