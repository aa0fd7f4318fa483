"""Where encoded images and their labels come from: a folder, tar shards, or a Hugging Face dataset.

A source gives any image by its number, so that shuffling, sharding and resuming are left to the sampler: exact
counts, and the same samples whatever the number of processes and workers. Streaming readers (webdataset, timm's)
read the same shards, but shuffle within a buffer and cannot start in the middle of an epoch.
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
MAX_CLASSES = 10**6  # far more than any classification has; what is larger is an id
THREADS = 16  # that ask for the states of files
MAX_IMAGE = 6 * MAX_PIXELS  # bytes of an image file: 3 x 16 bits for each of the most pixels that are decoded


# Readers by the prefix of --data_path: the class, imported when it is asked for, and what the help says of it. Without
# a known prefix, `Folder` reads.
READERS = {
    "wds": ("util.data.tar_shards.TarShards", "wds:FOLDER of tar shards"),
    "hfds": ("util.data.hub_dataset.HubDataset", "hfds:NAME or hfds:FOLDER of a Hugging Face dataset"),
}


class Source(Protocol):
    """Encoded images with labels.

    Attributes:
        root: what names the source in messages.
        classes: names of the classes, by label; empty for a label whose class the source does not name.
        labels: (n,) int64.
    """

    root: str
    classes: list[str]
    labels: np.ndarray

    def read(self, index: int) -> bytes:
        """Read the content of an image file; raises OSError."""

    def name(self, index: int) -> str:
        """Return what names the image in messages: printable, and never an exception."""

    def state(self) -> str:
        """Return a hash that differs once a file that images are read from has changed."""


def open_source(data_path: str, split: str) -> Source:
    """Find the images that `--data_path` names. What is left out of them is counted in one warning.

    Args:
        data_path: a folder with train/ and val/, one folder of images a class; wds:FOLDER with tar shards in
            FOLDER/train and FOLDER/val, or with the word train or val in their names; hfds:NAME of a dataset on the
            Hugging Face hub or of a folder that `datasets` can load.
        split: "train" or "val".

    Raises:
        UserError: it is not there, or not of this form.
    """
    kind, colon, path = data_path.partition(":")
    if not colon or kind not in READERS:
        return Folder(data_path, split)
    if not path:
        raise UserError(f"--data_path {data_path}: nothing follows the colon")
    module, _, reader = READERS[kind][0].rpartition(".")
    return getattr(import_module(module), reader)(path, split)


def read_at(file: BinaryIO, offset: int, size: int, path: str | os.PathLike) -> bytes:
    """Read an image file, or the part of a file that holds one."""
    if size > MAX_IMAGE:
        raise OSError(errno.EFBIG, f"an image of {size} bytes is larger than {MAX_IMAGE}", path)
    data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise OSError(errno.EIO, f"{len(data)} of {size} bytes from byte {offset} are left", path)
    return data


def is_folder(path: str | os.PathLike) -> bool:
    """Tell whether a folder is there; raises OSError where that cannot be told, as without permission."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def hash_states(paths: Sequence[bytes]) -> str:
    """Hash the name, size and modification time of every file.

    A million files take some seconds on a local disk, by threads, since a network's file system answers slowly.
    """

    def share(numbers: range) -> bytes:
        digest = hashlib.sha256()
        for number in numbers:
            path = paths[number]
            try:
                found = os.stat(path)
                digest.update(b"%b\0%d\0%d\0" % (path, found.st_size, found.st_mtime_ns))
            except OSError:  # a broken image, which is told when it is read
                digest.update(b"%b\0\0\0" % path)
        return digest.digest()

    with ThreadPoolExecutor(THREADS) as pool:
        shares = [range(len(paths) * i // THREADS, len(paths) * (i + 1) // THREADS) for i in range(THREADS)]
        return hashlib.sha256(b"".join(pool.map(share, shares))).hexdigest()


def count_left_out(found: dict[str, list[str]]) -> str:
    """One line that counts what is left out, by the reason; empty where nothing is."""
    return "; ".join(
        f"{len(names)} {reason} and are left out; the first: {printable(names[0])}"
        for reason, names in found.items()
        if names
    )


# ---- folders

LOOSE = "files lie beside the class folders"
UNKNOWN = "files do not end as images that can be read"
HIDDEN = "images or folders are hidden"
LOOPS = "links lead to folders that hold them"


class Folder:
    """A folder of images a class.

    Classes and images have the order of torchvision's `ImageFolder`. Other than there, hidden files and folders are
    left out, and all suffixes of `util.data.decode.SUFFIXES` are taken.

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
        # not a list of strings: counting references to them would copy its memory into every worker
        self.paths = np.array([os.fsencode(path) for paths in images for path in paths])
        if left_out:
            LOGGER.warning("%s: %s", self.root, left_out)

    def _list(self) -> tuple[list[str], list[list[str]], str]:
        """Names of the class folders, paths of the images in each of them, and what is left out."""
        hidden: list[str] = []
        loops: list[str] = []
        unknown: list[str] = []
        names, loose = _split_entries(self.folder, "", hidden)
        if not names:
            raise UserError(f"{self.root}: Couldn't find any class folder in it")
        (shown, times) = Counter(map(printable, names)).most_common(1)[0]
        if times > 1:
            raise UserError(f"{self.root}: {times} class folders would be called {shown}: rename one")
        images = []
        for name in names:
            files = list(_files_below(self.folder, name, hidden, loops))
            images.append([path for path in files if _is_image(path)])
            unknown += [path for path in files if not _is_image(path)]
        left_out = count_left_out({LOOSE: loose, UNKNOWN: unknown, HIDDEN: hidden, LOOPS: loops})
        empty = [printable(name) for name, paths in zip(names, images, strict=True) if not paths]
        if empty:
            raise UserError(
                f"{self.root}: no image in {len(empty)} of {len(names)} class folders: {', '.join(empty[:5])}"
                + (left_out and f" ({left_out})")
            )
        return names, images, left_out

    def read(self, index: int) -> bytes:
        path = self.path(index)
        with open_regular(path) as file:
            return read_at(file, 0, os.fstat(file.fileno()).st_size, path)

    def path(self, index: int) -> str:
        """Return the path of an image as the operating system takes it."""
        return os.path.join(self.folder, os.fsdecode(self.paths[index]))

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def state(self) -> str:
        return hash_states([os.fsencode(self.path(index)) for index in range(len(self.paths))])


def _is_image(path: str) -> bool:
    _, dot, suffix = path.rpartition(".")
    return bool(dot) and suffix.lower() in SUFFIXES


def _split_entries(root: str, folder: str, hidden: list[str]) -> tuple[list[str], list[str]]:
    """Sorted paths, below `root`, of the folders and of the files in a folder; hidden ones go into `hidden`."""
    folders, files = [], []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads nowhere: reading it tells why
                is_folder = False
            if not entry.name.startswith("."):
                (folders if is_folder else files).append(path)
            elif is_folder or _is_image(path):
                hidden.append(path)
    return sorted(folders), sorted(files)


def _files_below(root: str, folder: str, hidden: list[str], loops: list[str]) -> Iterator[str]:
    """Yield all files below a class folder, through links, in the order of `sorted(os.walk(...))`.

    Hidden ones go into `hidden`, and links to a folder that holds them, which are not followed, into `loops`.

    Raises:
        UserError: a link leads to another folder that is read already, which would count its images twice.
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
                f"{printable(path)} leads to {printable(real)}, which is read already: its images would count twice. "
                "Remove the link"
            )
        read.add(real)
        folders, files = _split_entries(root, here, hidden)
        found.append((here, files))
        pending += [(below, os.path.join(real, os.path.basename(below))) for below in folders]
    for _, files in sorted(found):
        yield from files


# ---- tar shards


# ---- Hugging Face datasets
