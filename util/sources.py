"""Where encoded images and their labels come from: a folder, tar shards, or a Hugging Face dataset.

A source gives any image by its number, so that order, shares and restarts are the sampler's business alone: exact
counts, and the same samples whatever the number of processes and workers. Streaming readers (webdataset, timm's)
read the same shards, but shuffle within a buffer and cannot start in the middle of an epoch.
"""

import fcntl
import json
import logging
import os
import re
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.errors import UserError

LOGGER = logging.getLogger(__name__)
MOST_PADDING = 2**21  # bytes at the end of a tar shard; tar -b 2048 writes up to half as many


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
        """Content of an image file."""

    def name(self, index: int) -> str:
        """What names the image in messages."""


def open_source(data_path: str, split: str) -> Source:
    """The images that `--data_path` names.

    Args:
        data_path: a folder with train/ and val/, one folder of images a class; wds:FOLDER with tar shards in
            FOLDER/train and FOLDER/val, or with the word train or val in their names; hfds:NAME of a dataset on the
            Hugging Face hub or of a folder that `datasets` can load.
        split: "train" or "val".

    Raises:
        UserError: it is not there, or not of this form.
    """
    kind, colon, path = data_path.partition(":")
    if colon and kind == "wds":
        return TarShards(path, split)
    if colon and kind == "hfds":
        return HubDataset(path, split)
    return Folder(data_path, split)


class Folder:
    """A folder of images a class, as torchvision's `ImageFolder` reads it."""

    def __init__(self, data_path: str, split: str) -> None:
        root = Path(data_path)
        if not root.is_dir():
            raise UserError(f"--data_path {data_path}: no such folder")
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"--data_path {data_path}: there is no folder {split!r} in it")
        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise UserError(f"{folder}: {error}") from error
        self.root, self.classes = str(folder), found.classes
        self.labels = np.array(found.targets)
        # not a list of strings: counting references to them would copy its memory into every worker
        self.paths = np.array([os.fsencode(os.path.relpath(path, folder)) for path, _ in found.samples])

    def read(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))


IMAGE_SUFFIXES = {suffix.removeprefix(".") for suffix in IMG_EXTENSIONS}


SPLIT_WORDS = {"train": {"train"}, "val": {"val", "validation"}}
COLUMNS = "labels", "shard", "offset", "size"  # of the images in an index: (n,) int64 each


class TarShards:
    """Tar files of the webdataset layout: KEY.jpg (or another image) and KEY.cls, or KEY.json with a "label".

    The position of every image is found once and kept beside the shards in index-SPLIT.npz, where that can be
    written. Where every label has a key's folder of its own, that is the name of its class.
    """

    def __init__(self, data_path: str, split: str) -> None:
        root = Path(data_path)
        if not root.is_dir():
            raise UserError(f"--data_path wds:{data_path}: no such folder")
        named = [path for path in root.glob("*.tar") if SPLIT_WORDS[split] & set(re.split("[^a-z]", path.name.lower()))]
        self.shards = sorted((root / split).glob("*.tar")) or sorted(named)
        if not self.shards:
            raise UserError(
                f"--data_path wds:{data_path}: no {split}/*.tar, and no tar file with {split} in its name, as a word"
            )
        self.root = str(self.shards[0].parent)
        index = self._index(self.shards[0].parent / f"index-{split}.npz")
        self.labels, self.shard, self.offset, self.size = (index[k] for k in COLUMNS)
        self.classes = index["classes"].tolist()
        if index["left_out"]:
            LOGGER.warning("%s: %s", self.root, index["left_out"])

    def _index(self, path: Path) -> dict[str, np.ndarray]:
        stats = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in self.shards]
        of = np.array(json.dumps(stats))
        index = self._kept(path, of)
        if index is None:
            with _one_at_a_time(path.with_suffix(".lock")):
                index = self._kept(path, of) or self._made(path, of)
        return index

    def _kept(self, path: Path, of: np.ndarray) -> dict[str, np.ndarray] | None:
        try:
            with np.load(path) as file:
                index = {
                    name: file[name] for name in ("of", "labels", "shard", "offset", "size", "classes", "left_out")
                }
            columns = [index[name] for name in ("labels", "shard", "offset", "size")]
            fits = (
                index["of"] == of
                and {(column.shape, column.dtype.kind) for column in columns} == {((len(columns[0]),), "i")}
                and index["shard"].max() < len(self.shards)
                and index["labels"].max() < len(index["classes"])
                and index["left_out"].shape == ()
            )
        except Exception:  # of a damaged file, numpy and zipfile raise nearly anything
            return None
        return index if fits else None

    def _made(self, path: Path, of: np.ndarray) -> dict[str, np.ndarray]:
        with ThreadPoolExecutor() as pool:
            entries, imageless = zip(*pool.map(_images_of, self.shards), strict=True)
        imageless = [f"{shard.name}: {key}" for shard, keys in zip(self.shards, imageless, strict=True) for key in keys]
        left_out = f"{len(imageless)} labels have no image of a known kind and are left out; the first: "
        left_out = left_out + imageless[0] if imageless else ""
        labels, offset, size = (np.array([e[k] for shard in entries for e in shard]) for k in (0, 1, 2))
        if not len(labels):
            raise UserError(f"{self.root}: the shards hold no image{left_out and f': {left_out}'}")
        named = {(label, folder) for shard in entries for label, _, _, folder in shard if folder}
        names, folders = dict(named), {folder for _, folder in named}
        if not len(named) == len(names) == len(folders):  # folders of something else
            names = {}
        index = {
            "of": of,
            "labels": labels,
            "shard": np.repeat(np.arange(len(entries)), [len(shard) for shard in entries]),
            "offset": offset,
            "size": size,
            "classes": np.array([names.get(label, "") for label in range(labels.max() + 1)]),
            "left_out": np.array(left_out),
        }
        # in a folder that cannot be written or is full, the next run finds the positions again
        with suppress(OSError), tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
            np.savez(Path(folder, path.name), **index)
            os.replace(Path(folder, path.name), path)
        return index

    def read(self, index: int) -> bytes:
        shard = _opened(str(self.shards[self.shard[index]]))
        return os.pread(shard.fileno(), self.size[index], self.offset[index])

    def name(self, index: int) -> str:
        path = self.shards[self.shard[index]]
        header = os.pread(_opened(str(path)).fileno(), tarfile.BLOCKSIZE, self.offset[index] - tarfile.BLOCKSIZE)
        return f"{path}: {tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name}"


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process in while the others wait, as far as the file `path` can be written and locked.

    Raises:
        UserError: the process that this one has waited for met it.
    """
    with ExitStack() as stack:
        file, waited = None, False
        with suppress(OSError):
            file = stack.enter_context(path.open("a+", encoding="utf-8", errors="surrogateescape"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            found = file.read()
            if waited and found:
                raise UserError(found)
            file.truncate(0)
        try:
            yield
        except UserError as error:
            if file is not None:
                file.write(str(error))
            raise


@lru_cache(maxsize=256)
def _opened(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


def _images_of(shard: Path) -> tuple[list[tuple[int, int, int, str]], list[str]]:
    """Label, offset, size and folder of every image in a shard, and the keys that have a label only."""
    images, labels, suffixes, file = {}, {}, defaultdict(list), "it"
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key = f"{folder}/{stem}"
                if suffix.lower() in IMAGE_SUFFIXES:
                    images[key] = member.offset_data, member.size, folder.rpartition("/")[2]
                    continue
                suffixes[key].append(f".{suffix}")
                if suffix == "cls":
                    labels[key] = int(tar.extractfile(member).read())
                elif suffix == "json" and key not in labels:
                    label = json.load(tar.extractfile(member)).get("label")
                    labels |= {} if label is None else {key: int(label)}
            # a header that is no header ends tarfile's loop as the end of the archive does, which is zeros
            tar.fileobj.seek(tar.offset)
            rest = tar.fileobj.read(MOST_PADDING + 1)
            if not 0 < len(rest) <= MOST_PADDING or rest.strip(b"\0"):
                raise UserError(f"{shard} is damaged or incomplete: no file and no proper end at byte {tar.offset}")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{shard}: {file} holds no label: {error}") from error
    except (tarfile.ReadError, OSError) as error:
        raise UserError(f"{shard}: {error}") from error
    for key in images:
        if labels.get(key, -1) < 0:
            raise UserError(f"{shard}: {key.lstrip('/')} has no label, in a .cls or a .json file")
    imageless = [f"{key.lstrip('/')} ({', '.join(suffixes[key])})" for key in labels if key not in images]
    return [(labels[key], *where) for key, where in images.items()], imageless


class HubDataset:
    """A dataset with an image and a label column, through Hugging Face's `datasets`."""

    def __init__(self, path: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError("--data_path hfds: needs Hugging Face's library: pip install datasets") from error
        self.root = f"hfds:{path}"
        try:
            saved = Path(path, "dataset_dict.json").is_file()
            splits = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
        except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--data_path {self.root}: {reason}") from error
        names = ("train",) if split == "train" else ("validation", "val", "test")
        name = next((name for name in names if name in splits), None)
        if name is None:
            raise UserError(f"--data_path {self.root}: it has the splits {', '.join(splits)}, and no {names[0]}")
        self.root += f" ({name})"
        features = splits[name].features
        image = self._column(features, datasets.Image, "image")
        label = self._column(features, datasets.ClassLabel, "label")
        self.image, self.classes = image, features[label].names
        # the whole column at once: row by row, a million take most of a minute
        column = splits[name].select_columns(label).with_format("arrow")[:].column(label)
        self.labels = column.fill_null(-1).to_numpy().astype(np.int64, copy=False)
        if self.labels.min() < 0:
            raise UserError(f"{self.root}: {(self.labels < 0).sum()} images have no label")
        self.rows = splits[name].select_columns(image).cast_column(image, datasets.Image(decode=False))

    def _column(self, features: dict, kind: type, usual: str) -> str:
        columns = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(columns) > 1 and usual in columns:
            return usual
        if len(columns) != 1:
            found = ", ".join(columns) or "none"
            raise UserError(f"{self.root}: it needs one {kind.__name__} column or one called {usual!r}; found: {found}")
        return columns[0]

    def read(self, index: int) -> bytes:
        image = self.rows[int(index)][self.image] or {}
        if image.get("bytes") is None and image.get("path"):
            return Path(image["path"]).read_bytes()
        return image.get("bytes") or b""  # no image at all: broken, as an empty file is

    def name(self, index: int) -> str:
        return f"{self.root} row {index}"
