"""ARM: autoregressive pretraining of a Mamba encoder and its classifier (Ren et al., ICLR 2025, arXiv 2406.07537).

model = create_pretrain_model("arm_base_pz16", norm_pix_loss=True)
loss = model(imgs).mean()

classifier = create_classifier("arm_base_pz16", num_classes=1000)
logits = classifier(imgs)
"""

from collections.abc import Collection
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba import FOUR_DIRECTIONS, ONE_DIRECTION, Block, PatchEmbed, drop_path_factors, scan_orders
from ops import unavailable
from timm_models import TimmModel, init_head, new_head, pooling, register
from util.pos_embed import insert_middle, resize_around_token, sincos_pos_embed

SIZES = {
    # published (paper, section 4.1)
    "arm_base_pz16": {"embed_dim": 768, "depth": 12, "dec_embed_dim": 512},
    "arm_large_pz16": {"embed_dim": 1024, "depth": 24, "dec_embed_dim": 512},
    "arm_huge_pz16": {"embed_dim": 1536, "depth": 24, "dec_embed_dim": 512},
    # ours, for small experiments: the decoder is no wider than the encoder
    "arm_tiny_pz16": {"embed_dim": 192, "depth": 12, "dec_embed_dim": 192},
    "arm_small_pz16": {"embed_dim": 384, "depth": 12, "dec_embed_dim": 384},
}


def create_pretrain_model(name: str, **overrides: object) -> "ARMPretrain":
    """The pretraining model of a published or own size (`SIZES`).

    Args:
        name: key of `SIZES`.
        **overrides: keyword arguments of `ARMPretrain` that replace the values of that size.

    Raises:
        ValueError: unknown name, or sizes that do not fit together; the message names values that do.
    """
    return ARMPretrain(**{**_size(name), **overrides})


def create_classifier(name: str, **overrides: object) -> "ARMClassifier":
    """The classifier of a published or own size (`SIZES`).

    Args:
        name: key of `SIZES`.
        **overrides: keyword arguments of `ARMClassifier` that replace the values of that size.

    Raises:
        ValueError: unknown name, or sizes that do not fit together; the message names values that do.
    """
    size = _size(name)
    del size["dec_embed_dim"]
    return ARMClassifier(**{**size, **overrides})


def compiles(asked: bool | None, device: torch.device) -> bool:
    """Whether a run on `device` compiles its model: as asked, else on GPUs where Triton works, as compiling needs."""
    return asked if asked is not None else device.type == "cuda" and unavailable("triton") is None


def _size(name: str) -> dict[str, int]:
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(SIZES)}")
    return dict(SIZES[name])


def _grid(img_size: int | tuple[int, int], unit: int, what: str) -> tuple[int, int]:
    """Rows and columns of `unit`-pixel squares in an image; ValueError with the nearest sizes if it does not divide."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    for pixels in size:
        if pixels <= 0 or pixels % unit:
            below = pixels // unit * unit
            nearest = " or ".join(str(s) for s in (below, below + unit) if s > 0)
            raise ValueError(f"image size {pixels} does not divide into {what} of {unit} pixels; nearest: {nearest}")
    return size[0] // unit, size[1] // unit


def _zero_bias(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)


def _xavier(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
    _zero_bias(module)


class CrossAttention(nn.Module):
    """Multi-head attention of queries (B or 1, n, C) over context (B, n, C), heads of 64 channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = dim // 64
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, n, C) -> (B, heads, n, 64)

        k, v = self.kv(context).chunk(2, dim=-1)
        q = heads(self.q(queries)).expand(len(context), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, heads(k), heads(v), attn_mask=mask.to(q.dtype))
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, heads, n, 64) -> (B, n, C)


class DecoderBlock(nn.Module):
    """Cross-attention to the latents, then MLP; the queries never attend to each other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn2 = CrossAttention(dim)
        self.norm2_1, self.norm2_2, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, queries: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        queries = queries + self.attn2(self.norm2_1(queries), self.norm2_2(latents), mask)
        return queries + self.mlp(self.norm2(queries))


class ARMPretrain(nn.Module):
    """Predicts the pixels of each cluster of patches from the clusters before it.

    The grid of patches is cut into clusters of `cluster_size` x `cluster_size` patches. The sequence runs over
    clusters in raster order and, inside a cluster, over patches in raster order. The encoder reads every cluster
    but the last (n tokens) and the decoder predicts every cluster but the first (n positions).

    Args:
        img_size: pixels, one side or (height, width).
        patch_size: pixels a side, p.
        cluster_size: patches a side.
        embed_dim: encoder channels C.
        depth: encoder blocks.
        dec_embed_dim: decoder channels Cd, a multiple of 64 (one attention head each).
        dec_depth: decoder blocks; block j reads the encoder after the j-th of `taps`.
        norm_pix_loss: standardise the target pixels of each patch.
        scan_backend: see `ops.choose_backend`.

    Raises:
        ValueError: sizes that do not fit together; the message names values that do.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 192,
        patch_size: int = 16,
        cluster_size: int = 4,
        embed_dim: int = 768,
        depth: int = 12,
        dec_embed_dim: int = 512,
        dec_depth: int = 4,
        norm_pix_loss: bool = False,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        clusters = _grid(img_size, patch_size * cluster_size, f"{cluster_size} x {cluster_size}-patch clusters")
        if clusters == (1, 1):
            raise ValueError(f"image size {img_size} holds a single cluster: there is no next one to predict")
        if embed_dim % 4 or embed_dim <= 0:
            raise ValueError(f"encoder width {embed_dim} is not a multiple of 4, as its position embedding needs")
        if dec_embed_dim % 64 or dec_embed_dim <= 0:
            raise ValueError(f"decoder width {dec_embed_dim} is not a multiple of 64, the width of a head")
        self.patch_size, self.cluster_size, self.norm_pix_loss = patch_size, cluster_size, norm_pix_loss
        self.embed_dim = embed_dim
        self.grid_size = (clusters[0] * cluster_size, clusters[1] * cluster_size)
        self.taps = decoder_taps(depth, dec_depth)
        self.dec_depth = dec_depth
        num_patches, per_cluster = self.grid_size[0] * self.grid_size[1], cluster_size**2

        # Registration order is that of the published code: optimizer states are stored by it.
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid_size), requires_grad=False)
        self.ar_token = nn.Parameter(torch.zeros(1, 1, dec_embed_dim))
        self.dec_pos_embed = nn.Parameter(sincos_pos_embed(dec_embed_dim, self.grid_size), requires_grad=False)
        cluster = torch.arange(num_patches - per_cluster) // per_cluster
        visible = cluster[:, None] >= cluster[None, :]  # the queries of cluster i + 1 see clusters 0..i
        self.register_buffer("mask", torch.zeros(visible.shape).masked_fill(~visible, float("-inf")))
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.layers = nn.ModuleList(Block(embed_dim, depth, ONE_DIRECTION, scan_backend) for _ in range(depth))
        self.enc2dec = nn.Linear(embed_dim * dec_depth, dec_embed_dim * dec_depth)
        self.dec_block = nn.ModuleList(DecoderBlock(dec_embed_dim) for _ in range(dec_depth))
        for j in range(1, dec_depth + 1):
            self.add_module(f"norm_{j}", nn.LayerNorm(embed_dim))
        self.ar_norm = nn.LayerNorm(dec_embed_dim)
        self.ar_pred = nn.Linear(dec_embed_dim, 3 * patch_size**2)

        trunc_normal_(self.ar_token, std=0.02)
        _zero_bias(self.enc2dec)
        _zero_bias(self.ar_pred)
        _xavier(self.dec_block)
        self.register_load_state_dict_pre_hook(_supply_mask)

    def to_clusters(self, patches: Tensor) -> Tensor:
        """Raster order -> cluster order: (B, rows * columns, X) -> (B, clusters, patches of a cluster, X)."""
        c, columns = self.cluster_size, self.grid_size[1]
        return rearrange(patches, "b (R i S j) x -> b (R S) (i j) x", S=columns // c, i=c, j=c)

    def patchify(self, imgs: Tensor) -> Tensor:
        """Pixels of each patch in (row, column, channel) order: (B, 3, H, W) -> (B, rows * columns, 3 * p * p)."""
        p = self.patch_size
        return rearrange(imgs, "b channel (h p) (w q) -> b (h w) (p q channel)", p=p, q=p)

    def to_images(self, tokens: Tensor) -> Tensor:
        """Undo `patchify` and `to_clusters`: (B, clusters, patches of a cluster, 3 * p * p) -> (B, 3, H, W)."""
        c, p, columns = self.cluster_size, self.patch_size, self.grid_size[1]
        pattern = "b (R S) (i j) (p q channel) -> b channel (R i p) (S j q)"
        return rearrange(tokens, pattern, S=columns // c, i=c, j=c, p=p, q=p)

    def embed(self, imgs: Tensor) -> Tensor:
        """Embedded patches in cluster order: (B, 3, H, W) -> (B, clusters, patches of a cluster, C)."""
        x = self.patch_embed(imgs).flatten(1, 2) + self.pos_embed  # (B, rows, columns, C) -> (B, M, C)
        return self.to_clusters(x)

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Encode every cluster: (B, 3, H, W) -> (B, M, C) after the last block, patches in cluster order.

        A token depends on those before it only, so all but the last cluster's are those that pretraining computes.
        """
        h = self.embed(imgs).flatten(1, 2)  # (B, clusters, c * c, C) -> (B, M, C)
        for layer in self.layers:
            h = layer(h)
        return h

    def forward_encoder(self, imgs: Tensor) -> Tensor:
        """Encode every cluster but the last: (B, 3, H, W) -> latents (B, n, Cd, dec_depth), one for each block."""
        h = self.embed(imgs)[:, :-1].flatten(1, 2)  # (B, clusters - 1, c * c, C) -> (B, n, C)
        h = h.contiguous()  # as every later block finds it: one compiled graph serves all
        taps = []
        for i, layer in enumerate(self.layers, start=1):
            h = layer(h)
            if i in self.taps:
                taps.append(h)
        return self.read_taps(taps)

    def read_taps(self, taps: list[Tensor]) -> Tensor:
        """Latents for each decoder block from the encoder's output at each tap.

        Channel c * dec_depth + j of `enc2dec` belongs to decoder block j. The rows of its weight are sorted by block
        before the product, which costs less than gathering every block's channels after it.

        Args:
            taps: dec_depth tensors (B, n, C).

        Returns:
            (B, n, Cd, dec_depth).
        """
        normed = [self.get_submodule(f"norm_{j}")(tap) for j, tap in enumerate(taps, start=1)]
        by_block = "(c j) ... -> (j c) ..."
        weight, bias = (rearrange(p, by_block, j=self.dec_depth) for p in (self.enc2dec.weight, self.enc2dec.bias))
        latents = F.linear(torch.cat(normed, dim=-1), weight, bias)  # (B, n, dec_depth * C) -> (B, n, dec_depth * Cd)
        return latents.unflatten(-1, (self.dec_depth, -1)).mT  # (B, n, dec_depth, Cd) -> (B, n, Cd, dec_depth)

    def forward_decoder(self, latents: Tensor) -> Tensor:
        """Predict the pixels of every cluster but the first: (B, n, Cd, dec_depth) -> (B, n, 3 * p * p)."""
        queries = self.to_clusters(self.ar_token + self.dec_pos_embed)[:, 1:].flatten(1, 2)  # (1, n, Cd)
        for block, context in zip(self.dec_block, latents.unbind(-1), strict=True):
            queries = block(queries, context, self.mask)
        return self.ar_pred(self.ar_norm(queries))

    @torch.no_grad()
    def predicted_images(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """Images whose first cluster is given and whose others are each predicted from the true clusters before it.

        With `norm_pix_loss`, standardised patches are predicted: mean and variance come from the true patch, as in
        MAE's pictures.

        Args:
            imgs: (B, 3, H, W), normalised.

        Returns:
            (B, 3, H, W), normalised; and what each patch adds to the loss, (B, rows, columns), nan where it is given.
        """
        pred = self.forward_decoder(self.forward_encoder(imgs)).to(imgs.dtype)  # (B, n, 3pp)
        losses = (pred - self.target(imgs)).square().mean(dim=-1)  # (B, n)
        clusters = self.to_clusters(self.patchify(imgs))  # (B, clusters, c * c, 3pp)
        pred = pred.unflatten(1, (-1, clusters.shape[2]))  # (B, n, 3pp) -> (B, clusters - 1, c * c, 3pp)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(clusters[:, 1:], dim=-1, keepdim=True)
            pred = pred * (var + 1e-6).sqrt() + mean
        given = torch.full_like(losses[:, : clusters.shape[2]], float("nan"))
        losses = torch.cat([given, losses], dim=1)  # (B, M), in the order of the sequence
        c, columns = self.cluster_size, self.grid_size[1]
        losses = rearrange(losses, "b (R S i j) -> b (R i) (S j)", S=columns // c, i=c, j=c)
        return self.to_images(torch.cat([clusters[:, :1], pred], dim=1)), losses

    def target(self, imgs: Tensor) -> Tensor:
        """What `forward_decoder` should predict: (B, 3, H, W) -> (B, n, 3 * p * p)."""
        target = self.to_clusters(self.patchify(imgs))[:, 1:]  # (B, clusters - 1, c * c, 3pp)
        target = target.flatten(1, 2)  # (B, n, 3pp)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)  # unbiased
            target = (target - mean) / (var + 1e-6).sqrt()
        return target

    def forward_loss(self, imgs: Tensor, pred: Tensor) -> Tensor:
        """Squared error per predicted position, averaged over batch and pixels: (n,)."""
        return (pred - self.target(imgs)).square().mean(dim=(0, 2))

    def compile(self, **options: object) -> None:
        """Compile in place, block by block: all blocks of a kind share one graph, so this takes seconds at any depth.

        Keyword arguments are those of `torch.compile`. Names in the state dict stay.
        """
        for block in (*self.layers, *self.dec_block):
            block.compile(**options)
        for name in ("read_taps", "forward_loss"):  # bound anew, so that a deep copy binds them to itself
            setattr(self, name, MethodType(torch.compile(getattr(type(self), name), **options), self))

    def forward(self, imgs: Tensor) -> Tensor:
        """Loss per predicted position (n,); the training loss is its mean."""
        return self.forward_loss(imgs, self.forward_decoder(self.forward_encoder(imgs)))


def decoder_taps(depth: int, dec_depth: int) -> list[int]:
    """After how many encoder blocks each decoder block reads: linspace(depth / 2, depth, dec_depth), rounded.

    A single decoder block reads the last encoder block.

    Raises:
        ValueError: no block, or a depth too small for distinct taps.
    """
    if depth < 1 or dec_depth < 1:
        raise ValueError(f"encoder and decoder need at least one block each, not {depth} and {dec_depth}")
    taps = torch.linspace(depth, depth / 2, dec_depth, dtype=torch.float64, device="cpu").flip(0).tolist()
    taps = [round(tap) for tap in taps]
    if len(set(taps)) < dec_depth or taps[0] < 1:
        raise ValueError(f"depth {depth} is too small for {dec_depth} decoder blocks: they would share encoder blocks")
    return taps


def _supply_mask(model: ARMPretrain, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """A checkpoint may lack the attention mask, which the sizes determine."""
    state_dict.setdefault(f"{prefix}mask", model.mask)


class ARMClassifier(TimmModel):
    """Four-direction Mamba encoder with a class token in the middle of the sequence, and a linear head.

    Args:
        img_size: pixels, one side or (height, width).
        patch_size: pixels a side.
        num_classes: outputs of the head; 0 leaves it out.
        drop_path_rate: stochastic depth; block i drops with element i of [0] + linspace(0, rate, depth).
        global_pool: True or "avg" pools the mean over both halves of the patches around the class token; False or
            "token" takes the class token; "" leaves the tokens.
        embed_dim: channels C.
        depth: blocks.
        scan_backend: see `ops.choose_backend`.
        drop_rate: dropout before the head.
        dynamic_img_size: take images of any size that divides into patches, with the position embedding
            interpolated; else only `img_size`.
        in_chans: channels of the images.

    Raises:
        ValueError: sizes that do not fit together, or unknown pooling; the message names values that do.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        global_pool: bool | str = True,
        embed_dim: int = 768,
        depth: int = 12,
        scan_backend: str = "auto",
        drop_rate: float = 0.0,
        dynamic_img_size: bool = False,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.grid_size = _grid(img_size, patch_size, "patches")
        self.patch_size, self.global_pool, self.drop_path_rate = patch_size, pooling(global_pool), drop_path_rate
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim  # timm's names
        self.num_classes, self.drop_rate, self.in_chans = num_classes, drop_rate, in_chans
        self.dynamic_img_size, self.grad_checkpointing = dynamic_img_size, False
        num_patches = self.grid_size[0] * self.grid_size[1]
        if num_patches < 2:
            raise ValueError(f"image size {img_size} holds a single patch: both halves around the class token need one")
        rates = torch.cat([torch.zeros(1), torch.linspace(0, drop_path_rate, depth)])[:depth].clone()

        # Registration order is that of the published code: optimizer states are stored by it.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, embed_dim, in_chans)
        self.head = new_head(embed_dim, num_classes)
        self.layers = nn.ModuleList(Block(embed_dim, depth, FOUR_DIRECTIONS, scan_backend) for _ in range(depth))
        self.norm_f = nn.LayerNorm(embed_dim)
        self.register_buffer("order", scan_orders(self.grid_size), persistent=False)
        self.register_buffer("drop_path_rates", rates, persistent=False)

        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        init_head(self.head)

    def for_grid(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Position embedding (1, M + 1, C) and scan order (4, M + 1) of a grid of M patches.

        Raises:
            ValueError: not the model's grid, and it is not dynamic.
        """
        if grid == self.grid_size:
            return self.pos_embed, self.order
        if not self.dynamic_img_size:
            size, want = (tuple(self.patch_size * side for side in g) for g in (grid, self.grid_size))
            raise ValueError(f"images of {size} pixels, the model takes {want}: build it with dynamic_img_size=True")
        order = scan_orders(grid).to(self.order.device)
        return resize_around_token(self.pos_embed, self.grid_size, grid), order

    def encode(self, imgs: Tensor, taps: Collection[int] = (), depth: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks.

        Args:
            imgs: (B, in_chans, H, W).
            taps: indices of blocks whose output is returned too.
            depth: how many blocks run; None is all.

        Returns:
            Tokens (B, M + 1, C) after the last block, and a list of those after each of `taps`.

        Raises:
            ValueError: an image size that does not fit; see `for_grid`.
        """
        pos_embed, order = self.for_grid(_grid(imgs.shape[-2:], self.patch_size, "patches"))
        x = self.patch_embed(imgs).flatten(1, 2)  # (B, rows, columns, C) -> (B, M, C)
        h = insert_middle(x, self.cls_token.expand(x.shape[0], -1, -1)) + pos_embed  # (B, M + 1, C)
        layers = self.layers[:depth]
        keep = [None] * len(layers)
        if self.training and self.drop_path_rate:
            keep = drop_path_factors(self.drop_path_rates, len(h))[:depth]
        tapped = []
        for i, (layer, factors) in enumerate(zip(layers, keep, strict=True)):
            if self.grad_checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, order, factors, use_reentrant=False)
            else:
                h = layer(h, order, factors)
            if i in taps:
                tapped.append(h)
        return h, tapped

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Normalised tokens, the class token in the middle: (B, in_chans, H, W) -> (B, M + 1, C)."""
        return self.norm_f(self.encode(imgs)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and classify: (B, M + 1, C) -> (B, num_classes), or (B, C) with `pre_logits`."""
        middle, pool = (x.shape[1] - 1) // 2, pooling(self.global_pool)
        if pool == "avg":
            x = (x[:, :middle].mean(dim=1) + x[:, middle + 1 :].mean(dim=1)) / 2
        elif pool == "token":
            x = x[:, middle]
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def compile(self, **options: object) -> None:
        """Compile in place, block by block, as `ARMPretrain.compile`."""
        for layer in self.layers:
            layer.compile(**options)

    def forward(self, imgs: Tensor) -> Tensor:
        """Logits: (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(imgs))


for _name in SIZES:
    register(_name, partial(create_classifier, _name))
