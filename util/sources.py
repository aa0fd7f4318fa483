"""Where encoded images and their labels come from: a folder, tar shards, or a Hugging Face dataset.

A source gives any image by its number, so that shuffling, sharding and resuming are left to the sampler: exact
counts, and the same samples whatever the number of processes and workers. Streaming readers (webdataset, timm's)
read the same shards, but shuffle within a buffer and cannot start in the middle of an epoch.
"""

import errno
import fcntl
import io
import json
import logging
import math
import os
import re
import stat
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from util.decode import MAX_PIXELS, SUFFIXES
from util.errors import UserError, as_user_error
from util.files import from_json, open_lock, open_regular, printable, replacing

LOGGER = logging.getLogger(__name__)
MAX_CLASSES = 10**6  # far more than any classification has; what is larger is an id
MAX_IMAGE = 6 * MAX_PIXELS  # bytes of an image file: 3 x 16 bits for each of the most pixels that are decoded
MAX_LABEL = 2**20  # bytes of a .cls or .json file in a shard
MAX_NAME = 4096  # of a file in a shard, as Linux has it
MAX_HEADER = 2**20  # bytes of an extended tar header, which holds a long name or attributes
MAX_NAMES = 2**24  # bytes of shards' and classes' names in a small index
MAX_PADDING = 2**21  # bytes at the end of a tar shard; tar -b 2048 writes up to half as many


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
    if colon and kind in ("wds", "hfds"):
        if not path:
            raise UserError(f"--data_path {data_path}: nothing follows the colon")
        return TarShards(path, split) if kind == "wds" else HubDataset(path, split)
    return Folder(data_path, split)


def _read_at(file: BinaryIO, offset: int, size: int, path: str | os.PathLike) -> bytes:
    """Read an image file, or the part of a file that holds one."""
    if size > MAX_IMAGE:
        raise OSError(errno.EFBIG, f"an image of {size} bytes is larger than {MAX_IMAGE}", path)
    data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise OSError(errno.EIO, f"{len(data)} of {size} bytes from byte {offset} are left", path)
    return data


def _is_folder(path: str | os.PathLike) -> bool:
    """Tell whether a folder is there; raises OSError where that cannot be told, as without permission."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _count_left_out(found: dict[str, list[str]]) -> str:
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
    left out, and all suffixes of `util.decode.SUFFIXES` are taken.

    Attributes:
        paths: (n,) bytes, below the folder of the split.
    """

    def __init__(self, data_path: str, split: str) -> None:
        about = f"--data_path {printable(data_path)}: "
        self.folder = str(Path(data_path, split))
        self.root = printable(self.folder)
        with as_user_error(OSError, prefix=about):
            if not _is_folder(data_path):
                raise UserError(f"{about}no such folder")
            if not _is_folder(self.folder):
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
        left_out = _count_left_out({LOOSE: loose, UNKNOWN: unknown, HIDDEN: hidden, LOOPS: loops})
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
            return _read_at(file, 0, os.fstat(file.fileno()).st_size, path)

    def path(self, index: int) -> str:
        """Return the path of an image as the operating system takes it."""
        return os.path.join(self.folder, os.fsdecode(self.paths[index]))

    def name(self, index: int) -> str:
        return printable(self.path(index))


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

SPLIT_WORDS = {"train": {"train"}, "val": {"val", "validation"}}
COLUMNS = "labels", "shard", "offset", "size"  # of the images in an index: (n,) int64 each
INDEX_VERSION = 3
IMAGELESS = "labels have no image of a known kind"
UNUSED = "keys have neither an image of a known kind nor a label"
LABELLESS = "images with a dot in their key have no label"
ELSEWHERE = "archives are compressed or not beside the other shards"


class TarShards:
    """Tar files of the webdataset layout: KEY.jpg (or another image) and KEY.cls, or KEY.json with a "label".

    The position of every image is found once and kept beside the shards in index-SPLIT.npz, where that can be
    written. Where every label has a key's folder of its own, that is the name of its class.
    """

    def __init__(self, data_path: str, split: str) -> None:
        root, about = Path(data_path), f"--data_path wds:{printable(data_path)}: "
        with as_user_error(OSError, prefix=about):
            if not _is_folder(root):
                raise UserError(f"{about}no such folder")
            named = [p for p in _archives(root) if SPLIT_WORDS[split] & set(re.split("[^a-z]", p.name.lower()))]
            found = [*(_archives(root / split) if _is_folder(root / split) else []), *named]
            shards = [path for path in found if path.suffix == ".tar"]
            self.shards = [path for path in shards if path.parent == shards[0].parent]
            if not self.shards:
                others = f", only {printable(found[0])}" if found else ""
                raise UserError(f"{about}no {split}/*.tar, and no tar file with {split} in its name, as a word{others}")
            stats = [(shard, shard.stat()) for shard in self.shards]
        for shard, status in stats:
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{printable(shard)} is no regular file")
        self.root = printable(self.shards[0].parent)
        self.unreadable: set[Path] = set()  # shards of which an image could not be read
        self.sizes = np.array([status.st_size for _, status in stats])
        of = json.dumps([INDEX_VERSION, [(shard.name, s.st_size, s.st_mtime_ns) for shard, s in stats]])
        index = self._index(self.shards[0].parent / f"index-{split}.npz", of)
        self.labels, self.shard, self.offset, self.size = (index[k] for k in COLUMNS)
        self.classes = [index["classes"].get(label, "") for label in range(self.labels.max() + 1)]
        others = [str(path) for path in found if path not in set(self.shards)]
        left_out = [line for line in (index["left_out"], _count_left_out({ELSEWHERE: others})) if line]
        if left_out:
            LOGGER.warning("%s: %s", self.root, "; ".join(left_out))

    def _index(self, path: Path, of: str) -> dict[str, Any]:
        """Labels and positions of all images, {label: name of the class}, and the line that counts what is left out."""
        with suppress(ValueError):
            if index := self._kept(path, of):
                return index
        with _one_at_a_time(path.with_suffix(".lock")):
            try:
                index = self._kept(path, of)
            except ValueError as error:
                index = None
                LOGGER.warning("%s cannot be used, and is made again: %s", printable(path), error)
            return index or self._made(path, of)

    def _kept(self, path: Path, of: str) -> dict[str, Any] | None:
        """The index in a file, or None where there is none, or one of other shards.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with open_regular(path) as file:
                kept = _read_arrays(file, ("of", "classes", "left_out", *COLUMNS), self.sizes.sum())
            return self._checked(kept) if kept["of"].item() == of else None
        except FileNotFoundError:
            return None
        except Exception as error:  # of a damaged file, numpy and zipfile raise nearly anything
            raise ValueError(printable(str(error) or type(error).__name__)[:200]) from error

    def _checked(self, kept: dict[str, np.ndarray]) -> dict[str, Any]:
        columns = labels, shard, offset, size = [kept[name] for name in COLUMNS]
        if {(column.shape, column.dtype) for column in columns} != {((len(labels),), np.dtype(np.int64))}:
            raise ValueError("its columns differ")
        classes = {int(label): name for label, name in from_json(kept["classes"].item()).items()}
        left_out = kept["left_out"].item()
        if not (
            0 <= labels.min() <= labels.max() < MAX_CLASSES
            and 0 <= shard.min() <= shard.max() < len(self.shards)
            and offset.min() >= tarfile.BLOCKSIZE
            and size.min() >= 0
            and (size <= self.sizes[shard]).all()
            and (offset <= self.sizes[shard] - size).all()
            # in the order of the shards, without an overlap
            and ((np.diff(shard) > 0) | ((np.diff(shard) == 0) & (np.diff(offset) > size[:-1]))).all()
            and len(set(classes.values())) == len(classes)
            and all(printable(text) == text for text in (left_out, *classes.values()))
        ):
            raise ValueError("what it holds cannot be positions in these shards")
        return dict(zip(COLUMNS, columns, strict=True)) | {"classes": classes, "left_out": left_out}

    def _made(self, path: Path, of: str) -> dict[str, Any]:
        with ThreadPoolExecutor() as pool:
            entries, left_out = zip(*pool.map(_images_of, self.shards), strict=True)
        counted = _count_left_out(
            {
                reason: [f"{shard.name}: {name}" for shard, found in zip(self.shards, left_out, strict=True)
                         for name in found[reason]]
                for reason in (IMAGELESS, UNUSED, LABELLESS, HIDDEN)
            }
        )  # fmt: skip
        labels, offset, size = (np.array([e[k] for shard in entries for e in shard], np.int64) for k in (0, 1, 2))
        if not len(labels):
            raise UserError(f"{self.root}: the shards hold no image{counted and f': {counted}'}")
        named = {(label, folder) for shard in entries for label, _, _, folder in shard if folder}
        names, folders = dict(named), {folder for _, folder in named}
        if not len(named) == len(names) == len(folders):  # folders of something else
            names = {}
        index = {
            "labels": labels,
            "shard": np.repeat(np.arange(len(entries)), [len(shard) for shard in entries]),
            "offset": offset,
            "size": size,
            "classes": names,
            "left_out": counted,
        }
        # in a folder that cannot be written or is full, the next run finds the positions again
        with suppress(OSError), replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **(index | {"of": of, "classes": json.dumps(names)}))
        return index

    def read(self, index: int) -> bytes:
        path = self.shards[self.shard[index]]
        try:
            return _read_at(_opened(str(path)), int(self.offset[index]), int(self.size[index]), path)
        except OSError:
            self.unreadable.add(path)
            raise

    def name(self, index: int) -> str:
        path, offset = self.shards[self.shard[index]], int(self.offset[index])
        name = f"the image at byte {offset}"
        if path in self.unreadable:  # reading the name may fail as well, or take as long
            return f"{printable(path)}: {name}"
        with suppress(OSError, tarfile.HeaderError):
            header = os.pread(_opened(str(path)).fileno(), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        return printable(f"{path}: {name}")


def _archives(folder: Path) -> list[Path]:
    """Tar shards of a folder in order, and what may have been meant as such."""
    kinds = re.compile(r"[^.].*\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz|zip)", re.IGNORECASE | re.DOTALL)
    return [folder / name for name in sorted(os.listdir(folder)) if kinds.fullmatch(name)]


def _read_arrays(file: BinaryIO, names: Iterable[str], shards: int) -> dict[str, np.ndarray]:
    """Read arrays of an .npz file, none of which takes more memory than the file; raises nearly anything."""
    size = os.fstat(file.fileno()).st_size
    # an image takes 32 bytes here, and with its label 1024 or more in its shard; names take the rest
    if size > shards // 8 + MAX_NAMES:
        raise ValueError(f"{size} bytes are too many for shards of {shards}")
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        for name in names:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED or not info.compress_size == info.file_size <= size:
                raise ValueError(f"{name} is compressed, or larger than the file")
            content = io.BytesIO(archive.read(info))  # all of it, so that its CRC is compared
            if np.lib.format.read_magic(content) != (1, 0):
                raise ValueError(f"{name} is in another format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(content)
            # before an array is made: a header can ask for any number of bytes
            if dtype.itemsize * math.prod(shape) != info.file_size - content.tell():
                raise ValueError(f"{name} has another size than its header says")
            content.seek(0)
            arrays[name] = np.load(content)
    return arrays


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process in while the others wait, as far as the file `path` can be written and locked.

    Raises:
        UserError: the process that this one has waited for met it.
    """
    with ExitStack() as stack:
        file, waited = None, False
        with suppress(OSError):
            file = stack.enter_context(open_lock(path))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            found = file.read(MAX_LABEL)
            if waited and found:
                raise UserError(found)
            file.seek(0)
            file.truncate()
        try:
            yield
        except UserError as error:
            if file is not None:
                with suppress(OSError):
                    file.write(str(error))
            raise


@lru_cache(maxsize=256)
def _opened(path: str) -> BinaryIO:
    return open_regular(path)


def _images_of(shard: Path) -> tuple[list[tuple[int, int, int, str]], dict[str, list[str]]]:
    """Label, offset, size and folder of every image in a shard, and the names that are left out, by the reason."""
    about = f"{printable(shard)}: "
    images, labels = {}, {"cls": {}, "json": {}}
    names, suffixes, left_out = {}, defaultdict(list), defaultdict(list)
    with as_user_error(OSError), open_regular(shard) as file:  # its message names the file
        for member in _members(file, printable(shard)):
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            name, file_name = "/".join(parts), parts[-1] if parts else ""
            # the last dot ends the key; where keys have none, as in the webdataset layout, it is the first one, too
            stem, dot, suffix = file_name.rpartition(".")
            key, kind = "/".join([*parts[:-1], stem]), suffix.lower() if dot else ""
            if member.isdir():
                continue
            hidden = any(part.startswith(".") and part.strip(".") for part in parts)
            known = kind in SUFFIXES or kind in labels
            if kind and not hidden and (known or "." not in stem):  # KEY.mask.npy is a note on KEY
                suffixes[key].append(f".{suffix}")
            kind = "image" if kind in SUFFIXES else kind
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
    left_out[UNUSED] += [
        f"{key} ({', '.join(suffixes[key])})"
        for key in suffixes.keys() - images.keys() - labels["cls"].keys() - labels["json"].keys()
    ]
    left_out[UNUSED].sort()
    for key in dict.fromkeys([*images, *labels["cls"], *labels["json"]]):
        kind = "cls" if key in labels["cls"] else "json"
        label = labels[kind].get(key)
        dotted = "." in key.rpartition("/")[2]
        if key not in images:
            # KEY.meta.json is a note on KEY
            if label is not None and not (dotted and kind == "json"):
                left_out[IMAGELESS].append(f"{key} ({', '.join(suffixes[key])})")
        elif isinstance(label, ValueError):
            raise UserError(f"{about}{printable(names[key, kind])} holds no label: {label}") from label
        elif label is not None:
            entries.append((label, *images[key]))
        elif dotted:  # KEY.mask.png belongs to KEY
            left_out[LABELLESS].append(names[key, "image"])
        else:
            raise UserError(f"{about}{printable(key)} has no label, in a .cls or a .json file")
    return entries, left_out


def _label(file: BinaryIO, member: tarfile.TarInfo, kind: str) -> int | ValueError | None:
    """The label in a .cls or .json file of a shard, None if it has none, or what is wrong with it."""
    if member.size > MAX_LABEL:
        return ValueError(f"its {member.size} bytes are more than {MAX_LABEL}")
    content = os.pread(file.fileno(), member.size, member.offset_data)
    if kind == "cls":
        text = content.decode("utf-8", "replace").strip()
        value = int(text) if re.fullmatch("[0-9]{1,18}", text) else text
    else:
        try:
            value = json.loads(content)  # not strictly: what else it holds may be NaN
        except (ValueError, RecursionError) as error:
            return ValueError(printable(str(error))[:200])
        if not isinstance(value, dict):
            return ValueError(f"a {type(value).__name__} in the place of an object with a label")
        value = value.get("label")
    if value is None or (type(value) is int and 0 <= value < MAX_CLASSES):
        return value
    shown = printable(repr(value))[:60] if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    return ValueError(f"{shown} is no whole number from 0 to {MAX_CLASSES - 1}")


LONG_NAMES = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
EXTENDED = *LONG_NAMES, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE  # headers that stand before a member


def _members(file: BinaryIO, shard: str) -> Iterator[tarfile.TarInfo]:
    """Yield name, type, size and `offset_data` of everything in a tar file: bounded in memory, and ever forwards.

    `tarfile` parses the headers, but does not walk over them: it allocates what a header asks for, recurses into chains
    of headers, takes a damaged header for the end and, before Python 3.14, goes in circles at a negative size.

    Raises:
        UserError: the file is damaged, incomplete, or has members that are stored as sparse files.
    """
    end, at = os.fstat(file.fileno()).st_size, 0
    always: dict[bytes, bytes] = {}  # records of extended headers: for all members that follow, and for the next one
    own: dict[bytes, bytes] = {}
    while True:
        try:
            block = os.pread(file.fileno(), tarfile.BLOCKSIZE, at)
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            break
        extended = member.type in EXTENDED
        records = {} if extended else always | own
        if b"path" in records:
            member.name = records[b"path"].decode("utf-8", "surrogateescape")
        if b"size" in records:
            member.size = int(records[b"size"]) if re.fullmatch(b"[0-9]{1,18}", records[b"size"]) else -1
        if member.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse.") for key in records):
            raise UserError(f"{shard}: {printable(member.name)} is stored as a sparse file: pack it without --sparse")
        if len(member.name) > MAX_NAME:
            raise UserError(f"{shard}: the name at byte {at} is longer than {MAX_NAME}")
        member.offset_data = at = at + tarfile.BLOCKSIZE
        if extended or member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:  # all others have no content
            at += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.size < 0 or at > end:
            raise UserError(f"{shard}: unexpected end of data in {printable(member.name)}")
        if not extended:
            own = {}
            yield member
            continue
        if member.size > MAX_HEADER:
            raise UserError(f"{shard}: an extended header asks for {member.size} bytes at byte {member.offset_data}")
        content = os.pread(file.fileno(), member.size, member.offset_data)
        if member.type in LONG_NAMES:
            if member.type == tarfile.GNUTYPE_LONGNAME:
                own[b"path"] = content.partition(b"\0")[0]
            continue
        with as_user_error(ValueError, prefix=f"{shard}: "):
            (always if member.type == tarfile.XGLTYPE else own).update(_records(content))
    # a header that is no header looks like the end of the archive, which is zeros
    rest = os.pread(file.fileno(), MAX_PADDING + 1, at)
    if own or not 0 < len(rest) <= MAX_PADDING or rest.strip(b"\0"):
        raise UserError(
            f"{shard} is damaged or incomplete: no file and no proper end at byte {at}"
            if at
            else f"{shard}: no uncompressed tar file"
        )


RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")


def _records(content: bytes) -> dict[bytes, bytes]:
    """Parse an extended header, whose records are "LENGTH KEY=VALUE" and a line feed; raises ValueError."""
    records, at = {}, 0
    while at < len(content):
        match = RECORD.match(content, at)
        after = at + int(match[1]) if match else 0
        if not match or not match.end() < after <= len(content) or content[after - 1 : after] != b"\n":
            raise ValueError("an extended header is damaged")
        records[match[2]] = content[match.end() : after - 1]
        at = after
    return records


# ---- Hugging Face datasets


class HubDataset:
    """A dataset with an image and a label column, through Hugging Face's `datasets`."""

    def __init__(self, path: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError("--data_path hfds: needs Hugging Face's library: pip install datasets") from error
        self.root = f"hfds:{printable(path)}"
        about = f"--data_path {self.root}: "
        try:
            saved = any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json"))
            splits = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
        except Exception as error:  # of damaged files, the library raises nearly anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{about}{'it is damaged or empty: ' * saved}{printable(reason)}") from error
        others = "validation", "val", "test"
        if single := isinstance(splits, datasets.Dataset):
            splits = {str(splits.split) if str(splits.split) in others else "train": splits}
        names = ("train",) if split == "train" else others
        name = next((name for name in names if name in splits), None)
        if name is None:
            reason = "; one data set that is saved alone counts as train unless it says otherwise" if single else ""
            raise UserError(f"{about}it has the splits {', '.join(splits) or 'none'}, and no {names[0]}{reason}")
        data = splits[name]
        self.root += f" ({name})"
        features = data.features
        self.image = self._column(features, datasets.Image, "image")
        named = any(isinstance(feature, datasets.ClassLabel) for feature in features.values())
        integers = not named and re.fullmatch("u?int[0-9]+", getattr(features.get("label"), "dtype", ""))
        label = "label" if integers else self._column(features, datasets.ClassLabel, "label")
        if not len(data):
            raise UserError(f"{self.root}: it holds no images")
        # the whole column at once: row by row, a million take most of a minute
        column = data.select_columns(label).with_format("arrow")[:].column(label)
        with as_user_error(ValueError, prefix=f"{self.root}: "):  # an unsigned number of 64 bits
            self.labels = column.cast("int64").fill_null(-1).to_numpy()
        if self.labels.min() < 0:
            raise UserError(f"{self.root}: {(self.labels < 0).sum()} images have no label")
        largest = self.labels.max()
        self.classes = [""] * min(largest + 1, MAX_CLASSES) if integers else [*map(printable, features[label].names)]
        if largest >= len(self.classes):
            raise UserError(f"{self.root}: label {largest} is not below {len(self.classes)}")
        self.rows = data.select_columns(self.image).cast_column(self.image, datasets.Image(decode=False))

    def _column(self, features: dict, kind: type, usual: str) -> str:
        columns = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(columns) > 1 and usual in columns:
            return usual
        if len(columns) != 1:
            found = ", ".join(columns) or "none"
            other = f"; its column {usual!r} holds {features[usual]}" if usual in features and not columns else ""
            raise UserError(
                f"{self.root}: it needs one {kind.__name__} column or one called {usual!r}; found: {found}{other}"
            )
        return columns[0]

    def read(self, index: int) -> bytes:
        try:
            image = self.rows[int(index)][self.image] or {}
        except Exception as error:  # of damaged files, pyarrow raises nearly anything
            raise OSError(errno.EIO, printable(str(error))[:200] or type(error).__name__) from error
        if image.get("bytes") is None and image.get("path"):
            with open_regular(image["path"]) as file:
                return _read_at(file, 0, os.fstat(file.fileno()).st_size, image["path"])
        return image.get("bytes") or b""  # no image at all: broken, as an empty file is

    def name(self, index: int) -> str:
        return f"{self.root} row {index}"
