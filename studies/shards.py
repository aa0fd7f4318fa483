"""Write tar shards for `--data_path wds:FOLDER`: a whole split, or a subset with equally many images of each class."""

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tools.pack_images import add_image, suffix_of
from util.data.sources.readers import open_source
from util.data.sources.source import Source
from util.data.sources.tar_shards import TarShards
from util.errors import UserError
from util.files import replacing


def write_shard(path: Path, source: Source, indices: Iterable[int]) -> None:
    """Write images of a source to a tar file, without encoding them again; the file is written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for index in indices:
            add_image(tar, source, index, suffix_of(source.name(index)), source.read(index))


def balanced(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return the indices of a random sample with `per_class` images of each class, ascending, from all labels (n,).

    Raises:
        UserError: a class has fewer images.
    """
    rng = np.random.default_rng([seed, per_class])
    drawn = []
    for label in np.unique(labels):
        (of_class,) = np.nonzero(labels == label)
        if len(of_class) < per_class:
            raise UserError(f"class {label} has {len(of_class)} images: {per_class} cannot be drawn")
        drawn.append(rng.choice(of_class, per_class, replace=False))
    return np.sort(np.concatenate(drawn))


def write_subset(
    data_path: str,
    val_path: str,
    folder: Path,
    per_class: int,
    seed: int,
    repeats: int = 1,
    val_per_class: int | None = None,
) -> None:
    """Write a dataset with few training images of each class.

    Args:
        data_path: dataset of train/, as the scripts take it.
        val_path: dataset of val/; its shards, if it has any, are linked and not copied.
        folder: gets train/ and val/; an existing split stays as it is.
        per_class: training images of each class, drawn with the seed.
        seed: of the sample.
        repeats: how often an epoch has each of them: with fewer and longer epochs, evaluation takes less time.
        val_per_class: images of each class in val/; None takes all.

    Raises:
        UserError: there is no such dataset, a class has too few images, or val/ links to a shard that is gone.
    """
    if not (folder / "train").exists():
        train = open_source(data_path, "train")
        partial = folder / "train.partial"
        write_shard(partial / "0.tar", train, balanced(train.labels, per_class, seed))
        for number in range(1, repeats):
            _link(partial / f"{number}.tar", Path("0.tar"))
        partial.rename(folder / "train")
    if not (folder / "val").exists():
        val = open_source(val_path, "val")
        partial = folder / "val.partial"
        if val_per_class is None and isinstance(val, TarShards):
            partial.mkdir(parents=True, exist_ok=True)
            for number, shard in enumerate(val.shards):
                _link(partial / f"{number:06d}.tar", _target(shard.resolve(), partial.resolve()))
        else:
            every = range(len(val.labels)) if val_per_class is None else balanced(val.labels, val_per_class, seed)
            write_shard(partial / "0.tar", val, every)
        partial.rename(folder / "val")
    for link in sorted(folder.glob("*/*.tar")):
        if not link.exists():
            raise UserError(f"{link} links to {os.readlink(link)}, which is gone: put it back, or remove {folder}")


def _target(shard: Path, folder: Path) -> Path:
    """Return the target of a link: relative for shards beside the folder, so that both can be moved together."""
    return Path(os.path.relpath(shard, folder)) if shard.is_relative_to(folder.parents[1]) else shard


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
