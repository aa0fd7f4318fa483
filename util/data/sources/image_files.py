"""Read images that are files of their own."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from util.data.sources.source import hash_states, read_at
from util.files import open_regular, printable


class ImageFiles:
    """The members of `Source` for images below one folder; a reader of files adds `root`, `classes` and `labels`.

    Attributes:
        folder: that all paths start from.
        paths: (n,) bytes; an absolute one ignores the folder.
    """

    folder: str
    # not a list of strings, whose reference counts would make every worker copy its memory
    paths: np.ndarray

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

    def identity(self) -> str:
        return hashlib.sha256(b"\0".join(self.paths)).hexdigest()


class FileList(ImageFiles):
    """Image files that are named one by one, without labels."""

    folder = ""

    def __init__(self, paths: Sequence[str]) -> None:
        self.root = f"{len(paths)} files"
        self.classes: list[str] = []
        self.labels = np.zeros(len(paths), np.int64)
        self.paths = np.array([os.fsencode(path) for path in paths])
