"""The classifier: a Mamba encoder with a class token in the middle of the sequence, and a linear head."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba import (
    FOUR_DIRECTIONS,
    Block,
    PatchEmbed,
    check_size,
    drop_path_factors,
    fill_buffers,
    patch_grid,
    scan_orders,
)
from timm_models import INSTEAD, TimmModel, init_head, new_head, pooling
from util.pos_embed import insert_middle, resize_around_token


class ARMClassifier(TimmModel):
    """Mamba encoder with a class token in the middle of the sequence, and a linear head.

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
        directions: 4 scans rows and columns, forward and backward; 1 rows forward alone.

    Raises:
        ValueError: sizes that do not fit together, or a pooling that is unknown or does not suit (see `pooling`); the
            message names values that do.
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
        directions: int = 4,
    ) -> None:
        super().__init__()
        if directions not in (1, 4):
            raise ValueError(f"{directions} scan directions: choose 1 or 4")
        check_size(embed_dim, depth)
        names = FOUR_DIRECTIONS[:directions]
        self.grid_size = patch_grid(img_size, patch_size)
        self.patch_size, self.drop_path_rate = patch_size, drop_path_rate
        self.global_pool = pooling(global_pool, directions)
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim  # timm's names
        self.num_classes, self.drop_rate, self.in_chans = num_classes, drop_rate, in_chans
        self.dynamic_img_size, self.grad_checkpointing = dynamic_img_size, False
        num_patches = self.grid_size[0] * self.grid_size[1]

        # Registration order is that of the published code: optimizer states are stored by it.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, embed_dim, in_chans)
        self.head = new_head(embed_dim, num_classes)
        self.layers = nn.ModuleList(Block(embed_dim, depth, names, scan_backend) for _ in range(depth))
        self.norm_f = nn.LayerNorm(embed_dim)
        order = torch.empty(directions, num_patches + 1, dtype=torch.int64)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("drop_path_rates", torch.empty(depth), persistent=False)
        self.init_non_persistent_buffers()
        self.register_load_state_dict_post_hook(fill_buffers)

        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        init_head(self.head)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no state dict holds, on the device of the parameters; needed after `to_empty`.

        Loading a state dict does it too, and so does Hugging Face's TimmWrapper.
        """
        device, dtype = self.cls_token.device, self.cls_token.dtype
        rates = torch.linspace(0, self.drop_path_rate, len(self.drop_path_rates), device="cpu")
        self.drop_path_rates = F.pad(rates[:-1], (1, 0)).to(device, dtype)
        self.order = scan_orders(self.grid_size)[: len(self.order)].to(device)

    @torch.no_grad()
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another size from now on.

        The position embedding is interpolated to the new grid, the patch embedding to the new patches. Parameters that
        change are new objects: make optimizers afterwards.

        Args:
            img_size: pixels, one side or (height, width); None keeps it.
            patch_size: pixels a side; None keeps it.

        Raises:
            ValueError: patches that are not square, or do not divide the images; the message names sizes that fit.
        """
        sides = {patch_size} if isinstance(patch_size, int) else set(patch_size or (self.patch_size,))
        if len(sides) > 1:
            raise ValueError(f"patches of {tuple(patch_size)} pixels: they have to be square")
        (side,) = sides
        if img_size is None:
            img_size = tuple(self.patch_size * n for n in self.grid_size)
        grid = patch_grid(img_size, side)
        if side != self.patch_size:
            old = self.patch_embed.proj
            self.patch_embed = PatchEmbed(side, self.embed_dim, self.in_chans).to(old.weight)
            self.patch_embed.proj.weight.copy_(resample_patch_embed(old.weight, [side, side]))
            self.patch_embed.proj.bias.copy_(old.bias)
        self.pos_embed = nn.Parameter(resize_around_token(self.pos_embed, self.grid_size, grid))
        self.grid_size, self.patch_size = grid, side
        self.init_non_persistent_buffers()
        self.record_input_size((grid[0] * side, grid[1] * side))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size

    def for_grid(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Position embedding (1, M + 1, C) and scan order (directions, M + 1) of a grid of M patches.

        Raises:
            ValueError: not the model's grid, and it is not dynamic.
        """
        if grid == self.grid_size:
            return self.pos_embed, self.order
        if not self.dynamic_img_size:
            size, want = (tuple(self.patch_size * side for side in g) for g in (grid, self.grid_size))
            raise ValueError(f"images of {size} pixels, the model takes {want}: build it with dynamic_img_size=True")
        order = scan_orders(grid)[: len(self.order)].to(self.order.device)
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
            TypeError: torch.fx traces it.
        """
        if isinstance(imgs, torch.fx.Proxy):
            raise TypeError(f"torch.fx cannot trace this model, {INSTEAD}")
        pos_embed, order = self.for_grid(patch_grid(imgs.shape[-2:], self.patch_size))
        x = self.patch_embed(imgs).flatten(1, 2)  # (B, rows, columns, C) -> (B, M, C)
        h = insert_middle(x, self.cls_token.expand(x.shape[0], -1, -1)) + pos_embed  # (B, M + 1, C)
        layers = self.layers[:depth]
        keep = [None] * len(layers)
        if self.training and self.drop_path_rate:
            keep = drop_path_factors(self.drop_path_rates, len(h))[: len(layers)]
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
