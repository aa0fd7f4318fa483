"""Draw docs/method.png, the README's figure of the method.

python docs/draw_method.py
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

WIDTH, HEIGHT = 9.0, 6.3  # inches; the README shows them 900 pixels wide, so a point is 1.4 pixels
INK, GREY, BLUE, ORANGE = "#222222", "#8a8a8a", "#2f6db3", "#d9771e"
CLUSTERS, PATCHES, PIXELS = 3, 4, 16  # clusters a side, patches a side of a cluster, pixels a side of a patch


def landscape() -> np.ndarray:
    """Return a picture of a sun over hills and a lake, (192, 192, 3) from 0 to 1."""
    side = CLUSTERS * PATCHES * PIXELS
    y, x = np.mgrid[0:side, 0:side] / side
    sky = np.stack([0.98 - 0.45 * (1 - y), 0.80 - 0.05 * y, 0.62 + 0.35 * (1 - y)], axis=-1)
    sun = np.exp(-((((x - 0.68) ** 2 + (y - 0.25) ** 2) / 0.008) ** 2))[..., None]
    image = sky * (1 - sun) + sun * np.array([1.0, 0.93, 0.55])
    for height, sharp, colour in (
        (0.42 + 0.16 * np.abs(np.sin(5.2 * x + 0.6)), 0.05, (0.45, 0.52, 0.68)),
        (0.56 + 0.10 * np.sin(7.0 * x + 2.0), 0.03, (0.27, 0.42, 0.40)),
    ):
        under = (y > height)[..., None]
        light = 1 + sharp * np.sin(60 * (x + 0.7 * y))[..., None]
        image = np.where(under, np.array(colour) * light, image)
    lake = (y > 0.72)[..., None]
    waves = 0.06 * np.sin(90 * y + 6 * np.sin(9 * x))[..., None]
    image = np.where(lake, np.array([0.35, 0.55, 0.72]) + waves + 0.25 * sun[::-1], image)
    return image.clip(0, 1)


def blurred(cluster: np.ndarray) -> np.ndarray:
    """Return a cluster as a model may predict it, (h, w, 3): patches with less detail."""
    p = PIXELS
    patches = cluster.reshape(PATCHES, p, PATCHES, p, 3)  # (h, w, 3) -> (rows, p, columns, p, 3)
    return (0.25 * patches + 0.75 * patches.mean(axis=(1, 3), keepdims=True)).reshape(cluster.shape)


def picture(axis: Axes, pixels: np.ndarray, x: float, y: float, side: float, edge: str = INK) -> None:
    """Draw pixels in a square with its lower left corner at (x, y)."""
    axis.imshow(pixels, extent=(x, x + side, y, y + side), interpolation="nearest", zorder=2)
    axis.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=edge, linewidth=1.2, zorder=3))


def write(axis: Axes, x: float, y: float, text: str, size: float = 9.5, colour: str = INK, **options: str) -> None:
    """Write a text, centred at (x, y) unless `options` say otherwise."""
    axis.text(x, y, text, fontsize=size, color=colour, **{"ha": "center", "va": "center", **options})


def box(axis: Axes, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    """Draw a rounded box with a text in it."""
    style = "round,pad=0,rounding_size=0.08"
    how = {"facecolor": colour, "edgecolor": "none", "alpha": 0.16, "zorder": 1}
    axis.add_patch(FancyBboxPatch((x, y), width, height, style, **how))
    write(axis, x + width / 2, y + height / 2, text, 10)


def arrow(axis: Axes, start: tuple, end: tuple, colour: str = GREY, width: float = 1.2) -> None:
    """Draw an arrow between two points."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    axis.annotate("", end, start, arrowprops=style, zorder=4)


def badge(axis: Axes, x: float, y: float, text: str, size: float = 10) -> None:
    """Draw a number that is legible on any picture."""
    how = {"boxstyle": "circle,pad=0.18", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axis.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, bbox=how, zorder=5)


def draw_pretraining(axis: Axes, image: np.ndarray) -> None:
    """Draw the image in clusters on the left; on the right clusters as they are read and predicted."""
    write(axis, 0.1, 6.23, "Pretraining", 13, ha="left", fontweight="bold")
    write(axis, 1.5, 6.22, "predict each next cluster of patches", 10.5, GREY, ha="left")
    x0, y0, side = 0.1, 3.0, 2.4
    picture(axis, image, x0, y0, side)
    step = side / CLUSTERS
    for i in range(1, CLUSTERS * PATCHES):
        at, strong = i * step / PATCHES, i % PATCHES == 0
        line = {"color": "white", "linewidth": 2.2 if strong else 0.4, "alpha": 1.0 if strong else 0.6, "zorder": 3}
        axis.plot([x0 + at] * 2, [y0, y0 + side], **line)
        axis.plot([x0, x0 + side], [y0 + at] * 2, **line)
    for n in range(CLUSTERS**2):
        row, column = divmod(n, CLUSTERS)
        badge(axis, x0 + (column + 0.5) * step, y0 + side - (row + 0.5) * step, str(n + 1), 11)
    write(axis, x0 + side / 2, 2.82, "clusters of 4 × 4 patches,\nread in this order", va="top")

    pixels = PATCHES * PIXELS
    clusters = [image[r : r + pixels, c : c + pixels] for r in range(0, 192, pixels) for c in range(0, 192, pixels)]
    left, right, small = 3.15, 8.9, 0.72
    columns = [(left + 0.1 + i * 1.03, n) for i, n in enumerate((0, 1, 2))] + [(right - 0.1 - small, CLUSTERS**2 - 2)]
    low, high = 3.0, 4.98
    box(axis, left, 3.86, right - left, 0.36, BLUE, "Mamba encoder, left to right")
    box(axis, left, 4.42, right - left, 0.36, ORANGE, "cross-attention decoder: sees these clusters and those before")
    for x, n in columns:
        centre = x + small / 2
        picture(axis, clusters[n], x, low, small)
        badge(axis, x + 0.15, low + small - 0.15, str(n + 1), 8.5)
        arrow(axis, (centre, low + small + 0.01), (centre, 3.86))
        arrow(axis, (centre, 4.22), (centre, 4.42))
        arrow(axis, (centre, 4.78), (centre, high))
        picture(axis, blurred(clusters[n + 1]), x, high, small, ORANGE)
        badge(axis, x + 0.15, high + small - 0.15, str(n + 2), 8.5)
    gap = (columns[2][0] + small + columns[3][0]) / 2
    for y in (low + small / 2, high + small / 2):
        write(axis, gap, y, "· · ·", 14, GREY)
    for (x, _), (after, _) in pairwise(columns[:3]):
        arrow(axis, (x + small + 0.05, low + small / 2), (after - 0.05, low + small / 2), BLUE)
    write(axis, (left + right) / 2, 2.82, "the clusters that are read: all but the last", va="top")
    write(axis, (left + right) / 2, 5.86, "predicted: the normalised pixels of the next one")


def draw_finetuning(axis: Axes, image: np.ndarray) -> None:
    """Draw four grids with the path of each direction, their average, and the classification."""
    axis.plot([0.1, 8.9], [2.28, 2.28], color="#dddddd", linewidth=1)
    write(axis, 0.1, 2.03, "Finetuning", 13, ha="left", fontweight="bold")
    text = "the pretrained scan is copied into four directions over all patches"
    write(axis, 1.5, 2.02, text, 10.5, GREY, ha="left")
    side, y0, lines = 1.14, 0.55, 4
    pale = 0.45 + 0.55 * image
    ends = np.array([0.08, side - 0.08])
    for i, name in enumerate(("rows, forward", "rows, backward", "columns, forward", "columns, backward")):
        x0 = 0.1 + i * 1.5
        picture(axis, pale, x0, y0, side)
        along = ends if i % 2 == 0 else ends[::-1]
        starts = []
        for k in range(lines) if i % 2 else reversed(range(lines)):  # from the top, or back from the bottom
            across = (k + 0.5) * side / lines
            rows = [(x0 + a, y0 + across) for a in along]
            starts.append(rows if i < 2 else [(x0 + side - across, y0 + side - a) for a in along])
        for (_, end), (begin, _) in pairwise(starts):
            axis.plot(*zip(end, begin, strict=True), color=BLUE, linewidth=0.8, linestyle=":", zorder=3)
        for begin, end in starts:
            arrow(axis, begin, end, BLUE, 1.5)
        write(axis, x0 + side / 2, y0 - 0.1, name, va="top")
        if i < 3:
            write(axis, x0 + side + 0.18, y0 + side / 2, "+", 13, GREY)
    arrow(axis, (5.83, y0 + side / 2), (6.2, y0 + side / 2))
    box(axis, 6.25, y0 + 0.27, 1.45, 0.6, BLUE, "averaged in\nevery block")
    arrow(axis, (7.75, y0 + side / 2), (8.12, y0 + side / 2))
    write(axis, 8.53, y0 + side / 2, "pooled,\nclassified", 10)


def main() -> None:
    """Draw the figure and write it beside this file."""
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    image = landscape()
    draw_pretraining(axis, image)
    draw_finetuning(axis, image)
    axis.set(xlim=(0, WIDTH), ylim=(0.15, 0.15 + HEIGHT), aspect="equal")
    axis.axis("off")
    figure.savefig(Path(__file__).with_name("method.png"), dpi=200)


if __name__ == "__main__":
    main()
