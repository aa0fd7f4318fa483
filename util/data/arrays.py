"""Decode images of any number of channels: arrays of NumPy (.npy), TIFFs, and other files with as many bands."""

import logging
from contextlib import suppress
from importlib.util import find_spec
from io import BytesIO
from math import prod

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from util.data.decode import MAX_PIXELS, NUMPY, BrokenImage, Crop, as_broken_image, opened, orientation, turned
from util.data.pixels import Pixels

MAX_VALUES = 3 * MAX_PIXELS  # of one image, over all channels: 1.1 GB as float32
LARGEST = np.finfo(np.float32).max
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its lines do not name the file; `BrokenImage` does
SAMPLES_PER_PIXEL = 277  # tag of TIFF
TIFF = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"  # the first bytes; with + it is a BigTIFF


@as_broken_image()
def crop_of(data: bytes, crop: Crop, pixels: Pixels) -> np.ndarray:
    """Decode a crop of an image.

    Args:
        data: content of a .npy file (H, W, C), of a TIFF with C bands or pages, or of another image file with C bands.
        crop: returns the crop for the height and width of the upright image.
        pixels: the number of channels C, and whether to turn an image that has an orientation.

    Returns:
        (h, w, C) float32: integers divided by the largest value of their type, floating point as it is stored.

    Raises:
        BrokenImage: with the reason: another number of channels, values of another type or not finite, too large.
    """
    if data.startswith(NUMPY):
        image, turn = _numpy(data), 1
    elif data.startswith(TIFF):
        image, turn = _tiff(data)
    else:
        image, turn = _bands(data)
    if image.ndim != 3 or image.shape[2] != pixels.channels:
        shape = " x ".join(map(str, image.shape))
        raise BrokenImage(f"it has the shape {shape}, not height x width x {pixels.channels} channels")
    if image.dtype.kind == "f" and not -LARGEST <= image.min() <= image.max() <= LARGEST:  # not true of NaN either
        raise BrokenImage("it has values that are not finite in float32")
    upright = turned(image, turn if pixels.exif else 1)
    top, left, h, w = crop(*upright.shape[:2])
    part = upright[top : top + h, left : left + w]
    scale = 1 if part.dtype.kind == "f" else np.iinfo(part.dtype).max
    return np.ascontiguousarray(part, dtype=np.float32) / np.float32(scale)


@as_broken_image()
def check_format(data: bytes) -> None:
    """Raise `BrokenImage` if the content of a file is no image of any number of channels; nothing is decoded."""
    if not data.startswith((NUMPY, *TIFF)):  # Pillow opens no TIFF of many channels
        with opened(data):
            pass


@as_broken_image()
def has_other_channels(data: bytes) -> bool:
    """Return whether a file holds an array, or an image that is neither grey nor RGB; False if nothing can open it.

    Raises:
        BrokenImage: it is an array, or a TIFF that Pillow does not open, and cannot be read.
    """
    if data.startswith(NUMPY):
        _numpy(data)
        return True
    with suppress(Exception), opened(data) as image:  # Pillow raises nearly any exception on damaged files
        if isinstance(image, TiffImageFile):  # Pillow opens some of them as RGB and leaves bands out
            bands = image.tag_v2.get(SAMPLES_PER_PIXEL, 1)
            return bands not in (1, 3) or (bands == 1 and image.n_frames > 1)
        return len(image.getbands()) not in (1, 3)
    return data.startswith(TIFF) and _tiff(data)[0].shape[2:] not in ((), (1,), (3,))


def blank(pixels: Pixels) -> bytes:
    """Return the content of an image file of one pixel, zero in every channel."""
    file = BytesIO()
    if pixels.as_stored:
        np.save(file, np.zeros((1, 1, pixels.channels), dtype=np.uint8))
    else:
        Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


def _check(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise `BrokenImage`, before memory is allocated, for an image that is too large or has no numbers."""
    if dtype.kind not in "iuf":
        raise BrokenImage(f"its values have the type {dtype}, and are no integers or floating-point numbers")
    if 0 in shape or prod(shape) > MAX_VALUES:
        raise BrokenImage(f"{' x '.join(map(str, shape))} values are none, or more than {MAX_VALUES}")


def _numpy(data: bytes) -> np.ndarray:
    """Return an array of numbers, which shares the memory of the file; objects are refused, not unpickled."""
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version > (2, 0):
        raise BrokenImage(f"version {version[0]}.{version[1]} of NumPy's format is for arrays with named fields")
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
    shape, columns_first, dtype = read_header(file)
    _check(shape, dtype)
    count, start = prod(shape), file.tell()
    if len(data) - start < count * dtype.itemsize:
        raise BrokenImage(f"it ends after {len(data) - start} of {count * dtype.itemsize} bytes")
    return np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if columns_first else "C")


def _tiff(data: bytes) -> tuple[np.ndarray, int]:
    """Return the first image of a TIFF, with bands or pages as channels, and its orientation."""
    if find_spec("tifffile") is None:
        raise BrokenImage("a TIFF of several channels needs tifffile: pip install tifffile")
    import tifffile

    with tifffile.TiffFile(BytesIO(data)) as tiff:
        series = tiff.series[0]
        page = series.keyframe
        for shape in (series.shape, page.shape, (page.tilelength, page.tilewidth)[: 2 * page.is_tiled]):
            _check(shape or (1,), series.dtype)
        turn = page.tags.valueof("Orientation", 1)
        image, axes = series.asarray(), series.axes
    if image.ndim == 3 and axes.endswith("YX"):
        image = image.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    return image, turn if turn in range(1, 9) else 1


def _bands(data: bytes) -> tuple[np.ndarray, int]:
    """Return the bands of an image that Pillow reads, as it stores them, and its orientation."""
    with opened(data) as image:
        bands = np.asarray(image)
        return bands if bands.ndim == 3 else bands[..., None], orientation(image)  # (h, w) -> (h, w, 1)
