"""Draw detections on images, beside the true objects where they are known: for visualize.py and the log of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Detection.detection_data import DetectionDataset
from Detection.models_detect import Detector, paste
from util.data.decode import BrokenImage
from util.data.pixels import Pixels
from util.data.sources.coco import CocoSource
from util.tracking.prediction_figures import evenly_spaced, title_of_input, visible
from util.tracking.prediction_figures import pixels as as_pixels
from util.training.precision import autocast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 6.0  # inches, the longer side of a panel
PICTURES = 4  # images of val in the log of a run
SHOWN = 0.5  # score from which detections are drawn
OPACITY = 0.45  # of masks
NAMED = 40  # objects: of up to this number, all are named; of more, those with the largest boxes

Objects = dict[str, Any]  # boxes (n, 4), labels (n,) from 1, and perhaps scores (n,) and masks (n, h, w) bool


class FixedPictures:
    """Draw the detections in evenly spaced images of a source, beside the true objects; the same images in every run.

    Args:
        dataset: of the images as the model sees them in evaluation.
        device: of the model.
        count: number of images; broken ones are left out.
    """

    def __init__(self, dataset: DetectionDataset, device: torch.device, count: int = PICTURES) -> None:
        self.dataset, self.device = dataset, device
        self.indices = evenly_spaced(len(dataset), count)

    def __call__(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Return figures (h, w, 3) uint8 by name."""
        detector, dataset, figures = cast(Detector, model).eval(), self.dataset, {}
        for place, index in enumerate(self.indices):
            try:
                sample = dataset.sample(index)
            except BrokenImage:
                continue
            images, targets = dataset.finish(dataset.collate([sample]), self.device)
            truth = true_objects(dataset.source, index, detector.has_masks)
            (figure,) = draw_detections(detector, images, targets, dataset.source.classes, dataset.pixels, [truth])
            figures[f"image_{place}"] = as_pixels(figure)
        return figures


def true_objects(source: CocoSource, index: int, masks: bool) -> Objects:
    """Return the objects of an image that are no crowds, in pixels of the original; with `masks` their masks, too."""
    objects = source.objects(index)
    single = ~objects.crowd
    found = {"boxes": objects.boxes[single], "labels": objects.labels[single] + 1}
    found |= {"masks": source.masks(index)[single]} if masks else {}
    return {name: torch.from_numpy(values) for name, values in found.items()}


@torch.no_grad()
def draw_detections(
    model: Detector,
    images: Tensor,
    targets: Sequence[dict[str, Any]],
    names: Sequence[str],
    pixels: Pixels,
    truths: Sequence[Objects | None],
    score: float = SHOWN,
) -> list[Figure]:
    """Draw one figure per image: the detections, and beside them the true objects.

    Args:
        model: in evaluation mode; compiled blocks run eagerly here, so that drawing compiles nothing.
        images: (B, C, H, W), normalised, on its device. Of more than three channels, the first three are drawn.
        targets: of each image its `size` in the input and `original` size.
        names: of the classes, from the first that is not the background.
        pixels: mean and standard deviation of the images.
        truths: the true objects of each in pixels of the original; None draws detections only.
        score: least score of a detection that is drawn.
    """
    with torch.compiler.set_stance("force_eager"), autocast(images.device):
        found = model(images, [{**target, "original": target["size"]} for target in targets])
    figures = []
    for image, target, detections, truth in zip(images, targets, found, truths, strict=True):
        height, width = target["size"]
        shown = visible(image[:, :height, :width], pixels)
        taken = detections["scores"] >= score
        drawn = {name: values[taken].cpu() for name, values in detections.items() if name != "finite"}
        if "masks" in drawn:
            drawn["masks"] = torch.cat([*paste(drawn, (height, width))] or [torch.zeros(0, height, width)]).bool()
        title = f"{len(drawn['boxes'])} detections with a score of at least {score:g}"
        if pixels.channels not in (1, 3):
            title += f" ({title_of_input(pixels.channels)})"
        panels = [(title, drawn)]
        if truth is not None:
            true = _resized(truth, target["original"], (height, width))
            panels.append((f"{len(true['boxes'])} true objects", true))
        figures.append(_figure(shown, panels, names))
    return figures


def _resized(objects: Objects, original: tuple[int, int], size: tuple[int, int]) -> Objects:
    """Return objects of an image in its pixels after resizing from `original` to `size`, heights first."""
    scale = torch.tensor([size[1] / original[1], size[0] / original[0]] * 2)
    resized = objects | {"boxes": objects["boxes"] * scale}
    if "masks" in objects:
        masks = objects["masks"][:, None].float()  # (n, 1, h, w)
        if len(masks):
            masks = F.interpolate(masks, size, mode="nearest-exact")
        resized["masks"] = masks[:, 0] > 0 if len(masks) else torch.zeros((0, *size), dtype=torch.bool)
    return resized


def _figure(image: np.ndarray, panels: Sequence[tuple[str, Objects]], names: Sequence[str]) -> Figure:
    """Draw objects on an image (h, w, 3), from 0 to 1, once for each panel: its title, and the objects."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    inch = SIDE / max(height, width)
    panel = max(width * inch, 3.4)  # no narrower than a title
    figure = Figure(figsize=(len(panels) * (panel + 0.1), height * inch + 0.4), dpi=100, layout="constrained")
    palette = colormaps["tab10"]
    for axis, (title, objects) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        labels = objects["labels"].tolist()
        colours = [palette((label - 1) % palette.N) for label in labels]
        shown = image.copy()
        for place in reversed(range(len(objects.get("masks", ())))):  # where masks overlap, the best one is seen
            mask, colour = objects["masks"][place].numpy(), np.array(colours[place][:3])
            shown[mask] = (1 - OPACITY) * image[mask] + OPACITY * colour
        axis.imshow(shown, interpolation="nearest", extent=(0, width, height, 0))
        boxes = objects["boxes"]
        sides = boxes[:, 2:] - boxes[:, :2]
        named = {*sides.prod(dim=1).argsort(descending=True)[:NAMED].tolist()}
        scores = objects["scores"].tolist() if "scores" in objects else [None] * len(labels)
        for place, (label, score, colour) in enumerate(zip(labels, scores, colours, strict=True)):
            (x, y), (w, h) = boxes[place, :2].tolist(), sides[place].tolist()
            axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=1.2))
            if place in named:
                words = names[label - 1] + ("" if score is None else f" {score:.2f}")
                axis.text(
                    x, y, words, fontsize=6, color="white", va="bottom", parse_math=False, clip_on=True,
                    bbox={"facecolor": colour, "alpha": 0.75, "linewidth": 0, "pad": 0.6},
                )  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    return figure
