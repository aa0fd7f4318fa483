"""ARM: autoregressive pretraining of a Mamba encoder and its classifier (Ren et al., ICLR 2025, arXiv 2406.07537).

model = create_pretrain_model("arm_base_pz16", norm_pix_loss=True)
loss = model(imgs).mean()

classifier = create_classifier("arm_base_pz16", num_classes=1000)
logits = classifier(imgs)

pyramid = create_pyramid("arm_base_pz16")
maps = pyramid(imgs)  # of strides 4, 8, 16, 32
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mamba import SIZES
from models_classifier import ARMClassifier, ARMPyramid
from models_pretrain import PretrainModel
from objectives import OBJECTIVES as OBJECTIVES  # the place to register an objective
from objectives import check_names, objective_class
from timm_models import register

MAX_PATCHES = 2**14  # of ARM's objective: the attention mask has the square of their number, 1 GB

Model = TypeVar("Model", bound=nn.Module)


def create_pretrain_model(name: str, objective: str = "arm", **overrides: Any) -> PretrainModel:
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


def create_pyramid(name: str, **overrides: Any) -> ARMPyramid:
    """Return an encoder with a feature pyramid and random weights.

    Args:
        name: key of `SIZES`.
        **overrides: arguments of `ARMPyramid` that replace the values of that size; `device` and `dtype` as in
            `create_classifier`.

    Raises:
        ValueError: unknown name, or sizes that do not fit together; the message names values that do.
    """
    size = _size(name)
    del size["dec_embed_dim"]
    return _build(ARMPyramid, **{**size, **overrides})


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
        self.register_buffer("mask", self.new_mask().to(self.pos_embed.device))
        self.register_load_state_dict_pre_hook(_supply_mask)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError for a grid of a single cluster, or of more than `MAX_PATCHES` patches."""
        patches = grid[0] * grid[1]
        if patches == self.cluster_size**2:
            sides = self.patch_size * grid[0], self.patch_size * grid[1]
            raise ValueError(f"an image of {sides} pixels holds a single cluster: there is no next one")
        if patches > MAX_PATCHES:
            raise ValueError(f"{patches} patches are more than {MAX_PATCHES}: the mask has their square")

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """See `PretrainModel.set_input_size`."""
        super().set_input_size(img_size)
        self.mask = self.new_mask().to(self.mask)

    def new_mask(self) -> Tensor:
        """Return the attention mask (n, n), float32 on the CPU: 0 where a query may look and -inf elsewhere."""
        per_cluster = self.cluster_size**2
        cluster = torch.arange(self.num_patches - per_cluster, device="cpu") // per_cluster
        visible = cluster[:, None] >= cluster[None, :]  # the queries of cluster i + 1 see clusters 0..i
        return torch.zeros(visible.shape, device="cpu").masked_fill(~visible, float("-inf"))

    def forward_encoder(self, imgs: Tensor, order: Tensor | None = None) -> Tensor:
        """Encode all clusters but the last: (B, in_chans, H, W) -> latents (B, n, Cd, dec_depth), by decoder block."""
        return self.latents(self.embed(imgs, order)[:, :-1])

    def forward_decoder(self, latents: Tensor, order: Tensor | None = None) -> Tensor:
        """Predict the pixels of all clusters but the first: (B, n, Cd, dec_depth) -> (B, n, D)."""
        queries = self.to_clusters(self.ar_token + self.dec_pos_embed, order)[:, 1:].flatten(1, 2)  # (1 or B, n, Cd)
        return self.decode(queries, latents, self.mask)

    def target(self, imgs: Tensor, order: Tensor | None = None) -> Tensor:
        """Return the pixels that `forward_decoder` is to predict: (B, in_chans, H, W) -> (B, n, D)."""
        target = self.to_clusters(self.patchify(imgs), order)[:, 1:]  # (B, clusters - 1, c * c, D)
        return self.as_target(target.flatten(1, 2))  # (B, n, D)

    def forward_loss(self, imgs: Tensor, pred: Tensor, order: Tensor | None = None) -> Tensor:
        """Return the squared error of each position, averaged over batch and pixels: (n,)."""
        return (pred - self.target(imgs, order)).square().mean(dim=(0, 2))

    def forward(self, imgs: Tensor) -> Tensor:
        """Return the loss of each position: (B, in_chans, H, W) -> (n,)."""
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
    register(f"{_name}_pyramid", partial(create_pyramid, _name), check_names, maps=4)
