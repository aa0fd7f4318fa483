"""Read images with annotated objects: boxes, masks and classes in COCO's JSON format.

Masks are rasterised by faster-coco-eval, which has pycocotools' functions, and also evaluates (see
`Detection.coco_metrics`). Unlike pycocotools 2.0, it refuses run lengths that do not fill their image.
"""

import hashlib
import logging
import math
import os
import re
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from util.data.decode import MAX_PIXELS
from util.data.sources.image_files import ImageFiles
from util.data.sources.source import SPLITS, NoSplit, choose_split, is_folder
from util.errors import UserError, as_user_error
from util.files import from_json, printable, some

LOGGER = logging.getLogger("arm")

BESIDE_IMAGES = "_annotations.coco.json"  # the name that Roboflow gives
TRIED = 100  # images of which a folder must have one, to be that of the images
NONE, POLYGONS, COMPRESSED, COUNTS = range(4)  # kinds of segmentation
# an object: the kind of its segmentation, the size of run lengths (-1 without), where it starts and ends in `content`
ROW = np.dtype(
    [(name, "<i8") for name in ("image", "category", "crowd", "kind", "height", "width", "start", "end")]
    + [("box", "<f8", 4), ("area", "<f8")]
)

Segment = list[np.ndarray] | dict | None  # polygons (2 k,) float64 of x, y; run lengths {"size", "counts"}; or neither


class Objects(NamedTuple):
    """The objects of an image, in the order of the file.

    Args:
        boxes: (m, 4) float32, left, top, right and bottom in pixels, clipped to the image.
        labels: (m,) int64, from 0.
        segments: of each object; see `to_rle`.
        crowd: (m,) bool, whether it stands for a group of objects.
    """

    boxes: np.ndarray
    labels: np.ndarray
    segments: list[Segment]
    crowd: np.ndarray


def open_coco(data_path: str, split: str) -> "CocoSource":
    """Open the images and objects of a split.

    The annotations are annotations/*.json with the name of the split as a word of the file's name, or
    _annotations.coco.json in a folder of this name: train; or val, validation, valid or test. Of several files, COCO's
    "instances" count. The images lie in the first folder that has some, of images/train2017, train2017 (as the file is
    called), images/train, train, images and the place itself.

    Args:
        data_path: a folder, or coco:FOLDER.
        split: "train" or "val". To train, images without objects are left out, as ViTDet does, and a line counts them.

    Raises:
        NoSplit: there are no annotations for this split.
        UserError: the annotations are damaged or contradict themselves, or no image is found.
    """
    root = data_path.removeprefix("coco:")
    about = f"--data_path coco:{printable(root)}"
    with as_user_error(OSError, ValueError, prefix=f"{about}: "):
        if not root or not is_folder(root):
            raise UserError(f"{about}: no such folder")
        found = {name: files for names in SPLITS.values() for name in names if (files := _annotations(root, name))}
    name = choose_split(found, split, True, about)
    if name is None:
        names = " or ".join(SPLITS[split])
        raise NoSplit(
            f"{about}: no annotations for {split}: neither annotations/*.json with the word {names} in its name, nor "
            f"{BESIDE_IMAGES} in such a folder"
        )
    if len(found[name]) > 1:
        listed = some([str(file.relative_to(root)) for file in found[name]])
        raise UserError(f"{about}: several files have annotations for {split}: {listed}. Leave one of them there")
    return CocoSource(root, name, found[name][0], split == "train")


def _annotations(root: str, name: str) -> list[Path]:
    """Return the annotation files for a name of a split."""
    word = re.compile(f"(?<![a-z]){name}(?![a-z])")
    files = [file for file in sorted(Path(root, "annotations").glob("*.json")) if word.search(file.stem.lower())]
    files = [file for file in files if file.name.startswith("instances")] or files
    beside = Path(root, name, BESIDE_IMAGES)
    return files + [beside] * beside.is_file()


class CocoSource(ImageFiles):
    """Images and their objects; see `open_coco`. Forked workers share the memory of its arrays.

    Attributes:
        root: name of the source in messages: the file of annotations.
        annotation_file: its path.
        classes: the same names, or those that `match` has set: the names of labels.
        category_ids: (classes,) int64; -1 for a class that the file does not have.
        categories: names of the categories in the file, in the order of their ids.
        known_ids: (categories,) int64, their ids.
        labels: (n,) int64 zeros: an image has no class of its own.
        image_ids: (n,) int64.
        sizes: (n, 2) int64, height and width.
        rows: (m,) `ROW`, all objects image after image, with the boxes (x, y, width, height) and areas of the file.
            `image` and `category` are places from 0, categories in the order of their ids; an unknown area is NaN.
    """

    def __init__(self, root: str, name: str, file: Path, training: bool) -> None:
        self.annotation_file = file
        self.root = printable(file)
        parser = _Parser()
        with as_user_error(OSError), as_user_error(ValueError, prefix=f"{self.root} is damaged: "):
            content: Any = from_json(file.read_text(encoding="utf-8"), parser.replace)
        for key in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise self._fault(f"it is not in COCO's format: it has no list of {key}")
        with as_user_error(OverflowError, prefix=f"{self.root}: an id: "):
            self._read_categories(content["categories"])
            names = self._read_images(content["images"])
        self._read_objects(content["annotations"], parser)
        if training:
            names = self._leave_out_empty(names)
        self.labels = np.zeros(len(names), np.int64)
        self.first = np.searchsorted(self.rows["image"], np.arange(len(names) + 1))
        with as_user_error(ValueError, prefix=f"{self.root}: "):
            self.folder, self.paths = self._image_folder(root, name, names), np.array([*map(os.fsencode, names)])

    def _fault(self, text: str) -> UserError:
        return UserError(f"{self.root}: {text}")

    def _read_categories(self, found: list) -> None:
        for place, category in enumerate(found):
            if not _has(category, id=int, name=str):
                raise self._fault(f"categories[{place}] lacks an id (an integer) or a name")
        found.sort(key=lambda category: category["id"])
        self.classes = self.categories = [printable(category["name"]) for category in found]
        self.known_ids = self.category_ids = np.array([category["id"] for category in found], np.int64)
        self.label_of = np.arange(len(found))  # of each category in the order of their ids
        if not found:
            raise self._fault("it has no categories")
        if twice := _twice(self.classes) or _twice(self.category_ids):
            raise self._fault(f"two categories have the same name or id: {twice}")

    def _read_images(self, found: list) -> list[str]:
        """Set what is known of all images; return the names of their files."""
        for place, image in enumerate(found):
            if not _has(image, id=int, file_name=str, height=int, width=int):
                raise self._fault(f"images[{place}] lacks an id, a height, a width (integers) or a file_name")
            height, width = image["height"], image["width"]
            if min(height, width) < 1 or height * width > MAX_PIXELS or "\0" in image["file_name"]:
                raise self._fault(f"images[{place}] has no or more than {MAX_PIXELS} pixels, or a NUL in its file_name")
        self.image_ids = np.array([image["id"] for image in found], np.int64)
        self.sizes = np.array([(image["height"], image["width"]) for image in found], np.int64).reshape(-1, 2)
        if not found:
            raise self._fault("it has no images")
        if twice := _twice(self.image_ids):
            raise self._fault(f"two images have the id {twice}")
        return [image["file_name"] for image in found]

    def _read_objects(self, found: list, parser: "_Parser") -> None:
        odd = next((place for place, row in enumerate(found) if not isinstance(row, _Row)), None)
        if odd is not None:
            raise self._fault(
                f"annotations[{odd}] lacks an image_id or a category_id (integers) or a bbox (four numbers), or has a "
                "segmentation other than polygons and run lengths"
            )
        rows = np.frombuffer(parser.rows, ROW)[np.array(found, np.int64)]
        self.content = np.frombuffer(parser.content, np.uint8)
        for field, ids in (("image", self.image_ids), ("category", self.known_ids)):
            order = np.argsort(ids)
            places = order[np.minimum(np.searchsorted(ids, rows[field], sorter=order), len(ids) - 1)]
            if (wrong := ids[places] != rows[field]).any():
                first = wrong.argmax()
                raise self._fault(
                    f"{wrong.sum()} of {len(rows)} annotations have a {field}_id that is not listed; the first is "
                    f"annotations[{first}] with {rows[field][first]}"
                )
            rows[field] = places
        sizes = self.sizes[rows["image"]]
        wrong = (rows["height"] >= 0) & ((rows["height"] != sizes[:, 0]) | (rows["width"] != sizes[:, 1]))
        if wrong.any():
            raise self._fault(f"annotations[{wrong.argmax()}] has run lengths of another size than its image")
        corners = _corners(rows["box"], sizes)
        good = (corners[:, 2:] > corners[:, :2]).all(axis=1)  # not true of NaN
        if not good.all():
            LOGGER.warning(
                "%s: %d of %d objects have no area in their image and are left out; the first: annotations[%d]",
                *(self.root, (~good).sum(), len(rows), good.argmin()),
            )
        rows = rows[good]
        self.rows = rows[np.argsort(rows["image"], kind="stable")]

    def _leave_out_empty(self, names: list[str]) -> list[str]:
        """Keep the images, and return their names, that have an object to train on: one that is no crowd."""
        has = np.zeros(len(names), bool)
        has[self.rows["image"][self.rows["crowd"] == 0]] = True
        if not has.any():
            raise self._fault("no image has an object to train on")
        if not has.all():
            LOGGER.info("%s: %d of %d images have no object and are left out", self.root, (~has).sum(), len(names))
        self.rows = self.rows[has[self.rows["image"]]]
        self.rows["image"] = (np.cumsum(has) - 1)[self.rows["image"]]
        self.image_ids, self.sizes = self.image_ids[has], self.sizes[has]
        return [name for name, kept in zip(names, has, strict=True) if kept]

    def _image_folder(self, root: str, name: str, names: list[str]) -> str:
        """Return the first folder that has images of the file."""
        called = re.search(f"{name}[0-9]*", self.annotation_file.stem.lower())
        words = dict.fromkeys([called[0] if called else name, name])
        folders = [place for word in words for place in (f"images/{word}", word)] + ["images", "."]
        some_names = names[:: -(-len(names) // TRIED)]
        for folder in folders:
            path = os.path.join(root, folder)
            if any(os.path.isfile(os.path.join(path, image)) for image in some_names):
                return path
        raise self._fault(f"no image like {printable(names[0])} in any of {', '.join(folders)} of {printable(root)}")

    def identity(self) -> str:
        """Return a hash of the names and objects of all images in order."""
        digest = hashlib.sha256(b"\0".join(self.paths))
        for values in (self.image_ids, self.sizes, self.known_ids, self.rows, self.content):
            digest.update(np.ascontiguousarray(values).view(np.uint8).data)
        return digest.hexdigest()

    def match(self, names: list[str], owner: str) -> None:
        """Number the classes as `owner` does, whose class names they are; a line says if that changes numbers.

        Raises:
            UserError: there are objects of a class that `owner` does not have.
        """
        position = {name: place for place, name in enumerate(names)}
        label_of = np.array([position.get(name, -1) for name in self.categories])
        unknown = [self.categories[place] for place in np.unique(self.rows["category"]) if label_of[place] < 0]
        if unknown:
            raise self._fault(f"it has objects of {len(unknown)} classes that {owner} does not have: {some(unknown)}")
        if self.categories != names:
            LOGGER.info("%s has other classes or another order than %s: they are matched by name", self.root, owner)
        self.classes, self.label_of = names, label_of
        self.category_ids = np.full(len(names), -1)
        self.category_ids[label_of[label_of >= 0]] = self.known_ids[label_of >= 0]

    def check_masks(self) -> None:
        """Raise UserError unless all objects, apart from crowds, have a segmentation."""
        without = (self.rows["kind"] == NONE) & (self.rows["crowd"] == 0)
        if without.any():
            image = self.image_ids[self.rows["image"][without.argmax()]]
            raise self._fault(
                f"{without.sum()} of {len(without)} objects have no segmentation, the first in the image with the id "
                f"{image}: masks cannot be learned; --boxes_only learns boxes"
            )

    def objects(self, index: int) -> Objects:
        """Return the objects of an image."""
        rows = self.rows_of(index)
        boxes = _corners(rows["box"], self.sizes[index]).astype(np.float32)
        return Objects(boxes, self.label_of[rows["category"]], [*map(self._segment, rows)], rows["crowd"] != 0)

    def rows_of(self, index: int) -> np.ndarray:
        """Return the rows of an image's objects."""
        return self.rows[self.first[index] : self.first[index + 1]]

    def _segment(self, row: np.void) -> Segment:
        content = self.content[row["start"] : row["end"]].tobytes()
        if row["kind"] == POLYGONS:
            count, *lengths = np.frombuffer(content, np.int64, 1 + int(np.frombuffer(content, np.int64, 1)[0]))
            points = np.frombuffer(content, np.float64, offset=8 * (1 + count))
            return np.split(points, np.cumsum(lengths)[:-1])
        if row["kind"] == NONE:
            return None
        counts = content if row["kind"] == COMPRESSED else np.frombuffer(content, np.int64).tolist()
        return {"size": [int(row["height"]), int(row["width"])], "counts": counts}

    def rles(self, index: int) -> list[dict]:
        """Return the masks of an image's objects as run lengths; see `to_rle`."""
        height, width = self.sizes[index].tolist()
        with as_user_error(ValueError, prefix=f"{self.root}, image {self.image_ids[index]}: "):
            return [to_rle(segment, height, width) for segment in self.objects(index).segments]

    def masks(self, index: int) -> np.ndarray:
        """Return the masks (m, H, W) uint8 of an image's objects; zeros for one without a segmentation."""
        found = (
            mask_library().decode(self.rles(index)) if len(self.rows_of(index)) else np.zeros((*self.sizes[index], 0))
        )
        return np.ascontiguousarray(found.transpose(2, 0, 1), dtype=np.uint8)  # (H, W, m) -> (m, H, W)

    def areas(self, index: int) -> np.ndarray:
        """Return the areas (m,) float64 in pixels: those of the file, else of the mask, else of the box."""
        rows = self.rows_of(index)
        areas = rows["area"].copy()
        for place in np.flatnonzero(np.isnan(areas)):
            has_mask = rows["kind"][place] != NONE
            areas[place] = mask_library().area(self.rles(index)[place]) if has_mask else rows["box"][place, 2:].prod()
        return areas


def mask_library() -> ModuleType:
    """Return faster-coco-eval's functions for masks; raise UserError if it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise UserError("objects are read and evaluated by faster-coco-eval: pip install faster-coco-eval") from error
    return mask


def to_rle(segment: Segment, height: int, width: int) -> dict:
    """Return a segmentation as compressed run lengths {"size", "counts"}; a missing one is empty.

    Parts of polygons outside of the image are left out. Raises ValueError if run lengths are damaged.
    """
    library = mask_library()
    if isinstance(segment, dict):
        try:
            rle = library.frPyObjects(segment, height, width) if isinstance(segment["counts"], list) else segment
            library.decode(rle)
        except (ValueError, RuntimeError) as error:  # the latter without a fit reason
            raise ValueError("the run lengths of an object do not fill the image, or are damaged") from error
        return rle
    parts = library.frPyObjects([part.tolist() for part in segment], height, width) if segment else []
    return library.merge(parts) if parts else library.encode(np.zeros((height, width), np.uint8, order="F"))


def _corners(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Turn x, y, width and height (m, 4) into corners, clipped to heights and widths (m, 2) or (2,)."""
    ends = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return np.clip(ends, 0, np.broadcast_to(sizes[..., [1, 0, 1, 0]], ends.shape))


def _has(found: object, **kinds: type) -> bool:
    return isinstance(found, dict) and all(type(found.get(key)) is kind for key, kind in kinds.items())


def _twice(values: Sequence | np.ndarray) -> str:
    """Return a value that comes twice, or ""."""
    unique, counts = np.unique(values, return_counts=True)
    return str(unique[counts.argmax()]) if (counts > 1).any() else ""


class _Row(int):
    """Stand in for an annotation in what the parser returns, with its number."""


class _Parser:
    """Pack annotations as soon as they are parsed: as objects of Python they would take ten times the memory.

    Attributes:
        rows: `ROW` after `ROW`.
        content: of all segmentations.
    """

    def __init__(self) -> None:
        self.rows, self.content = bytearray(), bytearray()

    def replace(self, found: dict) -> object:
        """Return the number of an annotation that could be packed, and anything else as it is."""
        if "image_id" not in found or "category_id" not in found:
            return found
        start = len(self.content)
        try:
            kind, height, width = self._pack(found.get("segmentation"))
            x, y, w, h = found["bbox"]
            area = math.nan if found.get("area") is None else found["area"]
            numbers = found["image_id"], found["category_id"], found.get("iscrowd") or 0, kind, height, width
            self.rows += struct.pack("<8q5d", *numbers, start, len(self.content), x, y, w, h, area)
        except (KeyError, TypeError, ValueError, OverflowError, struct.error):
            return found
        return _Row(len(self.rows) // ROW.itemsize - 1)

    def _pack(self, found: Any) -> tuple[int, int, int]:
        """Append a segmentation to `content`; return its kind, and the height and width of run lengths."""
        if isinstance(found, dict):
            height, width = found["size"]
            counts = found["counts"]
            packed = counts.encode("ascii") if isinstance(counts, str) else array("q", counts).tobytes()
            self.content += packed
            return COMPRESSED if isinstance(counts, str) else COUNTS, height, width
        polygons = [array("d", part) for part in found or () if len(part) >= 6 and len(part) % 2 == 0]
        if polygons:
            self.content += struct.pack(f"<{len(polygons) + 1}q", len(polygons), *map(len, polygons))
            self.content += b"".join(polygons)
        return POLYGONS if polygons else NONE, -1, -1
