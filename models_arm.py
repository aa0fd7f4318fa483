"""ARM: autoregressive pretraining of a Mamba encoder and its classifier (Ren et al., ICLR 2025, arXiv 2406.07537).

model = create_pretrain_model("arm_base_pz16", norm_pix_loss=True)
loss = model(imgs).mean()

classifier = create_classifier("arm_base_pz16", num_classes=1000)
logits = classifier(imgs)
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib import import_module
from types import MethodType
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn

from decoder import DecoderBlock, decoder_taps, init_xavier, zero_bias
from mamba import ONE_DIRECTION, Block, PatchEmbed, check_size, cluster_order, fill_buffers, grid_of
from models_classifier import ARMClassifier
from ops.fused import norm_cat
from timm_models import register
from util.errors import UserError
from util.files import some
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


# What a model can be pretrained on: the file and the class of each, a `PretrainModel`. A file is imported when its
# objective is asked for, and imports this one.
OBJECTIVES = {"arm": "models_arm.ARMPretrain", "mae": "models_mae.MaskedPretrain"}
# Names of parameters and buffers, of the encoder and of the decoder that all objectives share.
ENCODER = ("patch_embed.", "layers.", "pos_embed", "cluster_order")
DECODER = re.compile(r"ar_token|dec_pos_embed|(enc2dec|dec_block|norm_\d+|ar_norm|ar_pred)\..+")
MAX_PATCHES = 2**14  # of autoregressive pretraining, whose attention mask has their square: 1 GB


def create_pretrain_model(name: str, objective: str = "arm", **overrides: object) -> "PretrainModel":
    """The pretraining model of a published or own size (`SIZES`).

    Args:
        name: key of `SIZES`.
        objective: key of `OBJECTIVES`: "arm" predicts the next cluster, "mae" hidden patches.
        **overrides: keyword arguments of `PretrainModel` that replace the values of that size; `device` and `dtype` as
            in `create_classifier`.

    Raises:
        ValueError: unknown name or objective, or sizes that do not fit together; the message names values that do.
    """
    return _build(_objective_class(objective), **{**_size(name), **overrides})


def _objective_class(objective: str) -> type["PretrainModel"]:
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; choose from {', '.join(OBJECTIVES)}")
    file, _, model = OBJECTIVES[objective].rpartition(".")
    return getattr(import_module(file), model)


def objective_of(state_dict: Mapping[str, Tensor], told: str = "arm") -> str:
    """Return the objective whose own parameters a state dict has; where it has none, the one that was told."""
    own = {name: _objective_class(name).own_parameters for name in OBJECTIVES}
    found = (name for name, names in own.items() if names and all(n in state_dict for n in names))
    return told if told in OBJECTIVES and all(n in state_dict for n in own[told]) else next(found, told)


def encoder_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's part of a pretraining model's state dict."""
    return {name: value for name, value in state_dict.items() if name.startswith(ENCODER)}


def check_names(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse what neither the encoder, the decoder nor an objective of pretraining has.

    Raises:
        UserError: names what is in the state dict.
    """
    own = {n for objective in OBJECTIVES for n in _objective_class(objective).own_parameters}
    if unknown := [n for n in state_dict if not (n.startswith(ENCODER) or DECODER.fullmatch(n) or n in own)]:
        raise UserError(
            f"the checkpoint does not fit the model: unexpected {some(unknown)} (--ignore_keys leaves keys out)"
        )


def create_classifier(name: str, **overrides: object) -> "ARMClassifier":
    """The classifier of a published or own size (`SIZES`).

    Args:
        name: key of `SIZES`.
        **overrides: keyword arguments of `ARMClassifier` that replace the values of that size. `device` and `dtype` say
            where the model is built and what its numbers are (default: torch's).

    Raises:
        ValueError: unknown name, or sizes that do not fit together; the message names values that do.
    """
    size = _size(name)
    del size["dec_embed_dim"]
    return _build(ARMClassifier, **{**size, **overrides})


def _build(
    model: Callable[..., nn.Module],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **sizes: object,
) -> nn.Module:
    with torch.device(device or torch.get_default_device()):
        return model(**sizes).to(dtype=dtype)


def _size(name: str) -> dict[str, int]:
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(SIZES)}")
    return dict(SIZES[name])


class Prediction(NamedTuple):
    """What a pretraining model makes of images; see `PretrainModel.predicted_images`."""

    images: Tensor
    losses: Tensor
    places: Tensor | None


class PretrainModel(nn.Module, ABC):
    """What every objective shares: a one-direction Mamba encoder over clusters of patches, and a decoder of pixels.

    The grid of patches is cut into clusters of `cluster_size` x `cluster_size` patches. The sequence runs over
    clusters in some order and, inside a cluster, over patches in raster order. Decoder queries read the encoder's
    latents by cross-attention.

    Args:
        img_size: pixels, one side or (height, width).
        patch_size: pixels a side, p.
        cluster_size: patches a side; 1 makes every patch a cluster.
        embed_dim: encoder channels C.
        depth: encoder blocks.
        dec_embed_dim: decoder channels Cd, a multiple of 64 (one attention head each).
        dec_depth: decoder blocks; block j reads the encoder after the j-th of `taps`.
        norm_pix_loss: standardise the target pixels of each patch.
        scan_backend: see `ops.choose_backend`.
        order: of clusters, one of `ORDERS`: in rows or columns, or these reversed; "random" is one permutation, drawn
            from torch's seed and kept in the state dict; "random_per_image" draws one for each image in every forward
            pass.
        taps: see `decoder_taps`.

    Raises:
        ValueError: sizes that do not fit together, or an unknown order; the message names values that do.
    """

    own_parameters: ClassVar[tuple[str, ...]] = ()  # and buffers, beyond what all objectives have

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
        self.embed_dim, self.order = embed_dim, order
        self.grid_size = (clusters[0] * cluster_size, clusters[1] * cluster_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.taps = decoder_taps(depth, dec_depth, taps)
        self.dec_depth = dec_depth

        # Registration order is that of the published code: optimizer states are stored by it.
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid_size), requires_grad=False)
        self.ar_token = nn.Parameter(torch.zeros(1, 1, dec_embed_dim))
        self.dec_pos_embed = nn.Parameter(sincos_pos_embed(dec_embed_dim, self.grid_size), requires_grad=False)
        self.register_buffer("cluster_order", None, persistent=order == "random")
        self._fill_cluster_order()
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
        zero_bias(self.enc2dec)
        zero_bias(self.ar_pred)
        init_xavier(self.dec_block)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size

    def _fill_cluster_order(self) -> None:
        rows, columns = (side // self.cluster_size for side in self.grid_size)
        order = cluster_order(self.order, (rows, columns))
        self.cluster_order = order if order is None else order.to(self.pos_embed.device)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no state dict holds, on the device of the parameters; needed after `to_empty`.

        Loading a state dict does it too.
        """
        if self.order != "random":  # a random order is in the state dict
            self._fill_cluster_order()

    def draw_order(self, batch: int) -> Tensor | None:
        """Orders of clusters (batch, clusters) where every image has its own; None is the model's, for all images."""
        if self.order != "random_per_image":
            return None
        clusters = self.num_patches // self.cluster_size**2
        return torch.rand(batch, clusters, device=self.pos_embed.device).argsort(dim=1)

    def to_clusters(self, patches: Tensor, order: Tensor | None = None) -> Tensor:
        """Cut into clusters, and put these in order.

        Args:
            patches: (B, rows * columns, X) in raster order.
            order: (clusters,) or (B, clusters), of each image its own; None is the model's. B may be 1 in `patches`.

        Returns:
            (B, clusters, patches of a cluster, X).
        """
        c, columns = self.cluster_size, self.grid_size[1]
        clusters = rearrange(patches, "b (R i S j) x -> b (R S) (i j) x", S=columns // c, i=c, j=c)
        order = self.cluster_order if order is None else order
        if order is None:
            return clusters
        if order.ndim == 1:
            return clusters.index_select(1, order)
        return clusters.take_along_dim(order[:, :, None, None], dim=1)

    def patchify(self, imgs: Tensor) -> Tensor:
        """Pixels of each patch in (row, column, channel) order: (B, 3, H, W) -> (B, rows * columns, 3 * p * p)."""
        p = self.patch_size
        return rearrange(imgs, "b channel (h p) (w q) -> b (h w) (p q channel)", p=p, q=p)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Undo `patchify`: (B, rows * columns, 3 * p * p) -> (B, 3, H, W)."""
        p, columns = self.patch_size, self.grid_size[1]
        return rearrange(patches, "b (h w) (p q channel) -> b channel (h p) (w q)", w=columns, p=p, q=p)

    def embed_patches(self, imgs: Tensor) -> Tensor:
        """Embedded patches in raster order, without position: (B, 3, H, W) -> (B, M, C).

        Raises:
            ValueError: images of another size than the model's.
        """
        if tuple(imgs.shape[-2:]) != self.image_size:
            raise ValueError(f"images of {tuple(imgs.shape[-2:])} pixels, the model takes {self.image_size}")
        return self.patch_embed(imgs).flatten(1, 2)  # (B, rows, columns, C) -> (B, M, C)

    def embed(self, imgs: Tensor, order: Tensor | None = None) -> Tensor:
        """Embedded patches in cluster order: (B, 3, H, W) -> (B, clusters, patches of a cluster, C)."""
        return self.to_clusters(self.embed_patches(imgs) + self.pos_embed, order)

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Encode every cluster: (B, 3, H, W) -> (B, M, C) after the last block, patches in cluster order.

        A token depends on those before it only, so all but the last cluster's are those that pretraining computes.
        Where every image has an order of its own, the clusters are read in rows here.
        """
        last = len(self.layers)
        return self.encode(self.embed(imgs), [last])[last]

    def encode(self, clusters: Tensor, numbers: Collection[int]) -> dict[int, Tensor]:
        """Run the blocks up to the last one of `numbers`.

        Args:
            clusters: embedded, (B, clusters, patches of a cluster, C), as many of them as are to be read.
            numbers: of blocks, from 1.

        Returns:
            Tokens (B, n, C) after each of these blocks, by number.
        """
        h = clusters.flatten(1, 2)  # (B, clusters, c * c, C) -> (B, n, C)
        h = h.contiguous()  # as every later block finds it: one compiled graph serves all
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

    def read_taps(self, taps: list[Tensor]) -> Tensor:
        """Latents for each decoder block from the encoder's output at each tap.

        Channel c * dec_depth + j of `enc2dec` belongs to decoder block j. The rows of its weight are sorted by block
        before the product, which costs less than gathering every block's channels after it.

        Args:
            taps: dec_depth tensors (B, n, C).

        Returns:
            (B, n, Cd, dec_depth).
        """
        normed = norm_cat(
            taps, [self.get_submodule(f"norm_{j}") for j in range(1, len(taps) + 1)]
        )  # (B, n, dec_depth * C)
        by_block = "(c j) ... -> (j c) ..."
        weight, bias = (rearrange(p, by_block, j=self.dec_depth) for p in (self.enc2dec.weight, self.enc2dec.bias))
        latents = F.linear(normed, weight, bias)  # (B, n, dec_depth * C) -> (B, n, dec_depth * Cd)
        return latents.unflatten(-1, (self.dec_depth, -1)).mT  # (B, n, dec_depth, Cd) -> (B, n, Cd, dec_depth)

    def decode(self, queries: Tensor, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pixels from the latents that each query may see.

        Args:
            queries: (B or 1, m, Cd).
            latents: (B, n, Cd, dec_depth).
            mask: (m, n), 0 where a query may look and -inf elsewhere; None lets all see all.

        Returns:
            (B, m, 3 * p * p).
        """
        for block, context in zip(self.dec_block, latents.unbind(-1), strict=True):
            queries = block(queries, context, mask)
        return self.ar_pred(self.ar_norm(queries))

    def as_target(self, patches: Tensor) -> Tensor:
        """Pixels (..., 3 * p * p) of patches, standardised with `norm_pix_loss`."""
        if not self.norm_pix_loss:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased
        return (patches - mean) / (var + 1e-6).sqrt()

    @abstractmethod
    def _predict(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predicted patches (B, m, 3 * p * p), their indices in raster order (B, m), and the order of clusters."""

    @torch.no_grad()
    def predicted_images(self, imgs: Tensor) -> Prediction:
        """Images with every predicted patch in its place, the others as they are.

        With `norm_pix_loss`, standardised patches are predicted: mean and variance come from the true patch, as in
        MAE's pictures.

        Args:
            imgs: (B, 3, H, W), normalised.

        Returns:
            `images` (B, 3, H, W), normalised; `losses`, what each patch adds to the loss, (B, rows, columns), nan where
            it is given; `places` of the clusters in the order of prediction, (B, cluster rows, cluster columns) int64
            from 0, or None where all are predicted at once.
        """
        pred, index, places = self._predict(imgs)
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

    def compile(self, **options: object) -> None:
        """Compile in place, block by block: all blocks of a kind share one graph, so this takes seconds at any depth.

        Keyword arguments are those of `torch.compile`. Names in the state dict stay.
        """
        for block in (*self.layers, *self.dec_block):
            block.compile(**options)
        for name in ("read_taps", "forward_loss"):  # bound anew, so that a deep copy binds them to itself
            setattr(self, name, MethodType(torch.compile(getattr(type(self), name), **options), self))


class ARMPretrain(PretrainModel):
    """Predicts the pixels of each cluster of patches from the clusters before it.

    The encoder reads every cluster but the last (n tokens) and the decoder predicts every cluster but the first (n
    positions).

    Args:
        **sizes: see `PretrainModel`.

    Raises:
        ValueError: see `PretrainModel`; or there is a single cluster.
    """

    own_parameters = ("mask",)

    def __init__(self, **sizes: object) -> None:
        super().__init__(**sizes)
        if self.num_patches == self.cluster_size**2:
            raise ValueError(
                f"an image of {self.image_size} pixels holds a single cluster: there is no next one to predict"
            )
        if self.num_patches > MAX_PATCHES:
            raise ValueError(
                f"{self.num_patches} patches are more than {MAX_PATCHES}: the mask grows with their square"
            )
        self.register_buffer("mask", self.new_mask().to(self.pos_embed.device))
        self.register_load_state_dict_pre_hook(_supply_mask)

    def new_mask(self) -> Tensor:
        """Compute the attention mask (n, n) float32 on the CPU: 0 where a query may look and -inf elsewhere."""
        per_cluster = self.cluster_size**2
        cluster = torch.arange(self.num_patches - per_cluster, device="cpu") // per_cluster
        visible = cluster[:, None] >= cluster[None, :]  # the queries of cluster i + 1 see clusters 0..i
        return torch.zeros(visible.shape, device="cpu").masked_fill(~visible, float("-inf"))

    def forward_encoder(self, imgs: Tensor, order: Tensor | None = None) -> Tensor:
        """Encode every cluster but the last: (B, 3, H, W) -> latents (B, n, Cd, dec_depth), one for each block."""
        return self.latents(self.embed(imgs, order)[:, :-1])

    def forward_decoder(self, latents: Tensor, order: Tensor | None = None) -> Tensor:
        """Predict the pixels of every cluster but the first: (B, n, Cd, dec_depth) -> (B, n, 3 * p * p)."""
        queries = self.to_clusters(self.ar_token + self.dec_pos_embed, order)[:, 1:].flatten(1, 2)  # (1 or B, n, Cd)
        return self.decode(queries, latents, self.mask)

    def target(self, imgs: Tensor, order: Tensor | None = None) -> Tensor:
        """What `forward_decoder` should predict: (B, 3, H, W) -> (B, n, 3 * p * p)."""
        target = self.to_clusters(self.patchify(imgs), order)[:, 1:]  # (B, clusters - 1, c * c, 3pp)
        return self.as_target(target.flatten(1, 2))

    def forward_loss(self, imgs: Tensor, pred: Tensor, order: Tensor | None = None) -> Tensor:
        """Squared error per predicted position, averaged over batch and pixels: (n,)."""
        return (pred - self.target(imgs, order)).square().mean(dim=(0, 2))

    def forward(self, imgs: Tensor) -> Tensor:
        """Loss per predicted position (n,); the training loss is its mean."""
        order = self.draw_order(len(imgs))
        return self.forward_loss(imgs, self.forward_decoder(self.forward_encoder(imgs, order), order), order)

    def _predict(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = self.draw_order(len(imgs))
        pred = self.forward_decoder(self.forward_encoder(imgs, order), order)
        raster = torch.arange(self.num_patches, device=imgs.device)[None, :, None]  # (1, M, 1)
        index = self.to_clusters(raster, order)  # (1 or B, clusters, c * c, 1)
        rows = self.grid_size[0] // self.cluster_size
        firsts = index[:, :, 0, 0]  # the raster index of each cluster's first patch sorts as the cluster's own
        places = firsts.argsort(dim=1).unflatten(1, (rows, -1)).expand(len(imgs), -1, -1)
        return pred, index[:, 1:].flatten(1), places


def _supply_mask(model: ARMPretrain, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Supply the attention mask, which the sizes determine, to a checkpoint that lacks it."""
    beside = state_dict.get(f"{prefix}ar_token", model.mask)  # with assign=True the mask is taken as it is
    state_dict.setdefault(f"{prefix}mask", model.new_mask().to(device=beside.device, dtype=beside.dtype))


for _name in SIZES:
    register(_name, partial(create_classifier, _name), check_names)
