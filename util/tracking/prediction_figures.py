"""Draw what a pretraining model sees and predicts of an image, for visualize.py and for the log of a run."""

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from util.data.datasets import model_input
from util.data.decode import BrokenImage
from util.data.pixels import IMAGENET, Pixels
from util.data.sources.readers import open_source
from util.data.sources.source import Source
from util.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 3.3  # inches, the longer side of a panel
GIVEN = "tab:orange"

# Functions import matplotlib themselves: that takes a second, which --help and a user's mistake need not.


class Predicts(Protocol):
    """Attributes of `models_pretrain.PretrainModel` that the figures need."""

    cluster_size: int
    patch_size: int

    def predicted_images(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return predicted images, loss of each patch, and places of the clusters in the order of prediction."""


def fixed_images(
    data_path: str | list[str], size: tuple[int, int], train: Source, pixels: Pixels = IMAGENET, count: int = 4
) -> Tensor | None:
    """Read evenly spaced images of val/, or of the training images if there is no usable val/; every run gets the same.

    Args:
        data_path: see `open_source`.
        size: height and width of the input.
        train: images to take if there is no usable val/.
        pixels: of the run.
        count: number of images; broken ones are left out.

    Returns:
        (count, C, H, W) float32, normalised; None if no image can be decoded.
    """
    try:
        source = open_source(data_path, "val", labels=False)
    except UserError:  # pretraining needs no val/, so an unusable one must not end the run
        source = train
    images = []
    for index in evenly_spaced(len(source.labels), count):
        try:
            images.append(model_input(source.read(index), size, "shorter", pixels))
        except (BrokenImage, OSError):
            continue
    return torch.stack(images) if images else None


def evenly_spaced(images: int, count: int) -> range:
    """Return the numbers of at most `count` of so many images."""
    return range(0, images, -(-images // count))


def visible(images: Tensor, pixels: Pixels) -> np.ndarray:
    """Return normalised images (..., C, H, W) as they are drawn, (..., H, W, 3) from 0 to 1.

    Of more than three channels the first three are drawn, of two the first one.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    colours = [0, 1, 2] if pixels.channels >= 3 else [0, 0, 0]
    shown = (images.float().cpu() * std + mean).clamp(0, 1)
    return shown[..., colours, :, :].movedim(-3, -1).numpy()


def draw_sheets(model: Predicts, imgs: Tensor, pixels: Pixels = IMAGENET) -> "list[Figure]":
    """Draw one figure per image: input, order of prediction, prediction, and loss of each patch.

    Args:
        model: a `PretrainModel`; compiled blocks run eagerly here, so that drawing compiles nothing.
        imgs: (B, C, H, W), normalised, on the model's device. Of more than three channels, the first three are drawn.
        pixels: their mean and standard deviation.
    """
    with torch.compiler.set_stance("force_eager"):
        predicted, losses, places = model.predicted_images(imgs)
    images, predictions = visible(imgs, pixels), visible(predicted, pixels)
    side = model.cluster_size * model.patch_size
    orders = [None] * len(imgs) if places is None else places.tolist()
    panels = zip(images, predictions, losses.float().cpu().numpy(), orders, strict=True)
    return [_sheet(*panel, side, title_of_input(imgs.shape[1])) for panel in panels]


def title_of_input(channels: int) -> str:
    """Return the title of the input, which says what is drawn of images that are neither grey nor RGB."""
    if channels in (1, 3):
        return "input"
    return "input, channel 1 of 2" if channels == 2 else f"input, channels 1-3 of {channels}"


def pixels(figure: "Figure") -> np.ndarray:
    """Return a figure as pixels, (h, w, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _sheet(
    image: np.ndarray, predicted: np.ndarray, losses: np.ndarray, places: list[list[int]] | None, side: int, title: str
) -> "Figure":
    """Draw the figure of one image.

    Args:
        image: (H, W, 3), from 0 to 1.
        predicted: the same, with given and predicted patches.
        losses: (rows, columns) of the patches; NaN where a patch is given.
        places: (rows, columns) of the clusters, their place in the order of prediction, 0 for a given one; None if all
            are predicted at once.
        side: side of a cluster in pixels.
        title: of the image.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    inch = SIDE / max(height, width)
    panel = max(width * inch, 2.3) + 0.15  # no narrower than the titles
    figure = Figure(figsize=(4 * panel + 0.7, height * inch + 0.5), dpi=100, layout="constrained")
    axes = figure.subplots(1, 4)
    if places is None:
        hidden = np.kron(~np.isnan(losses), np.ones((height // len(losses),) * 2)).astype(bool)  # (H, W)
        panels = (image, np.where(hidden[..., None], 0.5, image), predicted)
        titles = (title, "what the encoder sees", "hidden patches predicted")
    else:
        panels = (image, 0.65 + 0.35 * image, predicted)  # paler under the numbers
        titles = (title, "clusters in order of prediction", "each predicted from those before")
    for axis, panel, title in zip(axes, panels, titles, strict=False):
        axis.imshow(panel, interpolation="nearest", extent=(0, width, height, 0))
        axis.set_title(title, fontsize=10)
    for row, numbers in enumerate(places or []):
        for column, number in enumerate(numbers):
            x, y = column * side, row * side
            axes[1].add_patch(Rectangle((x, y), side, side, fill=False, edgecolor="black", linewidth=0.8))
            axes[1].text(
                x + side / 2, y + side / 2, str(number) if number else "given", ha="center", va="center",
                fontsize=min(14, 26 * side * inch), color="black",
            )  # fmt: skip
            if number == 0:
                for axis in axes[1:]:
                    axis.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=GIVEN, linewidth=2))
    errors = axes[3].imshow(losses, cmap="viridis", vmin=0, interpolation="nearest", extent=(0, width, height, 0))
    axes[3].set_title(f"loss of each patch, mean {np.nanmean(losses):.3g}", fontsize=10)
    figure.colorbar(errors, ax=axes[3], fraction=0.05 * height / width, pad=0.02)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    return figure
