"""Find the readers of the values of `--data_path`, and mix their images if there are several."""

import logging
import os
import re
from collections.abc import Sequence
from itertools import combinations

from util.data.sources.image_files import ImageFiles
from util.data.sources.mixture import Mixture
from util.data.sources.source import NoSplit, Source
from util.errors import UserError
from util.files import printable
from util.package import imported

LOGGER = logging.getLogger("arm")

MAX_WEIGHT = 1000  # of a place in a mixture

# {prefix of --data_path: (class of the reader, imported when it is used; text for the help)}. A path without one of
# these prefixes is a folder. A new reader is a file with a class `Reader(path, split, labels)` that has the members of
# `Source`, and a line here.
READERS = {
    "": ("util.data.sources.folders.Folder", "folder with train/ and val/, one folder per class"),
    "csv": (
        "util.data.sources.csv_table.CsvTable",
        "csv:FILE, a table of paths, labels and splits; csv:FOLDER of train.csv and val.csv",
    ),
    "wds": ("util.data.sources.tar_shards.TarShards", "wds:FOLDER of tar shards"),
    "hfds": (
        "util.data.sources.hub_dataset.HubDataset",
        "hfds:NAME, hfds:NAME@REVISION/FOLDER or hfds:FOLDER of a dataset of Hugging Face",
    ),
}


def open_source(data_path: str | Sequence[str], split: str, labels: bool = True) -> Source:
    """Open the images of `--data_path`; one warning counts the files that are left out.

    Args:
        data_path: a folder with train/ and val/, each with one folder of images per class; wds:FOLDER with tar shards
            in FOLDER/train and FOLDER/val, or with the word train or val in their names; csv:FILE, see `CsvTable`;
            hfds:NAME of a dataset on the Hugging Face hub (see `HubDataset`) or of a folder that `datasets` can load. A
            list of these is mixed, see `open_mixture`.
        split: "train"; "val", which is also called validation, valid or test; or "" for the images in the place itself:
            a folder at any depth, the tar files directly in a folder, all rows.
        labels: whether every image needs a label. If not, images without labels are read as well: the source then has
            no classes. Where there is neither train nor val, "train" then means the images in the place itself.

    Raises:
        NoSplit: there is no such split.
        UserError: the data is missing or has another layout.
    """
    if not isinstance(data_path, str):
        return open_mixture(data_path, split, labels)
    kind, path = path_of(data_path)
    if not path:
        raise UserError(f"--data_path {data_path}: nothing follows the colon")
    module, _, reader = READERS[kind][0].rpartition(".")
    return getattr(imported(module), reader)(path, split, labels)


def open_mixture(roots: Sequence[str], split: str, labels: bool) -> Source:
    """Open the images of one or several values of `--data_path`, each with a weight as in PATH*3.

    A place without this split is left out, and named, if another one has it. Weights count for training images only.

    Raises:
        NoSplit: no place has the split.
        UserError: see `open_source`; or a place comes twice, or a weight is not from 1 to `MAX_WEIGHT`.
    """
    places, weights = zip(*map(weighted, roots), strict=True)
    if len(roots) == 1 and (weights == (1,) or split == "val"):
        return open_source(places[0], split, labels)
    sources: dict[str, Source] = {}
    missing: list[NoSplit] = []
    for place in places:
        if place in sources:
            raise UserError(f"--data_path {printable(place)} comes twice: {printable(place)}*2 takes its images twice")
        try:
            sources[place] = open_source(place, split, labels)
        except NoSplit as error:
            missing.append(error)
    if not sources:
        raise missing[0]
    for (one, first), (two, second) in combinations(sources.items(), 2):
        if _overlap(one, first, two, second):
            raise UserError(
                f"--data_path {printable(one)} and {printable(two)} hold the same images, which would count twice: "
                f"leave one of them out; {printable(one)}*2 takes its images twice"
            )
    if labels and len({tuple(source.classes) for source in sources.values()}) > 1:
        raise UserError("--data_path: several places need the same classes to be read with labels")
    times = [1 if split == "val" else weight for place, weight in zip(places, weights, strict=True) if place in sources]
    counts = [f"{len(source.labels)} of {source.root}" for source in sources.values()]
    counts = [f"{weight} x {count}" if weight > 1 else count for weight, count in zip(times, counts, strict=True)]
    without = [printable(place) for place in places if place not in sources]
    none = f"; none of {', '.join(without)}" if without else ""
    mixture = Mixture([*sources.values()], times)
    if not mixture.classes and any(source.classes for source in sources.values()):
        none += "; they are read without labels, since the places have different classes"
    LOGGER.info("images of %s: %s = %d%s", split or "all", " + ".join(counts), len(mixture.labels), none)
    return mixture


def weighted(root: str) -> tuple[str, int]:
    """Return the place and the weight of one value of `--data_path`; without a weight, or if it exists so, 1."""
    match = re.fullmatch(r"(.+)\*([0-9]+)", root, re.DOTALL)
    if not match or os.path.lexists(path_of(root)[1]):
        return root, 1
    if not 1 <= int(match[2][:9]) <= MAX_WEIGHT:
        raise UserError(f"--data_path {printable(root)}: a weight is from 1 to {MAX_WEIGHT}")
    return match[1], int(match[2])


def _overlap(one: str, first: Source, two: str, second: Source) -> bool:
    """Return whether two places are the same, or one folder of images contains the other."""
    (kind, path), (other_kind, other_path) = path_of(one), path_of(two)
    if kind == other_kind == "" and isinstance(first, ImageFiles) and isinstance(second, ImageFiles):
        path, other_path = (os.path.realpath(source.folder) for source in (first, second))
        return os.path.commonpath([path, other_path]) in (path, other_path)
    return kind == other_kind and os.path.realpath(path) == os.path.realpath(other_path)


def path_of(data_path: str) -> tuple[str, str]:
    """Return the prefix of one value of `--data_path`, "" for a folder, and the rest."""
    kind, colon, path = data_path.partition(":")
    return (kind, path) if colon and kind in READERS else ("", data_path)
