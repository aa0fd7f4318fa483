"""Read encoded images and their labels from a folder."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from util.data.decode import SUFFIXES
from util.data.sources.readers import HIDDEN, count_left_out, hash_states, is_folder, read_at
from util.errors import UserError, as_user_error
from util.files import open_regular, printable

LOGGER = logging.getLogger(__name__)

LOOSE = "files lie beside the class folders"
UNKNOWN = "files have no suffix of an image format that can be read"
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
