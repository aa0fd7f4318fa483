"""Images as tar shards that `--data_path wds:FOLDER` reads: a whole split, or as many images of each class."""

import fcntl
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from tools.pack_images import add_image
from util.data.decode import SUFFIXES
from util.data.readers import Source, open_source
from util.data.tar_shards import TarShards
from util.errors import UserError, as_user_error
from util.files import open_lock, replacing


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runners from making data in a folder; one that has waited finds them made.

    Raises:
        UserError: the folder cannot be made or written.
    """
    with ExitStack() as stack:
        with as_user_error(OSError):  # its message names the file
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open_lock(folder / "making.lock"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_shard(path: Path, source: Source, indices: Iterable[int]) -> None:
    """Write images of a source, as they are, to a tar file, which is complete or absent at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for index in indices:
            suffix = Path(source.name(index)).suffix.removeprefix(".").lower()
            # what a file is called does not matter to who decodes it, as long as it is called an image
            add_image(tar, source, index, suffix if suffix in SUFFIXES else "jpg", source.read(index))


def balanced(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` images of every class, drawn with a seed, in ascending order.

    Args:
        labels: (n,) of all images.
        per_class: images to draw of each class.
        seed: the same one draws the same images.

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
    """Make a data set with a few training images of each class.

    Args:
        data_path: where train/ is, whatever the scripts take.
        val_path: where val/ is; what is in shards already is linked to, not copied.
        folder: gets train/ and val/; a split that is there already is left alone.
        per_class: training images of each class, drawn with the seed.
        seed: of the drawing.
        repeats: how often an epoch has each of them: with fewer and longer epochs, less time goes into evaluation.
        val_per_class: images of each class in val/; None takes all.

    Raises:
        UserError: the data are not there, a class has too few images, or a shard that val/ links to is gone.
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
    """What a link in a folder says: a relative path to shards beside that folder, with which it can be moved."""
    return Path(os.path.relpath(shard, folder)) if shard.is_relative_to(folder.parents[1]) else shard


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
