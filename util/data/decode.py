"""Decode images to RGB or grey pixels: JPEG with libjpeg-turbo (simplejpeg), everything else with Pillow."""

import logging
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from util.data.pixels import IMAGENET, Pixels
from util.files import printable

# Largest number of pixels that is decoded, 89 million: above it, Pillow warns of decompression bombs. Decoding takes up
# to 20 bytes per pixel (JPEG2000), so a worker needs up to 1.8 GB for such an image.
MAX_PIXELS = 2**30 // 12

# Pillow's formats that are read, and the suffixes of their files. Pillow does not get files of other formats: it would
# pass EPS to Ghostscript, which runs programs.
FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
    "PNG": ("png", "apng"),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "DIB": ("dib",),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "JPEG2000": ("jp2", "j2k", "jpc", "jpf", "jpx", "j2c"),
    "AVIF": ("avif", "avifs"),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)  # in lower case, without a dot
ARRAYS, NUMPY = "npy", b"\x93NUMPY"  # suffix and first bytes of arrays of NumPy, see `util.data.arrays`

# Pillow's warnings and log lines do not name the file; `BrokenImage` does, and the others do not matter.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
Image.init()
KNOWN = tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow before 11.3 does not know AVIF
LIBRARIES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # optional when Pillow is built

# height and width of an image -> top, left, height and width of the crop
Crop = Callable[[int, int], tuple[int, int, int, int]]


class BrokenImage(Exception):
    """The image cannot be read or decoded, is larger than `MAX_PIXELS`, or is grey with an unknown value for white."""


@contextmanager
def as_broken_image(*passed: type[Exception]) -> Iterator[None]:
    """Turn exceptions of a decoder into `BrokenImage` with a reason in one line; those of the `passed` types pass."""
    unchanged: tuple[type[Exception], ...] = (BrokenImage, *passed)
    try:
        yield
    except unchanged:
        raise
    except UnidentifiedImageError as error:  # its text is only the address of the bytes
        missing = [name for name, library in LIBRARIES.items() if not features.check(library)]
        note = f" (the installed Pillow does not read {', '.join(missing)})" if missing else ""
        raise BrokenImage(f"no image of a known format{note}") from error
    except Image.DecompressionBombError as error:  # its text names another limit
        raise BrokenImage(f"it has more than {MAX_PIXELS} pixels") from error
    except MemoryError as error:
        raise BrokenImage("there is not enough memory to decode it") from error
    except Exception as error:  # decoders raise nearly any exception on broken files
        raise BrokenImage(printable(str(error)) or type(error).__name__) from error


def check_size(width: int, height: int) -> None:
    """Raise `BrokenImage`, before memory is allocated, if a side is zero or there are more than `MAX_PIXELS` pixels."""
    if min(width, height) < 1:
        raise BrokenImage(f"{width} x {height} is an empty image")
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than {MAX_PIXELS}")


@as_broken_image()
def with_pillow(data: bytes, pixels: Pixels = IMAGENET) -> Image.Image:
    """Decode the content of an image file with Pillow to mode RGB, or L (ITU-R BT.601) if `pixels` has one channel.

    Only the first frame or page is decoded, and turned if `pixels.exif` says so; Pillow always turns a TIFF. Raise
    `BrokenImage` with the reason.
    """
    if data.startswith(NUMPY):
        raise BrokenImage(f"an array of NumPy is read only with --in_chans other than 1 and 3, not {pixels.channels}")
    with opened(data) as image:
        turn = orientation(image) if pixels.exif else 1
        image = (_grey8(image) if image.mode[0] in "IF" else image).convert("L" if pixels.channels == 1 else "RGB")
        return image if turn == 1 else Image.fromarray(np.ascontiguousarray(turned(np.asarray(image), turn)))


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open the content of an image file with Pillow, and check its size and a PNG's checksums; nothing is decoded."""
    with Image.open(BytesIO(data), formats=KNOWN) as image:
        check_size(*image.size)
        if isinstance(image, TiffImageFile) and TILE_WIDTH in image.tag_v2:  # a tile can be larger than the image
            check_size(image.tag_v2[TILE_WIDTH], image.tag_v2.get(TILE_HEIGHT, 0))
        if image.format == "PNG":
            _check_png(data)
        yield image


def orientation(image: Image.Image) -> int:
    """Return the orientation in an image's EXIF data, 1 to 8; 1, as it is decoded, if there is none or it is damaged.

    Pillow turns a TIFF when it decodes it, so that its orientation is 1.
    """
    if isinstance(image, TiffImageFile):
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises nearly any exception on damaged data
        return 1
    return found if found in range(1, 9) else 1


# Orientations of which rows, and columns, are stored in reverse, and then those of which they are also exchanged.
ROWS_TURN, COLUMNS_TURN, EXCHANGE = {3, 4, 6, 7}, {2, 3, 7, 8}, {5, 6, 7, 8}


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels (h, w) or (h, w, C) upright."""
    pixels = pixels[:: -1 if orientation in ROWS_TURN else 1, :: -1 if orientation in COLUMNS_TURN else 1]
    return pixels.swapaxes(0, 1) if orientation in EXCHANGE else pixels


def stored_crop(crop: Crop, orientation: int) -> Crop:
    """Return, for height and width as they are stored, the part that is the crop of the upright image."""
    if orientation == 1:
        return crop

    def part(height: int, width: int) -> tuple[int, int, int, int]:
        exchanged = orientation in EXCHANGE
        top, left, h, w = crop(width, height) if exchanged else crop(height, width)
        if exchanged:
            top, left, h, w = left, top, w, h
        top = height - top - h if orientation in ROWS_TURN else top
        left = width - left - w if orientation in COLUMNS_TURN else left
        return top, left, h, w

    return part


def _check_png(data: bytes) -> None:
    """Check the checksums of the chunks that pixels depend on; Pillow does not check those of the pixel data."""
    start, kind = 8, b""
    while kind != b"IEND" and start + 8 <= len(data):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 8 + length
        if kind[:1].isupper() and zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BrokenImage(f"chunk {printable(kind)} is damaged or incomplete")
        start = end + 4


TILE_WIDTH, TILE_HEIGHT, BITS_PER_SAMPLE, PHOTOMETRIC = 322, 323, 258, 262  # tags of TIFF
WHITE_IS_ZERO = 0


def _grey8(image: Image.Image) -> Image.Image:
    """Return the upper 8 bits of grey values; Pillow's own conversion clips them at 255."""
    has_16_bits = image.mode == "I" and image.format in ("PPM", "PNG")  # Pillow scales a PGM's values to 16 bits
    if not has_16_bits and not image.mode.startswith("I;16"):
        raise BrokenImage(f"grey values in Pillow's mode {image.mode}: which value is white is unknown")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # 12 in some TIFFs
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey)


def crop_of(
    data: bytes,
    crop: Crop = lambda height, width: (0, 0, height, width),
    size: tuple[int, int] | None = None,
    pixels: Pixels = IMAGENET,
) -> np.ndarray:
    """Decode a crop of an image, and little more than the crop.

    The rows of a JPEG below the crop are not decoded. If the crop is at least 3, 6 or 12 times as large as `size`, the
    JPEG is decoded at a half, a quarter or an eighth of its resolution, which libjpeg does inside the inverse DCT.
    After the resize, pixels then differ by less than 1 of 255 on average, and the crop has moved by less than one
    pixel. Files that libjpeg-turbo cannot decode are passed to Pillow.

    Args:
        data: content of an image file.
        crop: returns the crop for the height and width of the upright image; by default the whole image.
        size: height and width to which the crop will be resized; None decodes at full resolution.
        pixels: one channel or three, and whether to turn the image.

    Returns:
        (h, w, C) uint8, contiguous: RGB, or grey (ITU-R BT.601).

    Raises:
        BrokenImage: with the reason.
    """
    import simplejpeg  # imported here, so that code which decodes no JPEG works without it

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        whole = _all_pixels(data, pixels)
        return np.ascontiguousarray(_cut(whole, crop(*whole.shape[:2])))
    check_size(width, height)
    turn = orientation_of(data) if pixels.exif else 1
    part = stored_crop(crop, turn)(height, width)
    top, _, h, w = part
    wanted = size and (size[::-1] if turn in EXCHANGE else size)
    ratio = 1 if wanted is None else min(h / wanted[0], w / wanted[1])
    shrink = next((n for n in (8, 4, 2) if ratio >= 1.5 * n), 1)
    scale = {"min_width": -(-width // shrink), "min_factor": float(shrink)} if shrink > 1 else {}
    try:
        if colorspace in ("CMYK", "YCCK"):
            raise ValueError("libjpeg-turbo does not convert it to RGB")
        rows = _first_rows(data, min(height, top + h + 2))  # chroma upsampling reads two rows ahead
        with as_broken_image(ValueError):
            to = "GRAY" if pixels.channels == 1 else "RGB"
            stored = simplejpeg.decode_jpeg(rows, colorspace=to, strict=False, **scale)
    except ValueError:
        stored, shrink = _all_pixels(data, pixels._replace(exif=False)), 1
        if stored.shape[:2] != (height, width):
            raise BrokenImage("its headers contradict each other") from None
    return np.ascontiguousarray(turned(_cut(stored, [n // shrink for n in part]), turn))


def orientation_of(data: bytes) -> int:
    """Return the `orientation` in the content of an image file, which is not decoded; Pillow takes 0.03 ms."""
    try:
        with Image.open(BytesIO(data), formats=KNOWN) as image:
            return orientation(image)
    except Exception:  # libjpeg-turbo reads some files that Pillow does not
        return 1


@as_broken_image()
def _all_pixels(data: bytes, pixels: Pixels) -> np.ndarray:
    image = np.array(with_pillow(data, pixels))
    return image[..., None] if image.ndim == 2 else image  # (h, w) -> (h, w, 1)


def _cut(pixels: np.ndarray, part: Sequence[int]) -> np.ndarray:
    top, left, h, w = part
    return pixels[top : top + h, left : left + w]


BASELINE = 0xC0, 0xC1  # frames that one scan encodes from top to bottom; ITU-T T.81, table B.1
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
START_OF_SCAN, END_OF_IMAGE = 0xDA, b"\xff\xd9"


def _first_rows(data: bytes, rows: int) -> bytes | bytearray:
    """Return the JPEG with a height of `rows` in its header, so that the decoder stops after the first `rows` rows.

    libjpeg-turbo then warns of the remaining data, so its warnings cannot show that a file is truncated. The marker at
    the end of the file shows it instead, as in Pillow.

    Raises:
        ValueError: the file is truncated.
    """
    start, frame = 2, None
    while True:
        if start + 4 > len(data) or data[start] != 0xFF:
            raise ValueError("the header is damaged")
        if data[start + 1] == START_OF_SCAN:
            break
        kind, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        if kind in FRAMES:
            frame = start
        start += 1 if kind == 0xFF else 2 if kind in BARE else 2 + length  # any marker may be padded with 0xFF
    if data.rfind(END_OF_IMAGE) < start:
        raise ValueError("the end is missing")
    if frame is None or data[frame + 1] not in BASELINE:
        return data
    shorter = bytearray(data)
    shorter[frame + 5 : frame + 7] = rows.to_bytes(2, "big")
    return shorter
