"""Read encoded images and their labels from a folder; find the reader of `--data_path`.

A source returns any image by its index, so shuffling, sharding and resuming are left to the sampler: epochs hold each
image exactly once, and samples do not depend on the number of processes and workers. Streaming readers (webdataset,
timm's) read the same shards, but shuffle within a buffer and cannot start in the middle of an epoch.
"""

import errno
import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from util.data.decode import MAX_PIXELS, SUFFIXES
from util.errors import UserError, as_user_error
from util.files import open_regular, printable

LOGGER = logging.getLogger(__name__)
MAX_CLASSES = 10**6  # far more than any dataset has; a larger label is an id
THREADS = 16  # for the states of files
MAX_IMAGE = 6 * MAX_PIXELS  # bytes of an image file: 3 x 16 bits for each pixel of the largest image

# {prefix of --data_path: (class of the reader, imported when it is used; text for the help)}. Without one of these
# prefixes, `Folder` reads. A new reader is a file with a class `Reader(path, split)` that has the members of `Source`,
# and a line here.
READERS = {
    "wds": ("util.data.tar_shards.TarShards", "wds:FOLDER of tar shards"),
    "hfds": (
        "util.data.hub_dataset.HubDataset",
        "hfds:NAME, hfds:NAME@REVISION/FOLDER or hfds:FOLDER of a dataset of Hugging Face",
    ),
}


class Source(Protocol):
    """Encoded images with labels: the members of every reader.

    Attributes:
        root: name of the source in messages.
        classes: name of each label's class, or "" if the source does not name it.
        labels: (n,) int64.
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


def open_source(data_path: str, split: str) -> Source:
    """Open the images of `--data_path`; one warning counts the files that are left out.

    Args:
        data_path: a folder with train/ and val/, each with one folder of images per class; wds:FOLDER with tar shards
            in FOLDER/train and FOLDER/val, or with the word train or val in their names; hfds:NAME of a dataset on the
            Hugging Face hub (see `HubDataset`) or of a folder that `datasets` can load.
        split: "train" or "val".

    Raises:
        UserError: the data is missing or has another layout.
    """
    kind, colon, path = data_path.partition(":")
    if not colon or kind not in READERS:
        return Folder(data_path, split)
    if not path:
        raise UserError(f"--data_path {data_path}: nothing follows the colon")
    module, _, reader = READERS[kind][0].rpartition(".")
    return getattr(import_module(module), reader)(path, split)


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


def count_left_out(found: dict[str, list[str]]) -> str:
    """Return one line that counts the names left out for each reason, or "" if there are none."""
    line = "{} {} and are left out; the first: {}"
    return "; ".join(line.format(len(names), reason, printable(names[0])) for reason, names in found.items() if names)


# ---- folders

LOOSE = "files lie beside the class folders"
UNKNOWN = "files have no suffix of an image format that can be read"
HIDDEN = "images or folders are hidden"
LOOPS = "links lead to folders that contain them"


class Folder:
    """One folder of images per class.

    Classes and images have the order of torchvision's `ImageFolder`. Unlike there, hidden files and folders are left
    out, and files with any of the suffixes `util.data.decode.SUFFIXES` are read.

    Attributes:
        paths: (n,) bytes, below the folder of the split.
    """

    def __init__(self, data_path: str, split: str) -> None:
        about = f"--data_path {printable(data_path)}: "
        self.folder = str(Path(data_path, split))
        self.root = printable(self.folder)
        with as_user_error(OSError, prefix=about):
            if not is_folder(data_path):
                raise UserError(f"{about}no such folder")
            if not is_folder(self.folder):
                raise UserError(f"{about}there is no folder {split!r} in it")
            names, images, left_out = self._list()
        self.classes = [printable(name) for name in names]
        self.labels = np.repeat(np.arange(len(names)), [len(paths) for paths in images])
        # not a list of strings, whose reference counts would make every worker copy its memory
        self.paths = np.array([os.fsencode(path) for paths in images for path in paths])
        if left_out:
            LOGGER.warning("%s: %s", self.root, left_out)

    def _list(self) -> tuple[list[str], list[list[str]], str]:
        """Return the names of the class folders, the paths of the images in each, and a line on what is left out."""
        found: dict[str, list[str]] = {reason: [] for reason in (LOOSE, UNKNOWN, HIDDEN, LOOPS)}
        names, found[LOOSE] = _split_entries(self.folder, "", found[HIDDEN])
        if not names:
            raise UserError(f"{self.root}: Couldn't find any class folder in it")
        shown, times = Counter(map(printable, names)).most_common(1)[0]
        if times > 1:
            raise UserError(f"{self.root}: {times} class folders would be called {shown}: rename one")
        images = []
        for name in names:
            files = list(_files_below(self.folder, name, found[HIDDEN], found[LOOPS]))
            images.append([path for path in files if _is_image(path)])
            found[UNKNOWN] += [path for path in files if not _is_image(path)]
        left_out = count_left_out(found)
        empty = [printable(name) for name, paths in zip(names, images, strict=True) if not paths]
        if empty:
            without = f"{len(empty)} of {len(names)} class folders: {', '.join(empty[:5])}"
            raise UserError(f"{self.root}: no image in {without}{left_out and f' ({left_out})'}")
        return names, images, left_out

    def read(self, index: int) -> bytes:
        path = self.path(index)
        with open_regular(path) as file:
            return read_at(file, 0, os.fstat(file.fileno()).st_size, path)

    def path(self, index: int) -> str:
        """Return the path of an image for the operating system; it may not be printable."""
        return os.path.join(self.folder, os.fsdecode(self.paths[index]))

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def state(self) -> str:
        return hash_states([os.fsencode(self.path(index)) for index in range(len(self.paths))])


def _is_image(path: str) -> bool:
    _, dot, suffix = path.rpartition(".")
    return bool(dot) and suffix.lower() in SUFFIXES


def _split_entries(root: str, folder: str, hidden: list[str]) -> tuple[list[str], list[str]]:
    """Return the sorted paths, below `root`, of the folders and the files in a folder; add hidden ones to `hidden`."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            try:
                has_entries = entry.is_dir()
            except OSError:  # a link that leads nowhere; reading it gives the reason
                has_entries = False
            if not entry.name.startswith("."):
                (folders if has_entries else files).append(path)
            elif has_entries or _is_image(path):
                hidden.append(path)
    return sorted(folders), sorted(files)


def _files_below(root: str, folder: str, hidden: list[str], loops: list[str]) -> Iterator[str]:
    """Yield all files below a class folder, in the order of `sorted(os.walk(...))`; links are followed.

    Hidden files are added to `hidden`. Links to a folder that contains them are added to `loops` and not followed.

    Raises:
        UserError: a link leads to a folder that was already read, so its images would count twice.
        OSError: a folder cannot be read.
    """
    real = os.path.realpath(root)
    read = {real, *map(str, Path(real).parents)}
    pending, found = [(folder, os.path.join(real, folder))], []
    while pending:
        here, real = pending.pop()
        path = os.path.join(root, here)
        real = os.path.realpath(path) if os.path.islink(path) else real
        place = os.path.realpath(os.path.dirname(path))
        if real in read and f"{place}/".startswith(f"{real.rstrip('/')}/"):
            loops.append(here)
            continue
        if real in read:
            raise UserError(
                f"{printable(path)} leads to {printable(real)}, which was already read: its images would count twice. "
                "Remove the link"
            )
        read.add(real)
        folders, files = _split_entries(root, here, hidden)
        found.append((here, files))
        pending += [(below, os.path.join(real, os.path.basename(below))) for below in folders]
    for _, files in sorted(found):
        yield from files
