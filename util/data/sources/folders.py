"""Read encoded images and their labels from a folder."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from util.data.decode import ARRAYS, SUFFIXES
from util.data.sources.image_files import ImageFiles
from util.data.sources.source import BESIDE, HIDDEN, SPLITS, NoSplit, choose_split, count_left_out, is_folder
from util.errors import UserError, as_user_error
from util.files import printable

LOGGER = logging.getLogger("arm")

LOOSE = "files lie beside the class folders"
UNKNOWN = "files have no suffix of an image format that can be read"
LOOPS = "links lead to folders that contain them"


class Folder(ImageFiles):
    """A folder of images, with or without one folder for each class.

    Classes and images have the order of torchvision's `ImageFolder`. Unlike there, hidden files and folders are left
    out, and files with any of the suffixes `util.data.decode.SUFFIXES` are read. Without labels, images at any depth
    are read; they have classes if each of them lies in a folder. In the folder of a split, a minority that lies beside
    several class folders is left out, as with labels. Arrays (.npy) are images where there are no others.
    """

    def __init__(self, data_path: str, split: str, labels: bool = True) -> None:
        about = f"--data_path {printable(data_path)}"
        with as_user_error(OSError, prefix=f"{about}: "):
            if not is_folder(data_path):
                raise UserError(f"{about}: no such folder")
            found = [name for names in SPLITS.values() for name in names if is_folder(Path(data_path, name))]
            name = choose_split(found, split, labels, about)
            if name is None:
                raise NoSplit(f"{about}: there is no folder {split!r} in it")
            self.folder = str(Path(data_path, name))
            self.root = printable(self.folder)
            self.classes, images, left_out = self._list_labelled() if labels else self._list(bool(name))
        counts = [len(paths) for paths in images]
        self.labels = np.repeat(np.arange(len(counts)), counts) if self.classes else np.zeros(sum(counts), np.int64)
        self.paths = np.array([os.fsencode(path) for paths in images for path in paths])
        if left_out:
            LOGGER.warning("%s: %s", self.root, left_out)
        if split and not name:
            LOGGER.info("%s has no folder train: all %d images below it are taken", self.root, len(self.paths))

    def _list_labelled(self) -> tuple[list[str], list[list[str]], str]:
        """Return the names of the class folders, the paths of the images in each, and a line on what is left out."""
        found: dict[str, list[str]] = {reason: [] for reason in (LOOSE, BESIDE, UNKNOWN, HIDDEN, LOOPS)}
        names, found[LOOSE] = _split_entries(self.folder, "", found[HIDDEN])
        if not names:
            raise UserError(f"{self.root}: Couldn't find any class folder in it, so its images have no labels")
        shown, times = Counter(map(printable, names)).most_common(1)[0]
        if times > 1:
            raise UserError(f"{self.root}: {times} class folders would be called {shown}: rename one")
        files = [[*_files_below(self.folder, name, found[HIDDEN], found[LOOPS], {})] for name in names]
        images = _images_among(files, found)
        left_out = count_left_out(found)
        empty = [printable(name) for name, paths in zip(names, images, strict=True) if not paths]
        if empty:
            without = f"{len(empty)} of {len(names)} class folders: {', '.join(empty[:5])}"
            raise UserError(f"{self.root}: no image in {without}{left_out and f' ({left_out})'}")
        return [*map(printable, names)], images, left_out

    def _list(self, is_split: bool) -> tuple[list[str], list[list[str]], str]:
        """Return the same for images with or without labels; the names are empty if some image lies in no folder.

        `is_split` says that the folder is that of a split, so that its folders are classes if there are several.
        """
        found: dict[str, list[str]] = {reason: [] for reason in (LOOSE, BESIDE, UNKNOWN, HIDDEN, LOOPS)}
        names, files = _split_entries(self.folder, "", found[HIDDEN])
        read: dict[str, str] = {}
        nested = [[*_files_below(self.folder, name, found[HIDDEN], found[LOOPS], read)] for name in names]
        loose, *images = _images_among([files, *nested], found)
        below = {name: paths for name, paths in zip(names, images, strict=True) if paths}
        if is_split and len(below) > 1 and len(loose) < sum(map(len, below.values())):
            found[LOOSE], loose = loose, []
        elif loose and below:
            LOGGER.info("%s: %d images lie beside the folders in it, so none has a label", self.root, len(loose))
        left_out = count_left_out(found)
        if not loose and not below:
            raise UserError(f"{self.root}: no image in it{left_out and f' ({left_out})'}")
        shown = [*map(printable, below)]
        labelled = not loose and len(set(shown)) == len(shown)
        return shown if labelled else [], [loose, *below.values()] if loose else [*below.values()], left_out


def _images_among(files: list[list[str]], left_out: dict[str, list[str]]) -> list[list[str]]:
    """Return the images in each list of files, or if no list has one, the arrays; add all others to `left_out`."""
    wanted = SUFFIXES if any(map(_is_image, chain(*files))) else {ARRAYS}
    for path in chain(*files):
        if _suffix(path) not in wanted:
            left_out[BESIDE if _suffix(path) == ARRAYS else UNKNOWN].append(path)
    return [[path for path in paths if _suffix(path) in wanted] for paths in files]


def _is_image(path: str) -> bool:
    return _suffix(path) in SUFFIXES


def _suffix(path: str) -> str:
    return path.rpartition(".")[2].lower() if "." in path else ""


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


def _files_below(root: str, folder: str, hidden: list[str], loops: list[str], read: dict[str, str]) -> Iterator[str]:
    """Yield all files below a folder of `root`, in the order of `sorted(os.walk(...))`; links are followed.

    Hidden files are added to `hidden`. Links to a folder that contains them are added to `loops` and not followed.
    `read` maps each folder that was read, without links, to the path through which it was read; more are added.

    Raises:
        UserError: a link leads to a folder that was already read, so its images would count twice.
        OSError: a folder cannot be read.
    """
    real = os.path.realpath(root)
    read |= {str(path): root for path in (Path(real), *Path(real).parents)}
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
                f"{printable(path)} leads to {printable(real)}, which was already read as {printable(read[real])}: its "
                "images would count twice. Remove the link"
            )
        read[real] = path
        folders, files = _split_entries(root, here, hidden)
        found.append((here, files))
        pending += [(below, os.path.join(real, os.path.basename(below))) for below in folders]
    for _, files in sorted(found):
        yield from files
