"""Position embeddings: the fixed sine-cosine table, and interpolation to another resolution."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed 2-D sine-cosine embedding, with the channels of MAE (He et al. 2022, util/pos_embed.py).

    The first half of the channels encodes the column of a patch, the second half its row; each half is
    sin(position * w) followed by cos(position * w) with w = 10000^(-i / (dim / 4)).

    Args:
        dim: channels, a multiple of 4.
        grid: rows and columns of patches.

    Returns:
        (1, rows * columns, dim) float32, patches in raster order; computed in float64.
    """
    rows, columns = grid
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(position: Tensor) -> Tensor:
        angle = position.flatten()[:, None] * omega  # (M, dim / 4)
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (M, dim / 2)

    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    return torch.cat([encode(column), encode(row)], dim=1).float()[None]


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate the rows of patches from one grid to another: bicubic, align_corners=False.

    Args:
        pos_embed: (1, rows * columns, C) of the old grid, without a class token.
        old: rows and columns of the old grid.
        new: rows and columns of the new grid.

    Returns:
        (1, new rows * new columns, C); the argument itself if the grids are equal.
    """
    if old == new:
        return pos_embed
    image = pos_embed.unflatten(1, old).permute(0, 3, 1, 2)  # (1, M, C) -> (1, C, rows, columns)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2)  # (1, C, rows, columns) -> (1, M', C)


def insert_middle(patches: Tensor, token: Tensor) -> Tensor:
    """Insert a class token (B, 1, C) at index M // 2 of patches (B, M, C): (B, M + 1, C)."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], token, patches[:, middle:]], dim=1)


def split_middle(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `insert_middle`: (B, M + 1, C) -> patches (B, M, C) and class token (B, 1, C)."""
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1), tokens[:, middle : middle + 1]


def resize_around_token(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Apply `resize_pos_embed` to all rows but the class token's in the middle: (1, M + 1, C) -> (1, M' + 1, C)."""
    if old == new:
        return pos_embed
    patches, token = split_middle(pos_embed)
    return insert_middle(resize_pos_embed(patches, old, new), token)
