"""Masked pretraining on ARM's encoder and decoder, the baseline: MAE's objective (He et al. 2022, arXiv 2111.06377).

model = create_pretrain_model("arm_base_pz16", objective="mae", norm_pix_loss=True)
loss = model(imgs).mean()
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models_pretrain import PretrainModel


class MaskedPretrain(PretrainModel):
    """Predict the pixels of hidden patches from the other patches.

    The encoder reads the whole sequence, with a learned token in the place of each hidden patch: a recurrent encoder
    that skipped patches would lose their positions. The decoder is ARM's without its mask.

    Args:
        mask_ratio: fraction of the patches that are hidden; which ones is drawn for each image.
        **sizes: see `PretrainModel`.

    Raises:
        ValueError: see `PretrainModel`; or there is a single patch.
    """

    own_parameters = "mask_token"

    def __init__(self, mask_ratio: float = 0.75, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.mask_ratio = mask_ratio
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        trunc_normal_(self.mask_token, std=0.02)

    @property
    def num_hidden(self) -> int:
        """Number of hidden patches: at least one is hidden, and one is not."""
        return min(max(1, round(self.mask_ratio * self.num_patches)), self.num_patches - 1)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError for a grid of a single patch."""
        if grid == (1, 1):
            raise ValueError(f"an image of {self.patch_size} pixels is a single patch: nothing is left to predict it")

    def draw_hidden(self, batch: int) -> Tensor:
        """Draw the patches to hide: indices in raster order, (batch, num_hidden)."""
        return torch.rand(batch, self.num_patches, device=self.pos_embed.device).argsort(dim=1)[:, : self.num_hidden]

    def forward_encoder(self, imgs: Tensor, hidden: Tensor, order: Tensor | None = None) -> Tensor:
        """Encode all patches, `hidden` (B, m) replaced: (B, in_chans, H, W) -> latents (B, M, Cd, dec_depth)."""
        x = self.embed_patches(imgs)  # (B, M, C)
        is_hidden = torch.zeros_like(x[:, :, :1], dtype=torch.bool).scatter(1, hidden[:, :, None], True)  # (B, M, 1)
        x = torch.where(is_hidden, self.mask_token, x) + self.pos_embed
        return self.latents(self.to_clusters(x, order))

    def forward_decoder(self, latents: Tensor, hidden: Tensor) -> Tensor:
        """Predict the pixels of the patches `hidden` (B, m): (B, M, Cd, dec_depth) -> (B, m, D)."""
        queries = (self.ar_token + self.dec_pos_embed).take_along_dim(hidden[:, :, None], dim=1)  # (B, m, Cd)
        return self.decode(queries, latents)

    def forward_loss(self, imgs: Tensor, pred: Tensor, hidden: Tensor) -> Tensor:
        """Return the squared error of each image, averaged over its hidden patches and pixels: (B,)."""
        target = self.patchify(imgs).take_along_dim(hidden[:, :, None], dim=1)  # (B, m, D)
        return (pred - self.as_target(target)).square().mean(dim=(1, 2))

    def forward(self, imgs: Tensor) -> Tensor:
        """Return the loss of each image: (B, in_chans, H, W) -> (B,)."""
        pred, hidden, _ = self.predict(imgs)
        return self.forward_loss(imgs, pred, hidden)

    def predict(self, imgs: Tensor) -> tuple[Tensor, Tensor, None]:
        """See `PretrainModel.predict`."""
        order, hidden = self.draw_order(len(imgs)), self.draw_hidden(len(imgs))
        return self.forward_decoder(self.forward_encoder(imgs, hidden, order), hidden), hidden, None
