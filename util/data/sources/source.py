"""Define a source of images, and hold what its readers share.

A source returns any image by its index, so shuffling, sharding and resuming are left to the sampler: epochs hold each
image exactly once, and samples do not depend on the number of processes and workers. Streaming readers (webdataset,
timm's) read the same shards, but shuffle within a buffer and cannot start in the middle of an epoch.
"""

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Protocol

import numpy as np

from util.data.decode import MAX_PIXELS
from util.errors import UserError
from util.files import printable

LOGGER = logging.getLogger("arm")

# names of each split; the first one that exists is taken
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
MAX_CLASSES = 10**6  # far more than any dataset has; a larger label is an id
THREADS = 16  # for the states of files
MAX_IMAGE = 6 * MAX_PIXELS  # bytes of an image file: 3 x 16 bits for each pixel of the largest image
HIDDEN = "images or folders are hidden"
BESIDE = "arrays (.npy) are read only where there are no other images"


class Source(Protocol):
    """Encoded images with or without labels: the members of every reader.

    Attributes:
        root: name of the source in messages.
        classes: name of each label's class, or "" if the source does not name it; empty without labels.
        labels: (n,) int64; zeros without labels.
    """

    root: str
    classes: list[str]
    labels: np.ndarray

    def read(self, index: int) -> bytes:
        """Return the content of an image file; raise OSError if it cannot be read."""

    def name(self, index: int) -> str:
        """Return a printable name of the image for messages; never raise."""

    def state(self) -> str:
        """Return a hash that changes when the content of an image may have changed."""

    def identity(self) -> str:
        """Return a hash of the names or sizes of all images in order; it stays the same where they are moved."""


class NoSplit(UserError):
    """The data has no images of the split."""


def choose_split(found: Collection[str], split: str, labels: bool, about: str) -> str | None:
    """Choose, among the splits that a place has, the one to read.

    A line says if it is not called `split`, and which further splits are left out.

    Args:
        found: names of the splits that the place has.
        split: the wanted one: "train", "val", or "" for the images in the place itself.
        labels: whether images need labels. If not, the place itself is read as train if it has neither train nor val.
        about: name of the place in messages.

    Returns:
        One of `found`; "" for the images in the place itself; None if the place does not have the wanted split.

    Raises:
        UserError: the place itself would be taken for train, but has a val, whose images would be trained on.
    """
    if not split:
        return split
    names = [name for name in SPLITS[split] if name in found]
    if names:
        said = [f"{names[0]} is taken as {split}"] if names[0] != split else []
        said += [f"{' and '.join(names[1:])} {'are' if names[2:] else 'is'} left out"] if names[1:] else []
        if said:
            LOGGER.info("%s: %s", about, "; ".join(said))
        return names[0]
    if labels or split != "train":
        return None
    held_out = next((name for name in SPLITS["val"] if name in found), None)
    if held_out:
        raise UserError(
            f"{about}: it has {held_out} and no train, so images to validate with would be trained on: call the others "
            f"train, or name the folder of those to train on"
        )
    return ""


def read_at(file: BinaryIO, offset: int, size: int, path: str | os.PathLike) -> bytes:
    """Read `size` bytes from `offset`: an image file, or one inside a shard; raise OSError."""
    if size > MAX_IMAGE:
        raise OSError(errno.EFBIG, f"an image of {size} bytes is larger than {MAX_IMAGE} bytes", path)
    data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise OSError(errno.EIO, f"{len(data)} of {size} bytes from byte {offset} are left", path)
    return data


def is_folder(path: str | os.PathLike) -> bool:
    """Return whether a path is a folder; raise OSError if that cannot be determined, as without permission."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def hash_states(paths: Sequence[bytes]) -> str:
    """Hash the path, size and modification time of every file.

    A million files take some seconds on a local disk. Threads hide the latency of network file systems.
    """

    def share(indices: np.ndarray) -> bytes:
        digest = hashlib.sha256()
        for path in map(paths.__getitem__, indices):
            try:
                status = os.stat(path)
                digest.update(b"%b\0%d\0%d\0" % (path, status.st_size, status.st_mtime_ns))
            except OSError:  # a broken image, which is reported when it is read
                digest.update(b"%b\0\0\0" % path)
        return digest.digest()

    with ThreadPoolExecutor(THREADS) as pool:
        shares = np.array_split(np.arange(len(paths)), THREADS)
        return hashlib.sha256(b"".join(pool.map(share, shares))).hexdigest()


def without_labels(fault: str, labels: bool) -> None:
    """Raise UserError with a fault of the labels if they are needed; else say that the images are read without them."""
    if labels:
        raise UserError(fault)
    LOGGER.info("%s: the images are read without labels", fault)


def count_left_out(found: dict[str, list[str]]) -> str:
    """Return one line that counts the names left out for each reason, or "" if there are none."""
    line = "{} {} and are left out; the first: {}"
    return "; ".join(line.format(len(names), reason, printable(names[0])) for reason, names in found.items() if names)
