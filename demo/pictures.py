"""The demo's pictures: curves of the three runs, and images beside the model's predictions."""

from pathlib import Path
from typing import cast

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import ImageFolder

import pretrained
from models_arm import PretrainModel
from tools import plot_log
from util.data.decode import with_pillow
from util.data.transforms import eval_transform
from util.files import save_figure


def draw_curves(logs: dict[str, list[dict]], path: Path) -> None:
    """Draw the loss of pretraining, and the accuracy of both finetunings, over epochs.

    Args:
        logs: lines of log.txt by run: pretrain, finetune, scratch.
        path: PNG file to write.
    """
    shown = {"pretraining": [{key: row[key] for key in ("epoch", "train_loss")} for row in logs["pretrain"]]}
    for run, start in (("finetune", "pretrained"), ("scratch", "random")):
        rows = [{key: row[key] for key in ("epoch", "test_acc1")} for row in logs[run]]
        shown[f"from {start} weights: {rows[-1]['test_acc1']:.1f} %"] = rows
    save_figure(plot_log.draw(shown), path, plot_log.TITLE, dpi=150)


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
