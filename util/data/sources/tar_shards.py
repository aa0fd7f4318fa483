"""Read images and labels from tar shards in the webdataset layout."""

import hashlib
import io
import json
import logging
import math
import os
import re
import stat
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from util.data.decode import ARRAYS, SUFFIXES
from util.data.sources.source import (
    BESIDE,
    HIDDEN,
    MAX_CLASSES,
    SPLITS,
    NoSplit,
    choose_split,
    count_left_out,
    hash_states,
    is_folder,
    read_at,
    without_labels,
)
from util.data.sources.tar_members import members
from util.errors import UserError, as_user_error
from util.files import from_json, open_regular, printable, replacing, write_text

LOGGER = logging.getLogger("arm")

MAX_LABEL = 2**20  # bytes of a .cls or .json file in a shard
MAX_NAMES = 2**24  # bytes of the names of shards and classes in a small index

COLUMNS = "labels", "shard", "offset", "size"  # of the images in an index: (n,) int64 each
INDEX_VERSION = 3

IMAGELESS = "labels have no image of a known format"
UNUSED = "keys have neither an image of a known format nor a label"
LABELLESS = "images with a dot in their key have no label"
STRANGE = f"labels are no whole numbers from 0 to {MAX_CLASSES - 1}"
ELSEWHERE = "archives are compressed or not beside the other shards"


class TarShards:
    """Tar files in the webdataset layout: KEY.jpg (or another image) and KEY.cls, or KEY.json with a "label".

    Without labels, KEY.jpg is enough; a label that is no whole number then counts as none. If some images have no
    label, all are read without.

    The positions of the images are found once and stored beside the shards in index-SPLIT.npz if the folder can be
    written. If each label has its own folder in the keys, the folder's name is the name of the class.
    """

    def __init__(self, data_path: str, split: str, labels: bool = True) -> None:
        root, about = Path(data_path), f"--data_path wds:{printable(data_path)}"
        with as_user_error(OSError, prefix=f"{about}: "):
            if not is_folder(root):
                raise UserError(f"{about}: no such folder")
            places = {name: _archives_of(root, name) for names in SPLITS.values() for name in names}
            name = choose_split([name for name, found in places.items() if found], split, labels, about)
            named = f"{split}/*.tar, and no tar file with {split} in its name, as a word" if split else "tar file in it"
            if name is None:
                raise NoSplit(f"{about}: no {named}")
            found = places[name] if name else _archives(root)
            shards = [path for path in found if path.suffix == ".tar"]
            self.shards = [path for path in shards if path.parent == shards[0].parent]
            if not self.shards:
                only = f", only {printable(found[0])}" if found else ""
                raise UserError(f"{about}: no {named}{only}")
            stats = [(shard, shard.stat()) for shard in self.shards]
        for shard, status in stats:
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{printable(shard)} is no regular file")
        self.root = printable(self.shards[0].parent)
        self.unreadable: set[Path] = set()  # shards from which an image could not be read
        self.sizes = np.array([status.st_size for _, status in stats])
        state = json.dumps([INDEX_VERSION, [(shard.name, s.st_size, s.st_mtime_ns) for shard, s in stats]])
        index = self._index(self.shards[0].parent / f"index-{split or 'all'}.npz", state, labels)
        self.labels, self.shard, self.offset, self.size = (index[name] for name in COLUMNS)
        self.classes = [index["classes"].get(label, "") for label in range(self.labels.max() + 1)]
        without = self.labels < 0
        if without.any():
            if not without.all():
                without_labels(f"{self.root}: {without.sum()} of {len(without)} images have no label", labels)
            self.classes, self.labels = [], np.zeros_like(self.labels)
        if split and not name:
            LOGGER.info("%s has no train: all %d images in it are taken", self.root, len(self.labels))
        others = [str(path) for path in found if path not in set(self.shards)]
        left_out = [line for line in (index["left_out"], count_left_out({ELSEWHERE: others})) if line]
        if left_out:
            LOGGER.warning("%s: %s", self.root, "; ".join(left_out))

    def _index(self, path: Path, state: str, needs_labels: bool) -> dict[str, Any]:
        """Return the labels and positions of all images, {label: name of the class}, and a line on what is left out.

        The label -1 stands for none.
        """
        with suppress(ValueError):
            if index := self._read_index(path, state, needs_labels):
                return index
        with _one_at_a_time(path.with_suffix(".lock")):
            try:
                index = self._read_index(path, state, needs_labels)
            except ValueError as error:
                index = None
                LOGGER.warning("%s cannot be used and is made again: %s", printable(path), error)
            return index or self._make_index(path, state, needs_labels)

    def _read_index(self, path: Path, state: str, needs_labels: bool) -> dict[str, Any] | None:
        """Return the index in a file, None if it is missing or unfit; raise ValueError if it is damaged.

        It is unfit if it is of other shards, or if it lacks labels that are needed: making it again names the image.
        """
        try:
            with open_regular(path) as file:
                stored = _read_arrays(file, ("of", "classes", "left_out", *COLUMNS), self.sizes.sum())
            if stored["of"].item() != state:
                return None
            index = self._check_index(stored)
            return None if needs_labels and index["labels"].min() < 0 else index
        except FileNotFoundError:
            return None
        except Exception as error:  # numpy and zipfile raise nearly any exception on damaged files
            raise ValueError(printable(str(error) or type(error).__name__)[:200]) from error

    def _check_index(self, stored: dict[str, np.ndarray]) -> dict[str, Any]:
        columns = labels, shard, offset, size = [stored[name] for name in COLUMNS]
        if {(column.shape, column.dtype) for column in columns} != {((len(labels),), np.dtype(np.int64))}:
            raise ValueError("its columns differ")
        names = from_json(stored["classes"].item())
        if not isinstance(names, dict):
            raise ValueError("its classes are not a JSON object")
        classes = {int(label): name for label, name in names.items()}
        left_out = stored["left_out"].item()
        if not (
            -1 <= labels.min() <= labels.max() < MAX_CLASSES
            and 0 <= shard.min() <= shard.max() < len(self.shards)
            and offset.min() >= tarfile.BLOCKSIZE
            and size.min() >= 0
            and (size <= self.sizes[shard]).all()
            and (offset <= self.sizes[shard] - size).all()
            # in the order of the shards, without overlap
            and ((np.diff(shard) > 0) | ((np.diff(shard) == 0) & (np.diff(offset) > size[:-1]))).all()
            and len(set(classes.values())) == len(classes)
            and all(printable(text) == text for text in (left_out, *classes.values()))
        ):
            raise ValueError("it holds positions that cannot be in these shards")
        return dict(zip(COLUMNS, columns, strict=True)) | {"classes": classes, "left_out": left_out}

    def _make_index(self, path: Path, state: str, needs_labels: bool) -> dict[str, Any]:
        """Read the headers of all shards, and store the index if it can be written."""
        with ThreadPoolExecutor() as pool:
            for suffixes in (SUFFIXES, frozenset({ARRAYS})):  # arrays are images where there are no others
                found = pool.map(_images_of, self.shards, repeat(needs_labels), repeat(suffixes))
                entries, left_out = zip(*found, strict=True)
                if any(entries):
                    break
        counted = count_left_out(
            {
                reason: [f"{shard.name}: {name}" for shard, names in zip(self.shards, left_out, strict=True)
                         for name in names[reason]]
                for reason in (IMAGELESS, BESIDE, UNUSED, LABELLESS, STRANGE, HIDDEN)
            }
        )  # fmt: skip
        labels, offset, size = (np.array([e[k] for images in entries for e in images], np.int64) for k in range(3))
        if not len(labels):
            raise UserError(f"{self.root}: the shards hold no image{counted and f': {counted}'}")
        named = {(label, folder) for images in entries for label, _, _, folder in images if folder and label >= 0}
        names, folders = dict(named), {folder for _, folder in named}
        if not len(named) == len(names) == len(folders):  # the folders are not the classes
            names = {}
        shard = np.repeat(np.arange(len(entries)), [len(images) for images in entries])
        index: dict[str, Any] = dict(zip(COLUMNS, (labels, shard, offset, size), strict=True))
        index |= {"classes": names, "left_out": counted}
        # if the folder cannot be written or is full, the next run finds the positions again
        with suppress(OSError), replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **(index | {"of": state, "classes": json.dumps(names)}))
        return index

    def read(self, index: int) -> bytes:
        path = self.shards[self.shard[index]]
        try:
            return read_at(_opened(str(path)), int(self.offset[index]), int(self.size[index]), path)
        except OSError:
            self.unreadable.add(path)
            raise

    def name(self, index: int) -> str:
        path, offset = self.shards[self.shard[index]], int(self.offset[index])
        name = f"the image at byte {offset}"
        if path in self.unreadable:  # reading the name may also fail, or take as long
            return f"{printable(path)}: {name}"
        with suppress(OSError, tarfile.HeaderError):
            header = os.pread(_opened(str(path)).fileno(), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        return printable(f"{path}: {name}")

    def state(self) -> str:
        return hash_states([os.fsencode(shard) for shard in self.shards])

    def identity(self) -> str:
        names = "\0".join(shard.name for shard in self.shards).encode(errors="surrogateescape")
        positions = b"".join(column.tobytes() for column in (self.shard, self.offset, self.size))
        return hashlib.sha256(names + b"\0" + positions).hexdigest()


def _archives_of(root: Path, split: str) -> list[Path]:
    """Return the archives in the folder of a split, then those beside it with the split as a word in their names."""
    inside = _archives(root / split) if is_folder(root / split) else []
    return inside + [path for path in _archives(root) if split in re.split("[^a-z]", path.name.lower())]


def _archives(folder: Path) -> list[Path]:
    """Return the tar files and other archives of a folder, sorted."""
    kinds = re.compile(r"[^.].*\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz|zip)", re.IGNORECASE | re.DOTALL)
    return [folder / name for name in sorted(os.listdir(folder)) if kinds.fullmatch(name)]


def _read_arrays(file: BinaryIO, names: Iterable[str], shards: int) -> dict[str, np.ndarray]:
    """Read arrays of an .npz file in memory bounded by its size; nearly any exception is raised for a damaged file."""
    size = os.fstat(file.fileno()).st_size
    # an image takes 32 bytes here and, with its label, at least 1024 in its shard; names take the rest
    if size > shards // 8 + MAX_NAMES:
        raise ValueError(f"{size} bytes are too many for shards of {shards}")
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        for name in names:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED or not info.compress_size == info.file_size <= size:
                raise ValueError(f"{name} is compressed, or larger than the file")
            content = io.BytesIO(archive.read(info))  # all of it, so that its CRC is checked
            if np.lib.format.read_magic(content) != (1, 0):
                raise ValueError(f"{name} is in another format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(content)
            # before the array is allocated: a header can request any number of bytes
            if dtype.itemsize * math.prod(shape) != info.file_size - content.tell():
                raise ValueError(f"{name} does not have the size in its header")
            content.seek(0)
            arrays[name] = np.load(content)
    return arrays


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Run the block in one process at a time, or in all at once if the lock file `path` cannot be written or locked.

    Raises:
        UserError: the error of the process that this one waited for, which is stored beside the lock file.
    """
    lock, stored_error = FileLock(path, fallback_to_soft=False), path.with_suffix(".error")
    with ExitStack() as stack:
        with suppress(OSError):
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except Timeout:
                stack.enter_context(lock)
                with suppress(FileNotFoundError), open_regular(stored_error) as file:
                    raise UserError(file.read(MAX_LABEL).decode()) from None
            stored_error.unlink(missing_ok=True)
        try:
            yield
        except UserError as error:
            if lock.is_locked:
                with suppress(OSError):
                    write_text(stored_error, str(error))
            raise


@lru_cache(maxsize=256)
def _opened(path: str) -> BinaryIO:
    return open_regular(path)


def _images_of(
    shard: Path, needs_labels: bool, wanted: frozenset[str]
) -> tuple[list[tuple[int, int, int, str]], dict[str, list[str]]]:
    """Return (label, offset, size, folder) of every image in a shard, and {reason: names that are left out}.

    `wanted` are the suffixes of images.

    Raises:
        UserError: the shard is damaged; or an image has no label, or none that is a whole number, and needs it. If it
            does not need it, its label is -1.
    """
    about = f"{printable(shard)}: "
    images: dict[str, tuple[int, int, str]] = {}
    arrays: dict[str, str] = {}  # names of those that are not wanted
    labels: dict[str, dict[str, int | ValueError | None]] = {"cls": {}, "json": {}}
    names: dict[tuple[str, str], str] = {}
    suffixes: defaultdict[str, list[str]] = defaultdict(list)
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    with as_user_error(OSError), open_regular(shard) as file:  # its message names the file
        for member in members(file, printable(shard)):
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            name, file_name = "/".join(parts), parts[-1] if parts else ""
            # the key ends at the last dot, so that keys may have dots; the webdataset layout has none in keys
            stem, dot, suffix = file_name.rpartition(".")
            key, kind = "/".join([*parts[:-1], stem]), suffix.lower() if dot else ""
            if member.isdir():
                continue
            hidden = any(part.startswith(".") and part.strip(".") for part in parts)
            own = kind in SUFFIXES or kind in labels or "." not in stem  # KEY.mask.npy belongs to KEY
            if kind and not hidden and own:
                suffixes[key].append(f".{suffix}")
                if kind == ARRAYS and kind not in wanted:
                    arrays[key] = name
            kind = "image" if kind in wanted and own else kind
            if kind not in ("image", *labels):
                continue
            if hidden:
                left_out[HIDDEN] += [name] if kind == "image" else []
                continue
            if not member.isreg():
                raise UserError(f"{about}{printable(name)} is a link or a special file")
            if (key, kind) in names:
                two = " and ".join(map(printable, (names[key, kind], name)))
                raise UserError(f"{about}the key {printable(key)} has more than one {kind}: {two}")
            names[key, kind] = name
            if kind == "image":
                images[key] = member.offset_data, member.size, printable(parts[-2]) if parts[1:] else ""
            else:
                labels[kind][key] = _label(file, member, kind)
    entries = []
    left_out[BESIDE] += [name for key, name in arrays.items() if key not in images]
    without_image = suffixes.keys() - images.keys() - arrays.keys()
    left_out[UNUSED] += [
        f"{key} ({', '.join(suffixes[key])})" for key in without_image - labels["cls"].keys() - labels["json"].keys()
    ]
    left_out[UNUSED].sort()
    labelled = any(label is not None for found in labels.values() for label in found.values())
    for key in dict.fromkeys([*images, *labels["cls"], *labels["json"]]):
        kind = "cls" if key in labels["cls"] else "json"
        label = labels[kind].get(key)
        folder, _, file_name = key.rpartition("/")
        parts = file_name.split(".")
        dotted = len(parts) > 1
        if key not in images:
            # KEY.meta.json belongs to KEY
            if label is not None and key not in arrays and not (dotted and kind == "json"):
                left_out[IMAGELESS].append(f"{key} ({', '.join(suffixes[key])})")
        elif isinstance(label, ValueError):
            if needs_labels:
                raise UserError(f"{about}{printable(names[key, kind])} holds no label: {label}") from label
            left_out[STRANGE].append(names[key, kind])
            entries.append((-1, *images[key]))
        elif label is not None:
            entries.append((label, *images[key]))
        # KEY.mask.png belongs to KEY
        elif dotted and (labelled or any(_joined(folder, parts[:count]) in images for count in range(1, len(parts)))):
            left_out[LABELLESS].append(names[key, "image"])
        elif needs_labels:
            raise UserError(f"{about}{printable(key)} has no label, in a .cls or a .json file")
        else:
            entries.append((-1, *images[key]))
    return entries, left_out


def _joined(folder: str, parts: list[str]) -> str:
    return "/".join([*filter(None, [folder]), ".".join(parts)])


def _label(file: BinaryIO, member: tarfile.TarInfo, kind: str) -> int | ValueError | None:
    """Return the label in a .cls or .json file of a shard, None if it has none, or a ValueError with the fault."""
    if member.size > MAX_LABEL:
        return ValueError(f"its {member.size} bytes are more than {MAX_LABEL}")
    content = os.pread(file.fileno(), member.size, member.offset_data)
    value: object
    if kind == "cls":
        text = content.decode("utf-8", "replace").strip()
        value = int(text) if re.fullmatch("[0-9]{1,18}", text) else text
    else:
        try:
            fields = json.loads(content)  # not strict: other fields may be NaN
        except (ValueError, RecursionError) as error:
            return ValueError(printable(str(error))[:200])
        if not isinstance(fields, dict):
            return ValueError(f"a {type(fields).__name__} instead of an object with a label")
        value = fields.get("label")
    if value is None or (type(value) is int and 0 <= value < MAX_CLASSES):
        return value
    shown = printable(repr(value))[:60] if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    return ValueError(f"{shown} is not a whole number from 0 to {MAX_CLASSES - 1}")
