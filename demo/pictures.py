"""The demo's pictures: curves and accuracies of its runs, and images beside the model's predictions."""

import re
from pathlib import Path
from typing import cast

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import ImageFolder

import pretrained
from models_pretrain import PretrainModel
from util.data.decode import with_pillow
from util.data.transforms import eval_transform
from util.files import save_figure


def draw_curves(logs: dict[str, list[dict]], table: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the loss of pretraining, the accuracy during both finetunings, and the accuracies of the table as bars.

    Args:
        logs: lines of log.txt by run: pretrain, finetune_pretrained and finetune_random.
        table: by row, the accuracy in percent with pretrained and with random weights.
        path: PNG file to write.
    """
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    loss, accuracy, bars = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    loss.plot(*over_epochs(logs["pretrain"], "train_loss"), color="tab:gray", marker=".")
    loss.set_title("loss of pretraining, without labels", fontsize=10)
    colours = {"pretrained": "tab:orange", "random": "tab:blue"}
    for name, colour in colours.items():
        label = f"{name} weights"
        accuracy.plot(*over_epochs(logs[f"finetune_{name}"], "test_acc1"), color=colour, marker=".", label=label)
        places = [number + (0.2 if name == "random" else -0.2) for number in range(len(table))]
        drawn = bars.barh(places, [row[name] for row in table.values()], height=0.36, color=colour)
        bars.bar_label(drawn, fmt="%.1f %%", padding=3)
    accuracy.set_title("top-1 (%) of finetuning with few labels", fontsize=10)
    accuracy.legend(loc="lower right")
    bars.set_title("top-1 (%) on held-out digits", fontsize=10)
    bars.set(
        xlim=(0, 115),
        yticks=range(len(table)),
        yticklabels=[re.sub(",? (?=20|linear|50)", "\n", title) for title in table],
    )
    bars.invert_yaxis()
    for axis in (loss, accuracy):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    save_figure(figure, path, "ARM curves", dpi=120)


def over_epochs(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Return the finished epochs, from 1, and a logged value after each of them."""
    return [row["epoch"] + 1 for row in rows], [row[key] for row in rows]


def draw_predictions(path: Path, image_folder: Path, picture: Path) -> None:
    """Draw one image of each class, above the predictions of a pretraining checkpoint.

    Args:
        path: pretraining checkpoint.
        image_folder: has one folder of images for each class.
        picture: PNG file to write.
    """
    model = cast(PretrainModel, pretrained.load(path)[0])
    height, width = model.image_size
    transform = eval_transform((height, width), "square")
    dataset = ImageFolder(str(image_folder), transform, loader=lambda path: with_pillow(Path(path).read_bytes()))
    firsts = [dataset.targets.index(label) for label in range(len(dataset.classes))]
    imgs = torch.stack([dataset[i][0] for i in firsts])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    # Digits are grey: the mean over channels shows them without the colours of a misplaced normalised patch.
    rows = [(batch * std + mean).mean(dim=1) for batch in (imgs, model.predicted_images(imgs)[0])]  # (B, H, W)
    side = model.cluster_size * model.patch_size
    figure = Figure(figsize=(len(imgs), 2.6), layout="constrained")
    axes = figure.subplots(2, len(imgs))
    for row, (images, name) in enumerate(zip(rows, ("image", "predicted"), strict=True)):
        for column, image in enumerate(images):
            axis = axes[row, column]
            extent = (0, width, height, 0)
            axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
            axis.set(xticks=range(side, width, side), yticks=range(side, height, side))
            axis.tick_params(length=0, labelbottom=False, labelleft=False)
            axis.grid(color="white", alpha=0.25, linewidth=0.6)
            if row == 1:
                axis.add_patch(Rectangle((0, 0), side, side, fill=False, edgecolor="tab:orange", linewidth=2))
        axes[row, 0].set_ylabel(name)
    title = "Each cluster predicted from the true ones before it"
    figure.suptitle(f"{title}; given: the first (orange), mean and contrast of patches", fontsize=10)
    save_figure(figure, picture, "ARM predictions", dpi=120)
