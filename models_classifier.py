"""A Mamba encoder with a class token in the middle of the sequence: with a head the classifier, or with a pyramid."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, resample_patch_embed, to_2tuple, trunc_normal_
from torch import Tensor, nn

from mamba import (
    FOUR_DIRECTIONS,
    Block,
    PatchEmbed,
    check_size,
    drop_path_factors,
    fill_buffers,
    grid_of,
    run_block,
    scan_orders,
)
from timm_models import INSTEAD, TimmModel, chosen, init_head, new_head, pooling
from util.pos_embed import insert_middle, resize_around_token, split_middle


def patch_grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of a classifier's patches; raise ValueError for one patch, or see `grid_of`."""
    grid = grid_of(img_size, patch_size, "patches")
    if grid == (1, 1):
        raise ValueError(f"image size {img_size} holds a single patch: both halves around the class token need one")
    return grid


class ARMClassifier(TimmModel):
    """Mamba encoder with a class token in the middle of the sequence, and a linear head.

    Args:
        img_size: pixels, one side or (height, width).
        patch_size: pixels a side.
        num_classes: outputs of the head; 0 builds no head.
        drop_path_rate: stochastic depth; block i is dropped at rate i of [0] + linspace(0, drop_path_rate, depth).
        global_pool: True or "avg" averages the means of the patches before and after the class token; False or "token"
            takes the class token; "" keeps all tokens.
        embed_dim: channels C.
        depth: blocks.
        scan_backend: see `ops.choose_backend`.
        drop_rate: dropout before the head.
        dynamic_img_size: accept images of any size that divides into patches, with the position embedding interpolated;
            otherwise only `img_size`.
        in_chans: channels of the images.
        dynamic_img_pad: pad images with zeros, at the bottom and on the right, to a multiple of `patch_size`. Padded
            patches are scanned and pooled as the others are, and feature maps contain them.
        directions: 4 scans rows and columns, forward and backward; 1 scans rows forward only.

    Raises:
        ValueError: sizes that do not fit together, or an unknown or unsuitable pooling (see `pooling`); the message
            names values that do.
    """

    drop_path_rates: Tensor
    pad_patches = 1  # `dynamic_img_pad` pads to a multiple of so many patches

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
        dynamic_img_pad: bool = False,
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
        self.dynamic_img_size, self.dynamic_img_pad = dynamic_img_size, dynamic_img_pad
        self.grad_checkpointing, self.frozen_layers = False, 0
        num_patches = self.grid_size[0] * self.grid_size[1]

        # Registration order is that of the published code: optimizer states are stored by it.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, embed_dim, in_chans)
        self.head = new_head(embed_dim, num_classes)
        self.layers = nn.ModuleList(Block(embed_dim, depth, names, scan_backend) for _ in range(depth))
        self.norm_f = nn.LayerNorm(embed_dim)
        self.register_buffer("order", torch.empty(directions, num_patches + 1, dtype=torch.int64), persistent=False)
        self.register_buffer("drop_path_rates", torch.empty(depth), persistent=False)
        self.init_non_persistent_buffers()
        self.register_load_state_dict_post_hook(fill_buffers)

        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        init_head(self.head)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no state dict holds, on the device of the parameters; needed after `to_empty`.

        Loading a state dict does it too. Hugging Face's TimmWrapper calls this method.
        """
        device, dtype = self.cls_token.device, self.cls_token.dtype
        rates = torch.linspace(0, self.drop_path_rate, len(self.drop_path_rates), device="cpu")
        self.drop_path_rates = F.pad(rates[:-1], (1, 0)).to(device, dtype)
        self.order = scan_orders(self.grid_size)[: len(self.order)].to(device)

    @torch.no_grad()
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the size of images and patches that the model accepts.

        The position embedding is interpolated to the new grid, the patch embedding to the new patches. Parameters that
        change are new objects: make optimizers afterwards.

        Args:
            img_size: pixels, one side or (height, width); None keeps it.
            patch_size: pixels a side; None keeps it.

        Raises:
            ValueError: patches that are not square, or do not divide the images; the message names sizes that fit.
        """
        sides = (patch_size,) if isinstance(patch_size, int) else tuple(patch_size or (self.patch_size,))
        if len({*sides}) > 1:
            raise ValueError(f"patches of {sides} pixels: they have to be square")
        side = sides[0]
        grid = patch_grid(self.image_size if img_size is None else img_size, side)
        if side != self.patch_size:
            old = self.patch_embed.proj
            self.patch_embed = PatchEmbed(side, self.embed_dim, self.in_chans).to(old.weight)
            self.patch_embed.requires_grad_(old.weight.requires_grad)
            new = {"weight": resample_patch_embed(old.weight, [side, side]), "bias": old.get_parameter("bias")}
            self.patch_embed.proj.load_state_dict(new)
        pos_embed = resize_around_token(self.pos_embed, self.grid_size, grid)
        self.pos_embed = nn.Parameter(pos_embed, self.pos_embed.requires_grad)
        self.grid_size, self.patch_size = grid, side
        self.init_non_persistent_buffers()
        self.record_input_size((grid[0] * side, grid[1] * side))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size

    def freeze(self, blocks: int | Literal["all"]) -> None:
        """Freeze the embeddings (patches, positions, class token) and the first `blocks`; "all": all but the head.

        Frozen blocks run without drop path, and keep nothing for the backward pass. "all" also freezes `norm_f`: a
        linear head can express its scale and shift.

        Raises:
            ValueError: the model has fewer blocks.
        """
        count = len(self.layers) if blocks == "all" else blocks
        if not 0 <= count <= len(self.layers):
            raise ValueError(f"the model has {len(self.layers)} blocks, not {count}")
        self.frozen_layers = count + 1  # counted as in util.lr_decay: the embeddings are a layer
        frozen = [self.patch_embed, *self.layers[:count], *[self.norm_f] * (blocks == "all")]
        for part in (self.cls_token, self.pos_embed, *frozen):
            part.requires_grad_(False)

    def for_grid(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return position embedding (1, M + 1, C) and scan order (directions, M + 1) of a grid of M patches.

        Raises:
            ValueError: another grid than the model's, without `dynamic_img_size`.
        """
        if grid == self.grid_size:
            return self.pos_embed, self.order
        if not self.dynamic_img_size:
            size, want = (tuple(self.patch_size * side for side in g) for g in (grid, self.grid_size))
            raise ValueError(f"images of {size} pixels, the model takes {want}: build it with dynamic_img_size=True")
        order = scan_orders(grid)[: len(self.order)].to(self.order.device)
        return resize_around_token(self.pos_embed, self.grid_size, grid), order

    def encode(
        self, imgs: Tensor, indices: Collection[int] = (), depth: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks.

        Args:
            imgs: (B, in_chans, H, W).
            indices: of the blocks whose outputs are returned too, from 0.
            depth: how many blocks run; None runs all.

        Returns:
            Tokens (B, M + 1, C) after the last block, and a list of those after each of `indices`.

        Raises:
            ValueError: an image size that does not fit; see `for_grid`.
            TypeError: torch.fx traces the model.
        """
        if isinstance(imgs, torch.fx.Proxy):
            raise TypeError(f"torch.fx cannot trace this model, {INSTEAD}")
        if self.dynamic_img_pad:
            unit = self.patch_size * self.pad_patches
            imgs = F.pad(imgs, (0, -imgs.shape[-1] % unit, 0, -imgs.shape[-2] % unit))
        with torch.no_grad() if self.frozen_layers else nullcontext():
            pos_embed, order = self.for_grid(patch_grid((imgs.shape[-2], imgs.shape[-1]), self.patch_size))
            x = self.patch_embed(imgs).flatten(1, 2)  # (B, rows, columns, C) -> (B, M, C)
            h = insert_middle(x, self.cls_token.expand(x.shape[0], -1, -1)) + pos_embed  # (B, M + 1, C)
        keep = drop_path_factors(self.drop_path_rates, len(h)) if self.training and self.drop_path_rate else None
        outputs = []
        for i, layer in enumerate(self.layers[:depth]):
            frozen = i + 1 < self.frozen_layers
            factors = None if keep is None or frozen else keep[i]  # (2, B, 1, 1)
            with torch.no_grad() if frozen else nullcontext():
                h = run_block(layer, self.grad_checkpointing, h, order, factors)
            if i in indices:
                outputs.append(h)
        return h, outputs

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Return normalised tokens, the class token in the middle: (B, in_chans, H, W) -> (B, M + 1, C)."""
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

    def compile(self, **options: Any) -> None:
        """Compile in place, block by block; see `PretrainModel.compile`."""
        for layer in self.layers:
            layer.compile(**options)

    def forward(self, imgs: Tensor) -> Tensor:
        """Return logits: (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(imgs))


def pyramid_level(coarser: int, dim: int, out_chans: int) -> nn.Sequential:
    """Return the layers of one map of `ARMPyramid`: (B, dim, h, w) -> (B, out_chans, h', w').

    h' is h halved `coarser` times: -2 and -1 are finer, 0 is the same, 1 coarser.
    """
    resize: list[nn.Module] = [nn.MaxPool2d(2)] * max(coarser, 0)
    if coarser < 0:
        resize = [nn.ConvTranspose2d(dim, dim // 2, 2, 2)]
        dim //= 2
    if coarser < -1:
        resize += [LayerNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim // 2, 2, 2)]
        dim //= 2
    return nn.Sequential(
        *resize,
        nn.Conv2d(dim, out_chans, 1, bias=False),
        LayerNorm2d(out_chans),
        nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
        LayerNorm2d(out_chans),
    )


class ARMPyramid(ARMClassifier):
    """Encoder that returns maps of four strides: the simple feature pyramid of ViTDet (Li et al. 2022, section 3).

    Each map is computed from normalised patches alone, by transposed convolutions or a maximum, then two convolutions.
    The strides are a quarter of the patch, half of it, the patch and two patches: 4, 8, 16 and 32 pixels for patches of
    16. Images of any size are padded with zeros, at the bottom and on the right, to a multiple of two patches. Maps end
    where the image does.

    Args:
        img_size: as for `ARMClassifier`: the grid of the position embedding.
        patch_size: pixels a side, a multiple of 4.
        out_chans: channels of each map.
        taps: "last" computes all maps from the last block, as ViTDet; "even" from the blocks at 1/4, 2/4, 3/4 and 4/4
            of the depth, the finest map from the first of them, as BEiT and MAE do for UperNet.
        output_stride: largest stride, one of the four; coarser maps get it too, as decoders with dilated convolutions
            ask for (DeepLabV3+). None is two patches.
        **encoder: other arguments of `ARMClassifier`. There is no head, and images may have any size.

    Raises:
        ValueError: see `ARMClassifier`; or patches that do not divide by 4, unknown taps, too few channels, or an
            argument that asks for a head or for images of one size.
    """

    pad_patches = 2

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        out_chans: int = 256,
        taps: str = "last",
        output_stride: int | None = None,
        **encoder: Any,
    ) -> None:
        check_strides(patch_size)
        fixed = {"num_classes": 0, "dynamic_img_size": True, "dynamic_img_pad": True}
        for name, value in fixed.items():
            if encoder.get(name, value) != value:
                raise ValueError(f"{name}={encoder[name]!r}: a pyramid has {name}={value}")
        super().__init__(img_size, patch_size, **encoder | fixed)
        depth = len(self.layers)
        blocks = {"last": [depth - 1] * 4, "even": [-(-depth * part // 4) - 1 for part in (1, 2, 3, 4)]}
        if taps not in blocks:
            raise ValueError(f"unknown taps {taps!r}; choose from {', '.join(blocks)}")
        if self.embed_dim < 4 or out_chans < 1:
            raise ValueError(f"maps of {out_chans} channels from {self.embed_dim}: they need at least 1 from 4")
        strides = [patch_size * 2**level // 4 for level in range(4)]
        last = 2 * patch_size if output_stride is None else output_stride
        if last not in strides:
            raise ValueError(f"output_stride {last}: choose from {', '.join(map(str, strides))}")
        self.taps, self.out_chans = blocks[taps], out_chans
        self.coarser = [min(level, strides.index(last)) - 2 for level in range(4)]  # than patches, in powers of 2
        self.pyramid = nn.ModuleDict(
            {str(level): pyramid_level(c, self.embed_dim, out_chans) for level, c in enumerate(self.coarser)}
        )

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """See `ARMClassifier.set_input_size`; the strides follow the patches, which have to divide by 4."""
        check_strides(*to_2tuple(patch_size or self.patch_size))
        super().set_input_size(img_size, patch_size)

    @property
    def feature_info(self) -> list[dict]:
        """Return module name, channels and stride of each map."""
        strides = [self.patch_size * 2 ** (2 + coarser) // 4 for coarser in self.coarser]
        return [
            {"module": f"pyramid.{level}", "num_chs": self.out_chans, "reduction": stride}
            for level, stride in enumerate(strides)
        ]

    def intermediates(
        self, imgs: Tensor, taken: Collection[int], norm: bool = True, stop_early: bool = False
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return tokens and maps; see `ARMClassifier.intermediates`.

        The maps (B, out_chans, H / stride, W / stride), rounded up, are those of the levels `taken`, always normalised.
        The class tokens are those of the blocks that the maps are computed from.
        """
        if removed := {str(level) for level in taken} - self.pyramid.keys():
            raise ValueError(f"prune_intermediate_layers has removed the maps {', '.join(sorted(removed))}")
        blocks = sorted({self.taps[level] for level in taken})
        h, states = self.encode(imgs, blocks, blocks[-1] + 1 if stop_early else None)
        rows = -(-imgs.shape[-2] // (2 * self.patch_size)) * 2
        inputs = {}
        for block, state in zip(blocks, states, strict=True):
            patches, token = split_middle(self.norm_f(state))
            inputs[block] = patches.unflatten(1, (rows, -1)).permute(0, 3, 1, 2), token  # (B, M, C) -> (B, C, h, w)
        found = []
        for level in sorted({*taken}):
            patches, token = inputs[self.taps[level]]
            height, width = (-(-side // self.feature_info[level]["reduction"]) for side in imgs.shape[-2:])
            found.append((self.pyramid[str(level)](patches)[..., :height, :width], token))
        return h, found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all maps but those of `indices`, and the blocks that these do not need; `norm_f` always stays.

        Returns:
            The indices, from 0; see `forward_intermediates`.
        """
        taken = chosen(len(self.feature_info), indices)
        for level in self.pyramid.keys() - {str(level) for level in taken}:
            del self.pyramid[level]
        self.layers = self.layers[: max(self.taps[level] for level in taken) + 1]
        return taken

    def forward(self, imgs: Tensor) -> list[Tensor]:  # type: ignore[override]  # maps, not logits
        """Return four maps, the finest first: (B, in_chans, H, W) -> (B, out_chans, H / stride, W / stride) each."""
        return [image for image, _ in self.intermediates(imgs, [int(level) for level in self.pyramid])[1]]


def check_strides(*sides: int) -> None:
    """Raise ValueError for patches of which the strides of a pyramid are no whole pixels."""
    for side in sides:
        if side % 4:
            raise ValueError(f"patches of {side} pixels: the finest stride is a quarter, choose a multiple of 4")


class WithEncoder(nn.Module):
    """Base of models that are built around an encoder, their `backbone`, which these methods act on."""

    backbone: ARMClassifier

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's blocks."""
        return self.backbone.layers

    def compile(self, **options: Any) -> None:
        """Compile the encoder in place, block by block; what follows it runs eagerly."""
        self.backbone.compile(**options)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block of the encoder in the backward pass instead of keeping its activations."""
        self.backbone.set_grad_checkpointing(enable)

    def freeze(self, blocks: int | Literal["all"]) -> None:
        """Freeze the encoder's embeddings and its first `blocks`, or all of them; see `ARMClassifier.freeze`."""
        self.backbone.freeze(blocks)
