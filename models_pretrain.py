"""The base of all pretraining models: an encoder over clusters of patches, and a decoder of pixels."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from types import MethodType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn

from decoder import DecoderBlock, decoder_taps, init_xavier
from mamba import ONE_DIRECTION, Block, PatchEmbed, check_size, cluster_order, fill_buffers, grid_of, run_block
from ops.fused import norm_cat
from timm_models import chosen
from util.pos_embed import sincos_pos_embed


class Prediction(NamedTuple):
    """The result of `PretrainModel.predicted_images`."""

    images: Tensor
    losses: Tensor
    places: Tensor | None


class PretrainModel(nn.Module, ABC):
    """A one-direction Mamba encoder over clusters of patches, and a decoder of pixels (paper, section 3).

    The grid of patches is cut into clusters of `cluster_size` x `cluster_size` patches. The sequence runs over
    clusters in a given order and, inside a cluster, over patches in raster order. Decoder queries read the encoder's
    latents by cross-attention. A patch has D = in_chans * p * p values. An objective is a subclass with `predict`, and
    `forward`: images (B, in_chans, H, W) -> losses of any shape, whose mean is the training loss.

    Args:
        img_size: pixels, one side or (height, width).
        patch_size: pixels a side, p.
        cluster_size: patches a side; 1 makes every patch a cluster.
        embed_dim: encoder channels C.
        depth: encoder blocks.
        dec_embed_dim: decoder channels Cd, a multiple of 64 (one attention head each).
        dec_depth: decoder blocks; block j reads the output of the j-th encoder block in `taps`.
        norm_pix_loss: standardise the target pixels of each patch.
        scan_backend: see `ops.choose_backend`.
        order: of clusters, one of `ORDERS`: by rows or columns, or these reversed; "random" is one permutation, drawn
            from torch's seed and kept in the state dict; "random_per_image" draws one for each image in every forward
            pass.
        taps: see `decoder_taps`.
        in_chans: channels of the images.
        dynamic_img_size: encode images of any size that divides into clusters, with the position embedding computed for
            their grid; the loss takes images of `img_size` only, which `set_input_size` changes.

    Raises:
        ValueError: sizes that do not fit together, or an unknown order; the message names values that do.
    """

    # Regular expression of all names in the objective's state dict that match neither `ENCODER` nor `DECODER`.
    own_parameters: ClassVar[str] = ""
    cluster_order: Tensor | None

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
        order: str = "row",
        taps: str = "even",
        in_chans: int = 3,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.cluster_size, self.norm_pix_loss = patch_size, cluster_size, norm_pix_loss
        self.grid_size = self.grid_for(img_size)
        self.check_grid(self.grid_size)
        check_size(embed_dim, depth)
        if embed_dim % 4 or embed_dim <= 0:
            raise ValueError(f"encoder width {embed_dim} is not a multiple of 4, as its position embedding needs")
        if dec_embed_dim % 64 or dec_embed_dim <= 0:
            raise ValueError(f"decoder width {dec_embed_dim} is not a multiple of 64, the width of a head")
        if norm_pix_loss and in_chans * patch_size**2 == 1:
            raise ValueError("norm_pix_loss standardises the values of a patch, and here a patch is a single value")
        self.embed_dim, self.dec_depth, self.order = embed_dim, dec_depth, order
        self.in_chans, self.dynamic_img_size, self.grad_checkpointing = in_chans, dynamic_img_size, False
        self.taps = decoder_taps(depth, dec_depth, taps)

        # Registration order is that of the published code: optimizer states are stored by it.
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid_size), requires_grad=False)
        self.ar_token = nn.Parameter(torch.zeros(1, 1, dec_embed_dim))
        self.dec_pos_embed = nn.Parameter(sincos_pos_embed(dec_embed_dim, self.grid_size), requires_grad=False)
        self.register_buffer("cluster_order", self.order_of(self.grid_size), persistent=order == "random")
        self.register_load_state_dict_post_hook(fill_buffers)
        self.patch_embed = PatchEmbed(patch_size, embed_dim, in_chans)
        self.layers = nn.ModuleList(Block(embed_dim, depth, ONE_DIRECTION, scan_backend) for _ in range(depth))
        self.enc2dec = nn.Linear(embed_dim * dec_depth, dec_embed_dim * dec_depth)
        self.dec_block = nn.ModuleList(DecoderBlock(dec_embed_dim) for _ in range(dec_depth))
        for j in range(1, dec_depth + 1):
            self.add_module(f"norm_{j}", nn.LayerNorm(embed_dim))
        self.ar_norm = nn.LayerNorm(dec_embed_dim)
        self.ar_pred = nn.Linear(dec_embed_dim, in_chans * patch_size**2)

        trunc_normal_(self.ar_token, std=0.02)
        for layer in (self.enc2dec, self.ar_pred):
            nn.init.zeros_(layer.bias)
        init_xavier(self.dec_block)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return self.grid_size[0] * self.grid_size[1]

    def grid_for(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of an image's patches; raise ValueError if it does not divide into clusters."""
        c = self.cluster_size
        clusters = grid_of(img_size, self.patch_size * c, f"{c} x {c}-patch clusters")
        return clusters[0] * c, clusters[1] * c

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError for a grid of patches on which the objective has no loss; by default it has one."""

    def order_of(self, grid: tuple[int, int]) -> Tensor | None:
        """Return the order of clusters on a grid of patches; see `cluster_order`."""
        order = cluster_order(self.order, (grid[0] // self.cluster_size, grid[1] // self.cluster_size))
        return None if order is None else order.to(self.pos_embed.device)

    def keep_order(self, grid: tuple[int, int]) -> None:
        """Raise ValueError if the order of clusters was drawn for another grid."""
        if self.order == "random" and grid != self.grid_size:
            raise ValueError(f"a random order of clusters is only for {self.image_size} pixels")

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the size of the images, in pixels, one side or (height, width); no weight changes.

        The position embeddings of encoder and decoder are computed for the new grid. They are new objects.

        Raises:
            ValueError: the size does not suit the objective, or the model has a random order of clusters.
        """
        grid = self.grid_for(img_size)
        self.check_grid(grid)
        self.keep_order(grid)
        self.grid_size = grid
        for name in ("pos_embed", "dec_pos_embed"):
            old = self.get_parameter(name)
            new = sincos_pos_embed(old.shape[-1], grid).to(old)
            self.register_parameter(name, nn.Parameter(new, requires_grad=False))
        self.init_non_persistent_buffers()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no state dict holds, on the device of the parameters; needed after `to_empty`.

        Loading a state dict does it too.
        """
        if self.order != "random":  # a random order is in the state dict
            self.cluster_order = self.order_of(self.grid_size)

    def draw_order(self, batch: int) -> Tensor | None:
        """Draw an order of clusters for each image, (batch, clusters); None where all images have the model's order."""
        if self.order != "random_per_image":
            return None
        clusters = self.num_patches // self.cluster_size**2
        return torch.rand(batch, clusters, device=self.pos_embed.device).argsort(dim=1)

    def to_clusters(self, patches: Tensor, order: Tensor | None = None, grid: tuple[int, int] | None = None) -> Tensor:
        """Group patches into clusters, and sort these.

        Args:
            patches: (B, rows * columns, X) in raster order.
            order: (clusters,), or (B, clusters) with an order for each image, where `patches` may have B = 1; None is
                the model's order.
            grid: rows and columns of the patches; None is the model's grid.

        Returns:
            (B, clusters, patches of a cluster, X).
        """
        c, columns = self.cluster_size, (grid or self.grid_size)[1]
        clusters = rearrange(patches, "b (R i S j) x -> b (R S) (i j) x", S=columns // c, i=c, j=c)  # R, S: clusters
        if order is None:
            order = self.cluster_order if grid in (None, self.grid_size) else self.order_of(grid)
        if order is None:
            return clusters
        if order.ndim == 1:
            return clusters.index_select(1, order)
        return clusters.take_along_dim(order[:, :, None, None], dim=1)

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut images into patches of (row, column, channel) order: (B, in_chans, H, W) -> (B, rows * columns, D)."""
        p = self.patch_size
        return rearrange(imgs, "b channel (h p) (w q) -> b (h w) (p q channel)", p=p, q=p)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Undo `patchify`: (B, rows * columns, D) -> (B, in_chans, H, W)."""
        p, columns = self.patch_size, self.grid_size[1]
        return rearrange(patches, "b (h w) (p q channel) -> b channel (h p) (w q)", w=columns, p=p, q=p)

    def embed_patches(self, imgs: Tensor) -> Tensor:
        """Embed patches, in raster order and without positions: (B, in_chans, H, W) -> (B, M, C).

        Raises:
            ValueError: images of another size than the model's.
        """
        if tuple(imgs.shape[-2:]) != self.image_size:
            raise ValueError(f"images of {tuple(imgs.shape[-2:])} pixels, the model takes {self.image_size}")
        return self.patch_embed(imgs).flatten(1, 2)  # (B, rows, columns, C) -> (B, M, C)

    def embed(self, imgs: Tensor, order: Tensor | None = None) -> Tensor:
        """Embed patches with positions, in cluster order: (B, in_chans, H, W) -> (B, clusters, c * c, C)."""
        return self.to_clusters(self.embed_patches(imgs) + self.pos_embed, order)

    def embed_any(self, imgs: Tensor) -> Tensor:
        """Do as `embed`, in the model's order; with `dynamic_img_size` also for images of other sizes.

        Raises:
            ValueError: a size that does not divide into clusters; or another than the model's, without
                `dynamic_img_size` or with a random order.
        """
        size = (imgs.shape[-2], imgs.shape[-1])
        if not self.dynamic_img_size or size == self.image_size:
            return self.embed(imgs)
        grid = self.grid_for(size)
        self.keep_order(grid)
        pos_embed = sincos_pos_embed(self.embed_dim, grid).to(self.pos_embed)
        return self.to_clusters(self.patch_embed(imgs).flatten(1, 2) + pos_embed, grid=grid)

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Encode every cluster: (B, in_chans, H, W) -> (B, M, C) after the last block, patches in cluster order.

        A token depends only on those before it: the tokens of all clusters but the last equal those in pretraining.
        The order "random_per_image" is replaced by "row" here.
        """
        last = len(self.layers)
        return self.encode(self.embed_any(imgs), [last])[last]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """Return the patches after some of the blocks, in raster order, with the arguments of DINO's method.

        Args:
            x: images (B, in_chans, H, W), of the sizes that `forward_features` takes.
            n: indices of blocks from 0, negative from the end, or how many of the last ones.
            reshape: return (B, C, H / p, W / p) instead of (B, M, C).
            return_prefix_tokens: return pairs of the patches and of the class tokens, of which there are none:
                (B, 0, C).
            norm: standardise each patch, as the new `norm_f` of a classifier does.

        Returns:
            One tensor or pair for each block, in their order.

        Raises:
            ValueError: there are no such blocks, or see `embed_any`.
        """
        numbers = sorted({i + 1 for i in chosen(len(self.layers), n)})
        outputs = self.encode(self.embed_any(x), numbers)
        grid = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        raster = torch.arange(grid[0] * grid[1], device=x.device)[None, :, None]  # (1, M, 1)
        places = self.to_clusters(raster, grid=grid).flatten().argsort()  # (1, clusters, c * c, 1) -> (M,)
        found: list[Any] = []
        for number in numbers:
            tokens = outputs[number].index_select(1, places)
            patches = F.layer_norm(tokens, tokens.shape[-1:]) if norm else tokens
            if reshape:
                patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()  # (B, M, C) -> (B, C, h, w)
            found.append((patches, tokens[:, :0]) if return_prefix_tokens else patches)
        return found

    def encode(self, clusters: Tensor, numbers: Collection[int]) -> dict[int, Tensor]:
        """Run the blocks up to the last one of `numbers`.

        Args:
            clusters: embedded, (B, clusters, patches of a cluster, C); all or the first ones.
            numbers: of blocks, from 1.

        Returns:
            Tokens (B, n, C) after each of these blocks, by number.
        """
        h = clusters.flatten(1, 2)  # (B, clusters, c * c, C) -> (B, n, C)
        h = h.contiguous()  # like the inputs of all later blocks, so that all blocks share one compiled graph
        outputs = {}
        for number, layer in zip(range(1, max(numbers) + 1), self.layers, strict=False):
            h = run_block(layer, self.grad_checkpointing, h)
            if number in numbers:
                outputs[number] = h
        return outputs

    def latents(self, clusters: Tensor) -> Tensor:
        """Encode clusters (see `encode`): latents (B, n, Cd, dec_depth), one for each decoder block."""
        outputs = self.encode(clusters, self.taps)
        return self.read_taps([outputs[number] for number in self.taps])

    def read_taps(self, outputs: list[Tensor]) -> Tensor:
        """Compute the latents of each decoder block from the outputs of the encoder blocks in `taps`.

        Channel c * dec_depth + j of `enc2dec` belongs to decoder block j. The rows of its weight are sorted by block
        before the product, which costs less than gathering every block's channels after it.

        Args:
            outputs: dec_depth tensors (B, n, C).

        Returns:
            (B, n, Cd, dec_depth).
        """
        norms = [getattr(self, f"norm_{j}") for j in range(1, self.dec_depth + 1)]
        normed = norm_cat(outputs, norms)  # (B, n, dec_depth * C)
        by_block = "(c j) ... -> (j c) ..."  # weight (Cd * dec_depth, dec_depth * C) and bias (Cd * dec_depth,)
        weight, bias = (rearrange(p, by_block, j=self.dec_depth) for p in (self.enc2dec.weight, self.enc2dec.bias))
        latents = F.linear(normed, weight, bias)  # (B, n, dec_depth * C) -> (B, n, dec_depth * Cd)
        return latents.unflatten(-1, (self.dec_depth, -1)).mT  # (B, n, dec_depth, Cd) -> (B, n, Cd, dec_depth)

    def decode(self, queries: Tensor, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict pixels from the latents that each query may see.

        Args:
            queries: (B or 1, m, Cd).
            latents: (B, n, Cd, dec_depth).
            mask: (m, n), 0 where a query may look and -inf elsewhere; None lets each query see all latents.

        Returns:
            (B, m, D).
        """
        for block, context in zip(self.dec_block, latents.unbind(-1), strict=True):
            queries = run_block(block, self.grad_checkpointing, queries, context, mask)
        return self.ar_pred(self.ar_norm(queries))

    def as_target(self, patches: Tensor) -> Tensor:
        """Return patches (..., D), each standardised if `norm_pix_loss`."""
        if not self.norm_pix_loss:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased
        return (patches - mean) / (var + 1e-6).sqrt()

    @abstractmethod
    def predict(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predict patches of images (B, in_chans, H, W).

        Returns:
            Patches (B, m, D), as `as_target` gives them; their indices in raster order, (B or 1, m); and the
            place of each cluster in the order of prediction, (B, cluster rows, cluster columns) int64 from 0, or None
            where all patches are predicted at once.
        """

    @torch.no_grad()
    def predicted_images(self, imgs: Tensor) -> Prediction:
        """Return images in which the predicted patches replace the true ones.

        With `norm_pix_loss`, predictions are standardised: mean and variance are those of the true patch, as in MAE's
        figures.

        Args:
            imgs: (B, in_chans, H, W), normalised.

        Returns:
            `images` (B, in_chans, H, W), normalised; `losses` of the patches, (B, rows, columns), nan where a patch is
            not predicted; `places`, see `predict`.
        """
        pred, index, places = self.predict(imgs)
        pred, index = pred.to(imgs.dtype), index.expand(len(imgs), -1)
        patches = self.patchify(imgs)  # (B, M, D)
        true = patches.take_along_dim(index[:, :, None], dim=1)  # (B, m, D)
        loss = (pred - self.as_target(true)).square().mean(dim=-1)  # (B, m)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(true, dim=-1, keepdim=True)
            pred = pred * (var + 1e-6).sqrt() + mean
        images = self.unpatchify(patches.scatter(1, index[:, :, None].expand_as(pred), pred))
        losses = torch.full_like(patches[:, :, 0], float("nan")).scatter(1, index, loss)
        return Prediction(images, losses.unflatten(1, self.grid_size), places)  # (B, M) -> (B, rows, columns)

    def compile(self, **options: Any) -> None:
        """Compile in place, block by block: all blocks of a kind share one graph, so this takes seconds at any depth.

        `forward_loss` is compiled too, where the objective has one. Names in the state dict stay.

        Args:
            **options: of `torch.compile`.
        """
        for block in (*self.layers, *self.dec_block):
            block.compile(**options)
        for name in ("read_taps", "forward_loss"):
            if hasattr(type(self), name):  # a bound method: a deep copy of the model gets one bound to the copy
                setattr(self, name, MethodType(torch.compile(getattr(type(self), name), **options), self))
