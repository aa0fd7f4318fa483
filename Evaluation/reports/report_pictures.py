"""Draw the pictures of a report: confusions, accuracy of each class, calibration."""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = 50  # classes: up to this number, all of them are drawn with their names
MOST = 40  # classes that are drawn of more than `ALL`
COUNTED = 20  # classes: up to this number, the cells of a matrix hold their numbers of images
LETTERS = 28  # of a name
BLUE, ORANGE = "tab:blue", "tab:orange"

# Functions import matplotlib themselves: that takes a second, which --help and a user's mistake need not.


def draw_confusions(row: dict, names: list[str]) -> "Figure":
    """Draw the confusion matrix of all classes up to `ALL`, otherwise of those with the most frequent confusions.

    Colours are shares of each class's images. Of a part of the classes, another column counts all other classes; images
    without an answer have a column, too.

    Args:
        row: result of `Evaluation.reports.metrics.measure`.
        names: of the classes.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    chosen = chosen_classes(row)
    table, images = row["classes"], np.array(row["classes"]["images"])[chosen]
    place = {label: at for at, label in enumerate(chosen)}
    counts = np.zeros((len(chosen), len(chosen) + 2), dtype=np.int64)  # the last columns: other classes, no answer
    for at, label in enumerate(chosen):
        counts[at, at], counts[at, -1] = table["correct"][label], table["unanswered"][label]
    for label, predicted, times in row["confusions"]:
        if label in place:
            counts[place[label], place.get(predicted, len(chosen))] += times
    used = [*range(len(chosen)), *(column for column in (-2, -1) if counts[:, column].any())]
    counts, more = counts[:, used], [("other classes", "no answer")[column] for column in used[len(chosen) :]]
    shares = 100 * counts / np.where(images > 0, images, np.nan)[:, None]

    side = max(2.2, (0.36 if len(chosen) <= COUNTED else 0.21) * len(used))
    labels = [label_of(names, label) for label in chosen]
    margin = 0.085 * max(map(len, [*labels, *more]))
    figure = Figure(figsize=(side + margin + 2.2, side * len(chosen) / len(used) + margin + 0.9), layout="constrained")
    axis = figure.add_subplot()
    colours = colormaps["Blues"].with_extremes(bad="0.85")
    norm = PowerNorm(0.5, 0, 100)  # confusions of a few percent can be seen
    picture = axis.imshow(shares, cmap=colours, norm=norm, interpolation="nearest")
    small = 8.5 if len(chosen) <= COUNTED else 7.5
    axis.set_xticks(range(len(used)), [*labels, *more], rotation=90, fontsize=small, parse_math=False)
    axis.set_yticks(range(len(chosen)), labels, fontsize=small, parse_math=False)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("class of the image")
    axis.tick_params(length=0)
    axis.set_xticks(np.arange(len(used) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(chosen) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="0.9", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    if more:
        axis.axvline(len(chosen) - 0.5, color="black", linewidth=1)
    if len(chosen) <= COUNTED:
        for (y, x), count in np.ndenumerate(counts):
            if count:
                white = "white" if shares[y, x] > 30 else "black"
                axis.text(x, y, str(count), ha="center", va="center", fontsize=8 if count < 1000 else 6, color=white)
    bar = figure.colorbar(picture, ax=axis, fraction=0.04, pad=0.02, aspect=25)
    bar.set_label("% of the class's images")
    title = f"{len(chosen)} of {len(names)} classes: the most confused" if len(chosen) < len(names) else "all classes"
    axis.set_title(title + "; grey: without images" * (0 in images), fontsize=10)
    return figure


def chosen_classes(row: dict) -> list[int]:
    """Return the classes to draw; of more than `ALL`, classes that are often confused stand side by side."""
    images = row["classes"]["images"]
    if len(images) <= ALL:
        return list(range(len(images)))
    largest = np.argsort(-np.array(images), kind="stable")[:MOST].tolist()
    confused = [label for label, predicted, _ in row["confusions"][:MOST] for label in (label, predicted)]
    rest = list(dict.fromkeys([*confused, *largest]))[:MOST]
    times: Counter[frozenset[int]] = Counter()
    for label, predicted, count in row["confusions"]:
        times[frozenset((label, predicted))] += count
    order = [rest.pop(0)]
    while rest:  # the one that is most often confused with the last one; without any, the next one
        order.append(max(rest, key=lambda label: times[frozenset((order[-1], label))]))
        rest.remove(order[-1])
    return order


def draw_classes(row: dict, names: list[str]) -> "Figure":
    """Draw the accuracy of each class with its interval, from the least to the greatest.

    More than `ALL` classes are a curve without names.
    """
    from matplotlib.figure import Figure

    table = {name: np.array(values, dtype=float) for name, values in row["classes"].items()}
    order = sorted_classes(row)
    accuracy, low, high = (table[name][order] for name in ("accuracy", "low", "high"))
    places, many = np.arange(len(order)), len(order) > ALL
    mean = row["balanced_accuracy"]
    if many:
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axis = figure.add_subplot()
        axis.fill_between(places, low, high, step="mid", color=BLUE, alpha=0.25, linewidth=0, label="95 % interval")
        axis.step(places, accuracy, where="mid", color=BLUE, linewidth=1.2, label="accuracy of a class")
        axis.axhline(mean, color=ORANGE, linestyle="--", linewidth=1.2, label=f"mean over classes, {mean:.1f} %")
        axis.set(xlabel="classes with images, sorted by accuracy", ylabel="accuracy (%)", ylim=(-2, 102))
        axis.set_xlim(-0.5, len(order) - 0.5)
        axis.legend(fontsize=8, loc="lower right")
    else:
        figure = Figure(figsize=(6.5, 0.21 * len(order) + 1.3), layout="constrained")
        axis = figure.add_subplot()
        axis.hlines(places, low, high, color=BLUE, alpha=0.45, linewidth=3)
        axis.plot(accuracy, places, "o", color=BLUE, markersize=4.5)
        axis.axvline(mean, color=ORANGE, linestyle="--", linewidth=1.2)
        figure.suptitle(f"accuracy and 95 % interval; dashed: mean over classes, {mean:.1f} %", fontsize=10)
        labels = [f"{label_of(names, label)}  ({row['classes']['images'][label]})" for label in order]
        axis.set_yticks(places, labels, fontsize=8, parse_math=False)
        axis.set(xlabel="accuracy (%)", xlim=(-2, 102), ylim=(len(order) - 0.5, -0.5), ylabel="class (images)")
    axis.grid(alpha=0.3, axis="y" if many else "x")
    return figure


def sorted_classes(row: dict) -> list[int]:
    """Return the classes with images, from the least accurate; of equal ones the one with more images first."""
    table = row["classes"]
    shown = [label for label, images in enumerate(table["images"]) if images]
    return sorted(shown, key=lambda label: (table["accuracy"][label], -table["images"][label]))


def draw_calibration(row: dict, _: list[str]) -> "Figure":
    """Draw a reliability diagram: accuracy over confidence with intervals, above a histogram of confidence."""
    from matplotlib.figure import Figure

    bins, answered = row["bins"], sum(own["images"] for own in row["bins"])
    figure = Figure(figsize=(5.2, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, width = [own["low"] for own in bins], bins[0]["high"] - bins[0]["low"]
    confidence, accuracy = ([own[name] for own in bins] for name in ("confidence", "accuracy"))
    low, high = zip(*(own["interval"] for own in bins), strict=True)
    upper.plot([0, 100], [0, 100], color="0.4", linestyle="--", linewidth=1, label="perfectly calibrated")
    upper.bar(left, accuracy, width, align="edge", color=BLUE, alpha=0.25, edgecolor=BLUE, linewidth=0.7)
    upper.vlines(confidence, low, high, color=BLUE, linewidth=1.4, label="95 % interval")
    upper.plot(confidence, accuracy, "o", color=BLUE, markersize=5, label="accuracy at mean confidence of the bin")
    upper.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 102))
    upper.set_title(f"expected calibration error {row['ece']:.1f} %", fontsize=10)
    white = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}  # over the line of the mean
    bars = lower.bar(left, [own["images"] for own in bins], width, align="edge", color="0.7", edgecolor="0.4")
    lower.bar_label(bars, fontsize=7, padding=1, rotation=90 if answered > 999 else 0, bbox=white)
    lower.axvline(row["confidence"], color=ORANGE, linewidth=1.4, label=f"mean confidence, {row['confidence']:.1f} %")
    lower.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images")
    lower.margins(y=0.45 if answered > 999 else 0.25)
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure


def label_of(names: list[str], label: int) -> str:
    """Return the name of a class for a picture: shortened, and its number if the font lacks one of its letters."""
    from matplotlib.font_manager import findfont, get_font

    name, font = names[label], get_font(findfont("DejaVu Sans"))
    if not all(font.get_char_index(ord(letter)) for letter in name):
        return f"class {label}"
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 10]}…{name[-9:]}"
