"""The light decoder: cross-attention from queries to the encoder's latents (paper, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.fused import add_branches

TAPS = ("even", "last")


class CrossAttention(nn.Module):
    """Multi-head attention of queries (B or 1, m, C) over context (B, n, C), heads of 64 channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = dim // 64
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend: (B or 1, m, C), (B, n, C) -> (B, m, C); `mask` (m, n) is added to the attention's logits."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, n, C) -> (B, heads, n, 64)

        k, v = self.kv(context).chunk(2, dim=-1)
        q = heads(self.q(queries)).expand(len(context), -1, -1, -1)
        mask = None if mask is None else mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, heads(k), heads(v), attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, heads, m, 64) -> (B, m, C)


class MLP(nn.Module):
    """fc2(GELU(fc1 x)) with hidden width 4 C: (..., C) -> (..., C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DecoderBlock(nn.Module):
    """Cross-attention to the latents, then an MLP; the queries never attend to each other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn2 = CrossAttention(dim)
        self.norm2_1, self.norm2_2, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, queries: Tensor, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add both branches: queries (B or 1, m, C), latents (B, n, C), mask (m, n) or None -> (B, m, C)."""

        def attention(x: Tensor) -> Tensor:
            return self.attn2(x, self.norm2_2(latents), mask)

        return add_branches(queries, [(self.norm2_1, attention), (self.norm2, self.mlp)])


def decoder_taps(depth: int, dec_depth: int, kind: str = "even") -> list[int]:
    """Return which encoder block's output each decoder block reads, numbered from 1.

    Args:
        depth: encoder blocks.
        dec_depth: decoder blocks.
        kind: "even" is linspace(depth / 2, depth, dec_depth), rounded, and `depth` for a single decoder block; "last"
            is the last encoder block for all decoder blocks.

    Raises:
        ValueError: no blocks, too few encoder blocks for distinct outputs, or an unknown kind.
    """
    if depth < 1 or dec_depth < 1:
        raise ValueError(f"encoder and decoder need at least one block each, not {depth} and {dec_depth}")
    if kind not in TAPS:
        raise ValueError(f"unknown taps {kind!r}; choose from {', '.join(TAPS)}")
    if kind == "last":
        return [depth] * dec_depth
    taps = torch.linspace(depth, depth / 2, dec_depth, dtype=torch.float64, device="cpu").flip(0).round().int().tolist()
    if len(set(taps)) < dec_depth or taps[0] < 1:
        raise ValueError(
            f"depth {depth} is too small for {dec_depth} decoder blocks: they would share encoder blocks, which only "
            "taps 'last' allows"
        )
    return taps


def init_xavier(module: nn.Module) -> None:
    """Initialise all linear layers: weights by Xavier's uniform distribution, biases with zeros."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
