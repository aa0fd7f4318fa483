"""The demo's pictures: curves of the three runs, and images beside what the model predicts."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import ImageFolder

import pretrained
from util.data.decode import with_pillow
from util.data.transforms import eval_transform


def draw_curves(logs: dict[str, list[dict]], path: Path) -> None:
    """Pretraining loss on the left, accuracy of both finetuning runs on the right.

    Args:
        logs: lines of log.txt by run: pretrain, finetune, scratch.
        path: PNG file to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rows = logs["pretrain"]
    left.plot([row["epoch"] + 1 for row in rows], [row["train_loss"] for row in rows], "o-", color="tab:blue")
    left.set(title="autoregressive pretraining", xlabel="epoch", ylabel="loss on normalised pixels")
    for run, name, colour in (
        ("finetune", "from pretraining", "tab:blue"),
        ("scratch", "from random weights", "tab:gray"),
    ):
        rows = logs[run]
        epochs, accuracy = [row["epoch"] + 1 for row in rows], [row["test_acc1"] for row in rows]
        right.plot(epochs, accuracy, "o-", color=colour, label=f"{name}: {accuracy[-1]:.1f} %")
    right.set(title="finetuning", xlabel="epoch", ylabel="top-1 on held-out images (%)")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_predictions(path: Path, image_folder: Path, picture: Path) -> None:
    """Original images above what a pretraining checkpoint predicts of them, one image of each class.

    Args:
        path: pretraining checkpoint.
        image_folder: folder with one folder of images a class.
        picture: PNG file to write.
    """
    model, _ = pretrained.load(path)
    height, width = model.image_size
    transform = eval_transform((height, width), "square")
    dataset = ImageFolder(str(image_folder), transform, loader=lambda path: with_pillow(Path(path).read_bytes()))
    firsts = [dataset.targets.index(label) for label in range(len(dataset.classes))]
    imgs = torch.stack([dataset[i][0] for i in firsts])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    # Digits are grey: the mean over channels shows them without the colours of a misplaced normalised patch.
    rows = [(batch * std + mean).mean(dim=1) for batch in (imgs, model.predicted_images(imgs)[0])]  # (B, H, W)
    side = model.cluster_size * model.patch_size
    figure, axes = plt.subplots(2, len(imgs), figsize=(len(imgs), 2.6), layout="constrained")
    for row, (images, name) in enumerate(zip(rows, ("image", "predicted"), strict=True)):
        for column, image in enumerate(images):
            axis = axes[row, column]
            axis.imshow(
                image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=(0, width, height, 0)
            )
            axis.set(
                xticks=range(0, width, side)[1:], yticks=range(0, height, side)[1:], xticklabels=[], yticklabels=[]
            )
            axis.grid(color="white", alpha=0.25, linewidth=0.6)
            axis.tick_params(length=0)
            if row == 1:
                axis.add_patch(Rectangle((0, 0), side, side, fill=False, edgecolor="tab:orange", linewidth=2))
        axes[row, 0].set_ylabel(name)
    title = (
        "Each cluster predicted from the true ones before it; given: the first (orange), mean and contrast of patches"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
