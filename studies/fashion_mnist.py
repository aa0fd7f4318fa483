"""Fashion-MNIST (Xiao et al. 2017): 60,000 training and 10,000 test images of clothes, 28 x 28 grey, ten classes."""

import gzip
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from studies.shards import write_shard
from util.data.sources.source import hash_states
from util.errors import UserError

PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
FILES = {"train": "train", "val": "t10k"}


class IdxImages:
    """The images of one split as a `util.data.sources.source.Source` of PNG files."""

    def __init__(self, folder: Path, split: str) -> None:
        self.root, self.classes = str(folder), CLASSES
        self.images = _read(folder / f"{FILES[split]}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        self.labels = _read(folder / f"{FILES[split]}-labels-idx1-ubyte.gz", 8).astype(np.int64)

    def read(self, index: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.images[index]).save(file, "PNG")
        return file.getvalue()

    def name(self, index: int) -> str:
        return f"{self.root}/{index:05d}.png"

    def state(self) -> str:
        return hash_states([os.fsencode(path) for path in sorted(Path(self.root).glob("*.gz"))])

    identity = state  # these files are the same everywhere


def _read(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def unpack(folder: Path) -> None:
    """Write Fashion-MNIST as tar shards; torchvision downloads it if Debian's package is not installed.

    The folder gets train/ and val/; an existing split stays as it is.

    Raises:
        UserError: the package is not installed, and the download failed.
    """
    missing = [split for split in FILES if not (folder / split / "0.tar").exists()]
    originals = PACKAGE
    if missing and not originals.is_dir():
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(str(folder), download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"Fashion-MNIST cannot be downloaded: {error}; or say --data_path") from error
        originals = folder / "FashionMNIST" / "raw"
    for split in missing:
        source = IdxImages(originals, split)
        write_shard(folder / split / "0.tar", source, range(len(source.labels)))
