"""Read images and a mask of classes for each, from folders as those of ADE20K."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from util.data.decode import BrokenImage, as_broken_image, opened
from util.data.sources.folders import Folder
from util.data.sources.image_files import ImageFiles
from util.data.sources.source import SPLITS, NoSplit, choose_split, count_left_out, hash_states, is_folder, read_at
from util.errors import UserError, as_user_error
from util.files import open_regular, printable, some

LOGGER = logging.getLogger("arm")

IGNORED = -1  # class of pixels that have none
UNKNOWN = -2  # class of a value that has none and is not ignored
VALUES = 2**16  # that a pixel of a mask can have
KINDS = ("annotations", "masks", "labels")  # names of the folder of masks, beside images/
LOSSLESS = (b"png", b"tif", b"tiff", b"bmp")  # suffixes of masks
CLASSES, ADE20K = "classes.txt", "objectInfo150.txt"  # lists of classes; the first one that exists is read
MAX_CLASSES = np.iinfo(np.int16).max
FIRST = 8  # masks that are read before any work
UNMASKED, UNPICTURED = "images have no mask", "masks have no image"


class WrongMask(BrokenImage):
    """The values of a mask are not classes: a mistake of the data set rather than a damaged file."""


class MaskFolder(ImageFiles):
    """Images of images/SPLIT, each with a mask of the same path below annotations/SPLIT; suffixes may differ.

    The folder of masks may also be called masks or labels. A mask holds a number for each pixel in the file of its
    image: PNG, TIFF or BMP with one channel of up to 16 bits, or with a palette, whose colours are not read. The list
    of classes names the values from 0 in order, without the ignored ones: so those of ADE20K, which ignores 0, are 1 to
    150. An image without a mask is left out, and so is a mask without an image; a line counts them.

    Args:
        data_path: the folder that holds images/.
        split: "train" or "val"; see `SPLITS` for other names of their folders.
        classes: file with the name of a class in each line; None takes classes.txt or objectInfo150.txt of the folder.
        ignored: values without a class; None takes 255, or 0 with objectInfo150.txt.

    Attributes:
        classes: names, by class; empty if there is no list.
        values: of the pixels of each class in a mask.
        labels: (n,) int64, zeros: an image has no single class.

    Raises:
        NoSplit: there is no such split.
        UserError: a folder is missing, images and masks do not match, or the list of classes is damaged.
    """

    def __init__(
        self, data_path: str, split: str, classes: str | None = None, ignored: Sequence[int] | None = None
    ) -> None:
        about, root = f"--data_path {printable(data_path)}", Path(data_path)
        with as_user_error(OSError, prefix=f"{about}: "):
            kinds = [kind for kind in KINDS if is_folder(root / kind)]
            if not is_folder(root / "images") or len(kinds) != 1:
                wanted = f"a folder images and one of {', '.join(KINDS)}"
                if not root.is_dir():
                    raise UserError(f"{about}: no such folder")
                raise UserError(f"{about}: it needs {wanted}, and has {some(kinds) or 'none of these'}")
            found = [name for names in SPLITS.values() for name in names if is_folder(root / "images" / name)]
            name = choose_split(found, split, True, f"{about}/images")
            if name is None:
                raise NoSplit(f"{about}: there is no folder {split!r} in images")
            if not is_folder(root / kinds[0] / name):
                raise UserError(f"{about}: {kinds[0]} has no folder {name!r}, as images has")
            lists = [root / listed for listed in (CLASSES, ADE20K) if (root / listed).exists()]
        images, masks = (Folder(str(root / kind / name), "", labels=False) for kind in ("images", kinds[0]))
        self.root, self.folder, self.mask_folder = images.root, images.folder, masks.folder
        self.paths, self.masks = _pairs(images, masks)
        self.labels = np.zeros(len(self.paths), np.int64)
        lists = lists if classes is None else [Path(classes)]
        self.classes = _names(lists[0]) if lists else []
        self.ignored = [*ignored] if ignored is not None else [0] if lists and lists[0].name == ADE20K else [255]
        self._class_of = np.full(VALUES, UNKNOWN, np.int16)
        self._class_of[self.ignored] = IGNORED
        self.values: list[int] = np.flatnonzero(self._class_of == UNKNOWN)[: len(self.classes)].tolist()
        self._class_of[self.values] = range(len(self.values))

    def state(self) -> str:
        read = (self.path, self.mask_path)
        return hash_states([os.fsencode(path(index)) for path in read for index in range(len(self.paths))])

    def mask_path(self, index: int) -> str:
        """Return the path of a mask for the operating system; it may not be printable."""
        return os.path.join(self.mask_folder, os.fsdecode(self.masks[index]))

    def read_values(self, index: int) -> np.ndarray:
        """Return the numbers in a mask, (H, W) uint8 or uint16; for errors see `read_mask`."""
        path = self.mask_path(index)
        with open_regular(path) as file:
            data = read_at(file, 0, os.fstat(file.fileno()).st_size, path)
        with as_broken_image(), opened(data) as image:
            # 16 bits of a PNG have the mode I before Pillow 11.3
            if (
                image.mode in ("1", "L", "P")
                or image.mode.startswith("I;16")
                or (image.mode, image.format) == ("I", "PNG")
            ):
                return np.asarray(image).astype(np.uint8 if image.mode in "1LP" else np.uint16)
            raise WrongMask(
                f"it holds colours (Pillow's mode {image.mode}), not classes: save it as a PNG with one channel, whose "
                "values are the numbers of the classes"
            )

    def read_mask(self, index: int) -> np.ndarray:
        """Return the class of each pixel, as they are stored in the file of the image: (H, W) int16, or `IGNORED`.

        Raises:
            BrokenImage: names the mask, which cannot be decoded; or its values are no classes (`WrongMask`).
            OSError: it cannot be read.
        """
        try:
            values = self.read_values(index)
            classes = self._class_of[values]
            if (unknown := classes == UNKNOWN).any():
                raise WrongMask(
                    f"it holds the value {values[unknown].max()}, and {len(self.classes)} classes have the values "
                    f"{spans(self.values)}: name all classes, or say --ignore_label"
                )
            return classes
        except BrokenImage as error:
            raise type(error)(f"mask {printable(self.mask_path(index))}: {error}") from error


def open_masks(
    data_path: str, split: str, classes: str | None = None, ignored: Sequence[int] | None = None
) -> MaskFolder:
    """Open images with masks and check the first masks; a warning says if these hold a single class.

    Raises:
        UserError: see `MaskFolder`; or there is no list of classes, or a mask that was read does not fit it.
    """
    source = MaskFolder(data_path, split, classes, ignored)
    if not source.classes:
        raise UserError(
            f"--data_path {printable(data_path)}: its classes have no names: write {CLASSES} into it, with a name in "
            f"each line for the values of the masks from 0, without {spans(source.ignored)}; {_said(source)}"
        )
    classes_found = _first(source, source.read_mask)
    if len(classes_found[classes_found != IGNORED]) < 2 < 1 + len(source.classes):
        LOGGER.warning(
            "%s: %s, so at most one of %d classes; ignored: %s (--ignore_label)",
            *(source.root, _said(source), len(source.classes), spans(source.ignored)),
        )
    return source


def _said(source: MaskFolder) -> str:
    return f"the first masks hold the values {spans(_first(source, source.read_values))}"


def _first(source: MaskFolder, read: Callable[[int], np.ndarray]) -> np.ndarray:
    """Return the different values in the first masks; one that cannot be decoded is reported where it is used.

    Raises:
        UserError: a mask holds no classes.
    """
    found: set[int] = set()
    for index in range(min(FIRST, len(source.masks))):
        try:
            found |= {*np.unique(read(index)).tolist()}
        except WrongMask as error:
            raise UserError(str(error)) from error
        except (BrokenImage, OSError):
            continue
    return np.array(sorted(found), np.int64)


def _pairs(images: Folder, masks: Folder) -> tuple[np.ndarray, np.ndarray]:
    """Return the paths of the images that have a mask, in order, and of their masks: (n,) bytes each.

    Raises:
        UserError: no image has a mask, a mask has a lossy format, or two files of a folder have one name.
    """
    lossy = [path for path in masks.paths if path.rpartition(b".")[2].lower() not in LOSSLESS]
    if lossy:
        raise UserError(
            f"{masks.root}: {len(lossy)} files are not PNG, TIFF or BMP, which keep the values of a mask; the first: "
            f"{printable(lossy[0])}"
        )
    pictures, answers = _by_name(images), _by_name(masks)
    alone = {
        UNMASKED: [printable(path) for name, path in pictures.items() if name not in answers],
        UNPICTURED: [printable(path) for name, path in answers.items() if name not in pictures],
    }
    both = [name for name in pictures if name in answers]
    if not both:
        names = f"{alone[UNMASKED][0]} and {alone[UNPICTURED][0]}"
        raise UserError(f"{images.root}: no mask in {masks.root} has the path and name of an image, as in {names}")
    if line := count_left_out(alone):
        LOGGER.warning("%s: %s", images.root, line)
    return np.array([pictures[name] for name in both]), np.array([answers[name] for name in both])


def _by_name(source: Folder) -> dict[bytes, bytes]:
    """Return paths by the same without suffix; raise UserError if two files have one name."""
    found: dict[bytes, bytes] = {}
    for path in source.paths:
        other = found.setdefault(os.path.splitext(path)[0], path)
        if other != path:
            raise UserError(f"{source.root}: {printable(other)} and {printable(path)} have one name: rename one")
    return found


def _names(file: Path) -> list[str]:
    """Return the names of the classes in a list of one name a line, or in the table of ADE20K.

    Raises:
        UserError: the file cannot be read, or a name is missing or comes twice.
    """
    with as_user_error(OSError, ValueError, prefix=f"{printable(file)}: "):
        with open_regular(file) as opened_file:
            lines = opened_file.read().decode("utf-8-sig").rstrip().splitlines()
        if file.name == ADE20K:  # a line of titles, then number, share, images of each split, and the name
            lines = [line.rpartition("\t")[2] for line in lines[1:]]
        names = [printable(line.strip()) for line in lines]
        if not 0 < len(names) <= MAX_CLASSES:
            raise ValueError(f"it names {len(names)} classes, not 1 to {MAX_CLASSES}")
        if "" in names:
            raise ValueError(f"class {names.index('')} has no name")
        if len({*names}) < len(names):
            raise ValueError(f"{max(names, key=names.count)} comes twice")
    return names


def spans(values: Sequence[int] | np.ndarray) -> str:
    """Return numbers in order as text, a run of neighbours as its ends: 0 to 20, 255."""
    runs: list[list[int]] = []
    for value in sorted(map(int, values)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ", ".join(" to ".join(map(str, run)) for run in runs) or "none"
