"""Draw what a segmenter predicts over an image, beside the true classes where they are known."""

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from Segmentation.segment_inference import Inference
from Segmentation.segmentation_data import SegmentationDataset, nearest
from util.data.decode import BrokenImage
from util.tracking.prediction_figures import evenly_spaced, pixels, title_of_input, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNT = 4  # images that a run draws

SIDE = 3.3  # inches, the longer side of a panel
OPACITY = 0.6  # of colours over the image
NAMED = 24  # classes in a legend
ROW = 3  # of them in a row of it, for each panel 1 more
LETTERS = 24  # of a name

# Functions import matplotlib themselves: that takes a second, which --help and a user's mistake need not.


def palette(classes: int) -> np.ndarray:
    """Return the colour of each class, (K, 3) float from 0 to 1; that of a class is the same for any number of them.

    Hues are at steps of the golden angle, so that classes with near numbers differ; three lightnesses alternate.
    """
    golden = 0.381966
    tones = (0.85, 1.0), (0.6, 0.75), (1.0, 0.6)  # saturation and value
    colours = [colorsys.hsv_to_rgb(i * golden % 1, *tones[i % 3]) for i in range(classes)]
    return np.array(colours).reshape(classes, 3)  # (0,) -> (0, 3) without classes


def overlay(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colour an image (H, W, 3), from 0 to 1, by the class of each pixel (H, W); negative ones keep their values."""
    mixed = (1 - OPACITY) * image + OPACITY * colours[mask.clip(min=0)]
    return np.where(mask[..., None] >= 0, mixed, image).clip(0, 1)  # rounding can exceed 1


def draw_overlays(
    image: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    truth: np.ndarray | None = None,
    title: str = "input",
) -> "Figure":
    """Draw the image, the true classes if they are given, and the predicted ones, with the names of those that occur.

    Args:
        image: (H, W, 3) from 0 to 1.
        predicted: class of each pixel, (H, W) from 0.
        names: of the classes; one without a name is called by its number.
        truth: the same, -1 for pixels that do not count.
        title: of the image.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = palette(len(names))
    masks = {"true classes": truth, "predicted classes": predicted}
    panels = {title: image} | {text: overlay(image, m, colours) for text, m in masks.items() if m is not None}
    area = np.sum([np.bincount(m[m >= 0], minlength=len(names)) for m in masks.values() if m is not None], axis=0)
    found = [label for label in np.argsort(-area, kind="stable").tolist() if area[label]]
    columns = ROW + len(panels)
    rows = -(-min(len(found), NAMED) // columns)
    height, width = image.shape[:2]
    inch = SIDE / max(height, width)
    panel = max(width * inch, 2.3) + 0.15  # no narrower than the titles
    figure = Figure(figsize=(len(panels) * panel, height * inch + 0.5 + 0.22 * rows), dpi=100, layout="constrained")
    for axis, (text, shown) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axis.imshow(shown, interpolation="nearest")
        axis.set_title(text, fontsize=10)
        axis.set(xticks=[], yticks=[])
    handles = [Patch(color=colours[label], label=short(names[label] or str(label))) for label in found[:NAMED]]
    if len(found) > NAMED:
        handles[-1] = Patch(color="none", label=f"and {len(found) - NAMED + 1} more")
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    for label in legend.get_texts():
        label.set_parse_math(False)
    return figure


class FixedPictures:
    """Draw the same evenly spaced images of a dataset again and again, on one process; broken ones are left out.

    Args:
        dataset: whole images.
        names: of the classes.
        inference: how images pass the model.
        device: of the model.
    """

    def __init__(
        self, dataset: SegmentationDataset, names: Sequence[str], inference: Inference, device: torch.device
    ) -> None:
        self.dataset, self.names, self.inference, self.device = dataset, names, inference, device

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Return pictures of input, true and predicted classes, by name: (h, w, 3) uint8."""
        found: dict[str, np.ndarray] = {}
        values = self.dataset.transform.pixels
        for index in evenly_spaced(len(self.dataset), COUNT):
            try:
                sample = self.dataset.sample(index)
            except BrokenImage:
                continue
            (image,), (mask,) = self.dataset.finish(self.dataset.collate([sample]), self.device)
            size = image.shape[1], image.shape[2]
            answer, _ = self.inference(model, image[None], size)
            truth = nearest(mask.cpu().numpy(), size)
            title = title_of_input(values.channels)
            figure = draw_overlays(visible(image, values), answer[0].cpu().numpy(), self.names, truth, title)
            found[f"image_{len(found)}"] = pixels(figure)
        return found


def short(name: str) -> str:
    """Return a name that fits into a legend."""
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"
