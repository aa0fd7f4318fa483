"""ARM: autoregressive pretraining of a Mamba encoder and its classifier (Ren et al., ICLR 2025, arXiv 2406.07537).

model = create_pretrain_model("arm_base_pz16", norm_pix_loss=True)
loss = model(imgs).mean()

classifier = create_classifier("arm_base_pz16", num_classes=1000)
logits = classifier(imgs)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from functools import partial
from types import MethodType
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn

from decoder import DecoderBlock, decoder_taps, init_xavier
from mamba import ONE_DIRECTION, Block, PatchEmbed, check_size, cluster_order, fill_buffers, grid_of
from models_classifier import ARMClassifier
from objectives import OBJECTIVES as OBJECTIVES  # the place to register an objective
from objectives import check_names, objective_class
from ops.fused import norm_cat
from timm_models import register
from util.pos_embed import sincos_pos_embed

SIZES = {
    # published (paper, section 4.1)
    "arm_base_pz16": {"embed_dim": 768, "depth": 12, "dec_embed_dim": 512},
    "arm_large_pz16": {"embed_dim": 1024, "depth": 24, "dec_embed_dim": 512},
    "arm_huge_pz16": {"embed_dim": 1536, "depth": 24, "dec_embed_dim": 512},
    # ours, for small experiments: the decoder is no wider than the encoder
    "arm_tiny_pz16": {"embed_dim": 192, "depth": 12, "dec_embed_dim": 192},
    "arm_small_pz16": {"embed_dim": 384, "depth": 12, "dec_embed_dim": 384},
}
MAX_PATCHES = 2**14  # of ARM's objective: the attention mask has the square of their number, 1 GB

Model = TypeVar("Model", bound=nn.Module)


def create_pretrain_model(name: str, objective: str = "arm", **overrides: Any) -> "PretrainModel":
    """Return a pretraining model with random weights.

    Args:
        name: key of `SIZES`.
        objective: key of `OBJECTIVES`: "arm" predicts the next cluster, "mae" hidden patches.
        **overrides: arguments of `PretrainModel` that replace the values of that size; `device` and `dtype` as in
            `create_classifier`.

    Raises:
        ValueError: unknown name or objective, or sizes that do not fit together; the message names values that do.
    """
    return _build(objective_class(objective), **{**_size(name), **overrides})


def create_classifier(name: str, **overrides: Any) -> ARMClassifier:
    """Return a classifier with random weights.

    Args:
        name: key of `SIZES`.
        **overrides: arguments of `ARMClassifier` that replace the values of that size; `device` and `dtype` of its
            parameters (default: torch's).

    Raises:
        ValueError: unknown name, or sizes that do not fit together; the message names values that do.
    """
    size = _size(name)
    del size["dec_embed_dim"]
    return _build(ARMClassifier, **{**size, **overrides})


def _size(name: str) -> dict[str, int]:
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(SIZES)}")
    return dict(SIZES[name])


def _build(
    model: Callable[..., Model],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **sizes: Any,
) -> Model:
    with torch.device(device or torch.get_default_device()):
        return model(**sizes).to(dtype=dtype)


class Prediction(NamedTuple):
    """The result of `PretrainModel.predicted_images`."""

    images: Tensor
    losses: Tensor
    places: Tensor | None


class PretrainModel(nn.Module, ABC):
    """A one-direction Mamba encoder over clusters of patches, and a decoder of pixels (paper, section 3).

    The grid of patches is cut into clusters of `cluster_size` x `cluster_size` patches. The sequence runs over
    clusters in a given order and, inside a cluster, over patches in raster order. Decoder queries read the encoder's
    latents by cross-attention. An objective is a subclass with `predict`, and `forward`: images (B, 3, H, W) -> losses
    of any shape, whose mean is the training loss.

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
    ) -> None:
        super().__init__()
        clusters = grid_of(img_size, patch_size * cluster_size, f"{cluster_size} x {cluster_size}-patch clusters")
        check_size(embed_dim, depth)
        if embed_dim % 4 or embed_dim <= 0:
            raise ValueError(f"encoder width {embed_dim} is not a multiple of 4, as its position embedding needs")
        if dec_embed_dim % 64 or dec_embed_dim <= 0:
            raise ValueError(f"decoder width {dec_embed_dim} is not a multiple of 64, the width of a head")
        self.patch_size, self.cluster_size, self.norm_pix_loss = patch_size, cluster_size, norm_pix_loss
        self.embed_dim, self.dec_depth, self.order = embed_dim, dec_depth, order
        self.grid_size = (clusters[0] * cluster_size, clusters[1] * cluster_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.taps = decoder_taps(depth, dec_depth, taps)

        # Registration order is that of the published code: optimizer states are stored by it.
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid_size), requires_grad=False)
        self.ar_token = nn.Parameter(torch.zeros(1, 1, dec_embed_dim))
        self.dec_pos_embed = nn.Parameter(sincos_pos_embed(dec_embed_dim, self.grid_size), requires_grad=False)
        self.register_buffer("cluster_order", self._new_order(), persistent=order == "random")
        self.register_load_state_dict_post_hook(fill_buffers)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.layers = nn.ModuleList(Block(embed_dim, depth, ONE_DIRECTION, scan_backend) for _ in range(depth))
        self.enc2dec = nn.Linear(embed_dim * dec_depth, dec_embed_dim * dec_depth)
        self.dec_block = nn.ModuleList(DecoderBlock(dec_embed_dim) for _ in range(dec_depth))
        for j in range(1, dec_depth + 1):
            self.add_module(f"norm_{j}", nn.LayerNorm(embed_dim))
        self.ar_norm = nn.LayerNorm(dec_embed_dim)
        self.ar_pred = nn.Linear(dec_embed_dim, 3 * patch_size**2)

        trunc_normal_(self.ar_token, std=0.02)
        for layer in (self.enc2dec, self.ar_pred):
            nn.init.zeros_(layer.bias)
        init_xavier(self.dec_block)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size

    def _new_order(self) -> Tensor | None:
        rows, columns = (side // self.cluster_size for side in self.grid_size)
        order = cluster_order(self.order, (rows, columns))
        return None if order is None else order.to(self.pos_embed.device)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no state dict holds, on the device of the parameters; needed after `to_empty`.

        Loading a state dict does it too.
        """
        if self.order != "random":  # a random order is in the state dict
            self.cluster_order = self._new_order()

    def draw_order(self, batch: int) -> Tensor | None:
        """Draw an order of clusters for each image, (batch, clusters); None where all images have the model's order."""
        if self.order != "random_per_image":
            return None
        clusters = self.num_patches // self.cluster_size**2
        return torch.rand(batch, clusters, device=self.pos_embed.device).argsort(dim=1)

    def to_clusters(self, patches: Tensor, order: Tensor | None = None) -> Tensor:
        """Group patches into clusters, and sort these.

        Args:
            patches: (B, rows * columns, X) in raster order.
            order: (clusters,), or (B, clusters) with an order for each image, where `patches` may have B = 1; None is
                the model's order.

        Returns:
            (B, clusters, patches of a cluster, X).
        """
        c, columns = self.cluster_size, self.grid_size[1]
        clusters = rearrange(patches, "b (R i S j) x -> b (R S) (i j) x", S=columns // c, i=c, j=c)  # R, S: clusters
        order = self.cluster_order if order is None else order
        if order is None:
            return clusters
        if order.ndim == 1:
            return clusters.index_select(1, order)
        return clusters.take_along_dim(order[:, :, None, None], dim=1)

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut images into patches of (row, column, channel) order: (B, 3, H, W) -> (B, rows * columns, 3 * p * p)."""
        p = self.patch_size
        return rearrange(imgs, "b channel (h p) (w q) -> b (h w) (p q channel)", p=p, q=p)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Undo `patchify`: (B, rows * columns, 3 * p * p) -> (B, 3, H, W)."""
        p, columns = self.patch_size, self.grid_size[1]
        return rearrange(patches, "b (h w) (p q channel) -> b channel (h p) (w q)", w=columns, p=p, q=p)

    def embed_patches(self, imgs: Tensor) -> Tensor:
        """Embed patches, in raster order and without positions: (B, 3, H, W) -> (B, M, C).

        Raises:
            ValueError: images of another size than the model's.
        """
        if tuple(imgs.shape[-2:]) != self.image_size:
            raise ValueError(f"images of {tuple(imgs.shape[-2:])} pixels, the model takes {self.image_size}")
        return self.patch_embed(imgs).flatten(1, 2)  # (B, rows, columns, C) -> (B, M, C)

    def embed(self, imgs: Tensor, order: Tensor | None = None) -> Tensor:
        """Embed patches with positions, in cluster order: (B, 3, H, W) -> (B, clusters, patches of a cluster, C)."""
        return self.to_clusters(self.embed_patches(imgs) + self.pos_embed, order)

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Encode every cluster: (B, 3, H, W) -> (B, M, C) after the last block, patches in cluster order.

        A token depends only on those before it: the tokens of all clusters but the last equal those in pretraining.
        The order "random_per_image" is replaced by "row" here.
        """
        last = len(self.layers)
        return self.encode(self.embed(imgs), [last])[last]

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
            h = layer(h)
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
            (B, m, 3 * p * p).
        """
        for block, context in zip(self.dec_block, latents.unbind(-1), strict=True):
            queries = block(queries, context, mask)
        return self.ar_pred(self.ar_norm(queries))

    def as_target(self, patches: Tensor) -> Tensor:
        """Return patches (..., 3 * p * p), each standardised if `norm_pix_loss`."""
        if not self.norm_pix_loss:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased
        return (patches - mean) / (var + 1e-6).sqrt()

    @abstractmethod
    def predict(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predict patches of images (B, 3, H, W).

        Returns:
            Patches (B, m, 3 * p * p), as `as_target` gives them; their indices in raster order, (B or 1, m); and the
            place of each cluster in the order of prediction, (B, cluster rows, cluster columns) int64 from 0, or None
            where all patches are predicted at once.
        """

    @torch.no_grad()
    def predicted_images(self, imgs: Tensor) -> Prediction:
        """Return images in which the predicted patches replace the true ones.

        With `norm_pix_loss`, predictions are standardised: mean and variance are those of the true patch, as in MAE's
        figures.

        Args:
            imgs: (B, 3, H, W), normalised.

        Returns:
            `images` (B, 3, H, W), normalised; `losses` of the patches, (B, rows, columns), nan where a patch is not
            predicted; `places`, see `predict`.
        """
        pred, index, places = self.predict(imgs)
        pred, index = pred.to(imgs.dtype), index.expand(len(imgs), -1)
        patches = self.patchify(imgs)  # (B, M, 3pp)
        true = patches.take_along_dim(index[:, :, None], dim=1)  # (B, m, 3pp)
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


class ARMPretrain(PretrainModel):
    """ARM's objective: predict the pixels of each cluster of patches from the clusters before it (paper, section 3).

    The encoder reads all clusters but the last (n tokens). The decoder predicts all clusters but the first (n
    positions).

    Args:
        **sizes: see `PretrainModel`.

    Raises:
        ValueError: see `PretrainModel`; or there is a single cluster.
    """

    own_parameters = "mask"
    mask: Tensor

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        if self.num_patches == self.cluster_size**2:
            raise ValueError(f"an image of {self.image_size} pixels holds a single cluster: there is no next one")
        if self.num_patches > MAX_PATCHES:
            raise ValueError(f"{self.num_patches} patches are more than {MAX_PATCHES}: the mask has their square")
        self.register_buffer("mask", self.new_mask().to(self.pos_embed.device))
        self.register_load_state_dict_pre_hook(_supply_mask)

    def new_mask(self) -> Tensor:
        """Return the attention mask (n, n), float32 on the CPU: 0 where a query may look and -inf elsewhere."""
        per_cluster = self.cluster_size**2
        cluster = torch.arange(self.num_patches - per_cluster, device="cpu") // per_cluster
        visible = cluster[:, None] >= cluster[None, :]  # the queries of cluster i + 1 see clusters 0..i
        return torch.zeros(visible.shape, device="cpu").masked_fill(~visible, float("-inf"))

    def forward_encoder(self, imgs: Tensor, order: Tensor | None = None) -> Tensor:
        """Encode all clusters but the last: (B, 3, H, W) -> latents (B, n, Cd, dec_depth), for each decoder block."""
        return self.latents(self.embed(imgs, order)[:, :-1])

    def forward_decoder(self, latents: Tensor, order: Tensor | None = None) -> Tensor:
        """Predict the pixels of all clusters but the first: (B, n, Cd, dec_depth) -> (B, n, 3 * p * p)."""
        queries = self.to_clusters(self.ar_token + self.dec_pos_embed, order)[:, 1:].flatten(1, 2)  # (1 or B, n, Cd)
        return self.decode(queries, latents, self.mask)

    def target(self, imgs: Tensor, order: Tensor | None = None) -> Tensor:
        """Return the pixels that `forward_decoder` is to predict: (B, 3, H, W) -> (B, n, 3 * p * p)."""
        target = self.to_clusters(self.patchify(imgs), order)[:, 1:]  # (B, clusters - 1, c * c, 3pp)
        return self.as_target(target.flatten(1, 2))  # (B, n, 3pp)

    def forward_loss(self, imgs: Tensor, pred: Tensor, order: Tensor | None = None) -> Tensor:
        """Return the squared error of each position, averaged over batch and pixels: (n,)."""
        return (pred - self.target(imgs, order)).square().mean(dim=(0, 2))

    def forward(self, imgs: Tensor) -> Tensor:
        """Return the loss of each position: (B, 3, H, W) -> (n,)."""
        order = self.draw_order(len(imgs))
        return self.forward_loss(imgs, self.forward_decoder(self.forward_encoder(imgs, order), order), order)

    def predict(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `PretrainModel.predict`."""
        order = self.draw_order(len(imgs))
        pred = self.forward_decoder(self.forward_encoder(imgs, order), order)
        raster = torch.arange(self.num_patches, device=imgs.device)[None, :, None]  # (1, M, 1)
        index = self.to_clusters(raster, order)  # (1 or B, clusters, c * c, 1)
        rows = self.grid_size[0] // self.cluster_size
        firsts = index[:, :, 0, 0]  # clusters sort in raster order as their first patches do
        places = firsts.argsort(dim=1).unflatten(1, (rows, -1))  # (1 or B, clusters) -> (1 or B, rows, columns)
        return pred, index[:, 1:].flatten(1), places.expand(len(imgs), -1, -1)  # index (1 or B, n)


def _supply_mask(model: ARMPretrain, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Add the attention mask, which follows from the sizes, to a state dict that lacks it."""
    token = state_dict.get(f"{prefix}ar_token", model.mask)  # assign=True keeps dtype and device of the state dict
    state_dict.setdefault(f"{prefix}mask", model.new_mask().to(device=token.device, dtype=token.dtype))


for _name in SIZES:
    register(_name, partial(create_classifier, _name), check_names)
