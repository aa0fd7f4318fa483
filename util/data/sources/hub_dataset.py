"""Read images and labels from a Hugging Face dataset."""

import errno
import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from util.data.sources.source import MAX_CLASSES, SPLITS, NoSplit, choose_split, read_at, without_labels
from util.errors import UserError, as_user_error
from util.files import HUB_NAME, open_regular, printable


class HubDataset:
    """A dataset with an image column and, if labels are needed, a label column, through Hugging Face's `datasets`.

    If labels are not needed and some images have none, all are read without.

    Args:
        path: a folder that `datasets` has saved or can load, or a dataset on the hub: NAME, or
            OWNER/NAME@REVISION/FOLDER for the files in one of its folders, with the parts that are needed.
        split: "train", "val" or "" for all splits.
        labels: whether every image needs a label.

    Raises:
        UserError: it is missing, damaged, or has other columns or splits.
    """

    def __init__(self, path: str, split: str, labels: bool = True) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError("--data_path hfds: needs Hugging Face's library: pip install datasets") from error
        self.classes: list[str]
        self.root = f"hfds:{printable(path)}"
        about = f"--data_path {self.root}: "
        try:
            saved = any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json"))
            splits = datasets.load_from_disk(path) if saved else _load(path)
        except Exception as error:  # the library raises nearly any exception on damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            if re.search("scripts are no longer supported|Config name is missing", reason):
                reason += "; name a folder of its data files: hfds:OWNER/NAME/FOLDER or hfds:OWNER/NAME@REVISION/FOLDER"
            raise UserError(f"{about}{'it is damaged or empty: ' * saved}{printable(reason)}") from error
        if single := isinstance(splits, datasets.Dataset):
            splits = {str(splits.split) if str(splits.split) in SPLITS["val"] else "train": splits}
        name = choose_split(splits, split, True, self.root)
        if name is None:
            reason = "; a single saved dataset counts as train unless it names another split" if single else ""
            raise NoSplit(f"{about}it has the splits {', '.join(splits) or 'none'}, and none for {split}{reason}")
        with as_user_error(ValueError, prefix=about):  # splits with other columns
            data = splits[name] if name else datasets.concatenate_datasets([*splits.values()])
        self.root += f" ({name})" if name else ""
        if not len(data):
            raise UserError(f"{self.root}: it holds no images")
        self.image = self._column(data.features, datasets.Image, "image")
        self.rows = data.select_columns(self.image).cast_column(self.image, datasets.Image(decode=False))
        named = any(isinstance(feature, datasets.ClassLabel) for feature in data.features.values())
        integers = not named and re.fullmatch("u?int[0-9]+", getattr(data.features.get("label"), "dtype", ""))
        self.classes, self.labels = [], np.zeros(len(data), np.int64)
        if not labels and not named and not integers:
            return
        try:
            label = "label" if integers else self._column(data.features, datasets.ClassLabel, "label")
            self.classes, self.labels = self._labels(data, label)
        except UserError as error:
            without_labels(str(error), labels)

    def _labels(self, data: Any, label: str) -> tuple[list[str], np.ndarray]:
        """Return the names of the classes and the labels of all images; raise UserError if one has none."""
        # the whole column at once: one by one, a million labels take most of a minute
        column = data.select_columns(label).with_format("arrow")[:].column(label)
        with as_user_error(ValueError, prefix=f"{self.root}: "):  # a uint64 above the range of int64
            labels = column.cast("int64").fill_null(-1).to_numpy().copy()  # its own memory is read-only
        if labels.min() < 0:
            raise UserError(f"{self.root}: {(labels < 0).sum()} of {len(labels)} images have no label")
        largest = labels.max()
        names = getattr(data.features[label], "names", None)
        classes = [""] * min(largest + 1, MAX_CLASSES) if names is None else [*map(printable, names)]
        if largest >= len(classes):
            raise UserError(f"{self.root}: label {largest} is not below {len(classes)}")
        return classes, labels

    def _column(self, features: dict[str, Any], kind: type, usual: str) -> str:
        """Return the name of the only column of this type, or of the one that is called `usual`."""
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
        except Exception as error:  # pyarrow raises nearly any exception on damaged files
            raise OSError(errno.EIO, printable(str(error))[:200] or type(error).__name__) from error
        if image.get("bytes") is None and image.get("path"):
            with open_regular(image["path"]) as file:
                return read_at(file, 0, os.fstat(file.fileno()).st_size, image["path"])
        return image.get("bytes") or b""  # a missing image is broken, like an empty file

    def name(self, index: int) -> str:
        return f"{self.root} row {index}"

    def state(self) -> str:
        return self.rows._fingerprint  # of its content and of all operations on it

    def identity(self) -> str:
        """Return a hash of the sizes of the images, or of their names if they lie in files of their own."""
        from pyarrow import compute

        digest = hashlib.sha256()
        for images in self.rows.with_format("arrow")[:][self.image].chunks:  # its bytes are not read
            sizes, paths = compute.binary_length(images.field("bytes")), images.field("path")
            for size, path in zip(sizes.to_pylist(), paths.to_pylist(), strict=True):
                digest.update(os.fsencode(os.path.basename(path or "")) + b"\0" if size is None else b"%d\0" % size)
        return digest.hexdigest()


def _load(path: str) -> Any:
    """Return the splits of what is not in the form of `save_to_disk`; the library raises nearly any exception."""
    import datasets

    parts = None if Path(path).exists() else HUB_NAME.fullmatch(path)
    if parts is None:
        return datasets.load_dataset(path)
    name, revision, folder = parts[1], parts[2] and unquote(parts[2]), (parts[3] or "").rstrip("/")
    if not folder:
        return datasets.load_dataset(name, revision=revision)
    from huggingface_hub import snapshot_download

    files = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=f"{folder}/*")
    if not Path(files, folder).is_dir():
        raise FileNotFoundError(f"the dataset has no folder {folder}")
    return datasets.load_dataset(f"{files}/{folder}")
