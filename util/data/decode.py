"""Encoded images to RGB pixels: JPEG through libjpeg-turbo (simplejpeg), everything else through Pillow."""

import logging
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from util.files import printable

# Pixels of the largest image that is decoded, 89 million: where Pillow begins to warn of decompression bombs. Decoding
# takes up to 20 bytes a pixel (JPEG2000; PNG and others 10, JPEG 6), so a worker needs up to 1.8 GB for such an image.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS

# Pillow's formats that are read, and how their files end. Everything else is refused unread: Pillow would hand EPS to
# Ghostscript, which runs programs.
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

# Pillow's warnings and log lines do not name the file: a broken one is named by `BrokenImage`, of others none matters
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
Image.init()
KNOWN = tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow before 11.3 does not know AVIF
LIBRARIES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # which a Pillow may be built without

# rows and columns of an image -> top, left, height, width of the part of it that is wanted
Crop = Callable[[int, int], tuple[int, int, int, int]]


class BrokenImage(Exception):
    """The bytes are no image that can be decoded, of more than `MAX_PIXELS`, or grey values without a known white."""


@contextmanager
def _broken_if_it_fails(*but: type[Exception]) -> Iterator[None]:
    """Turn whatever a decoder raises, but for these kinds, into `BrokenImage` with a reason of one line."""
    try:
        yield
    except (BrokenImage, *but):
        raise
    except UnidentifiedImageError as error:  # its text is the address of the bytes
        lacking = [name for name, library in LIBRARIES.items() if not features.check(library)]
        note = f" (the installed Pillow does not read {', '.join(lacking)})" if lacking else ""
        raise BrokenImage(f"no image of a known kind{note}") from error
    except Image.DecompressionBombError as error:  # its text names another limit
        raise BrokenImage(f"it has more than {MAX_PIXELS} pixels") from error
    except MemoryError as error:
        raise BrokenImage("there is not enough memory to decode it") from error
    except Exception as error:  # decoders of broken files raise nearly anything
        raise BrokenImage(printable(str(error)) or type(error).__name__) from error


def check_size(width: int, height: int) -> None:
    """Refuse an image before memory is allocated for it.

    Args:
        width: in pixels.
        height: in pixels.

    Raises:
        BrokenImage: there are no pixels, or more than `MAX_PIXELS`.
    """
    if min(width, height) < 1:
        raise BrokenImage(f"{width} x {height} pixels are none")
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than {MAX_PIXELS}")


@_broken_if_it_fails()
def with_pillow(data: bytes) -> Image.Image:
    """Decode with Pillow the first frame or page; the orientation that EXIF may ask for is not applied.

    Args:
        data: content of an image file.

    Returns:
        The image in mode RGB.

    Raises:
        BrokenImage: says why.
    """
    with Image.open(BytesIO(data), formats=KNOWN) as image:
        check_size(*image.size)
        if image.format == "TIFF" and TILE_WIDTH in image.tag_v2:  # a tile may be larger than the image
            check_size(image.tag_v2[TILE_WIDTH], image.tag_v2.get(TILE_HEIGHT, 0))
        if image.format == "PNG":
            _check_png(data)
        return (_grey8(image) if image.mode[0] in "IF" else image).convert("RGB")


def _check_png(data: bytes) -> None:
    """Compare the checksums of the chunks that pixels depend on; Pillow leaves out those of the pixels themselves.

    Raises:
        BrokenImage: names the chunk that is damaged or incomplete.
    """
    at, kind = 8, b""
    while kind != b"IEND" and at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + length
        if kind[:1].isupper() and zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BrokenImage(f"chunk {printable(kind)} is damaged or incomplete")
        at = end + 4


TILE_WIDTH, TILE_HEIGHT, BITS_PER_SAMPLE, PHOTOMETRIC = 322, 323, 258, 262  # tags of TIFF
WHITE_IS_ZERO = 0


def _grey8(image: Image.Image) -> Image.Image:
    """The upper 8 bits of grey values, which Pillow's own conversion cuts off at 255."""
    of_16 = image.mode == "I" and image.format in ("PPM", "PNG")  # Pillow stretches a PGM's values to 16 bits
    if not of_16 and not image.mode.startswith("I;16"):
        raise BrokenImage(f"grey values in Pillow's mode {image.mode}: which value is white is not known")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # 12 in some TIFFs
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey)


def crop_of(data: bytes, crop: Crop, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode a part of an image, and little more than is needed of it.

    Of a JPEG, the rows below the part are not decoded. One of which the part is at least 3, 6 or 12 times as large as
    `size` is decoded at a half, a quarter or an eighth of its sides, which libjpeg does inside the inverse DCT; after
    the resize the pixels then differ by less than 1 of 255 on average, and the part has moved by less than one of
    them. What libjpeg-turbo cannot decode is left to Pillow to judge.

    Args:
        data: content of an image file.
        crop: draws the part, given the rows and columns of the whole image.
        size: height and width that the part will be resized to; None decodes at full size.

    Returns:
        (h, w, 3) uint8, RGB.

    Raises:
        BrokenImage: says why.
    """
    import simplejpeg  # here, so that what decodes no JPEG works without it

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        pixels = _all_pixels(data)
        return _part(pixels, crop(*pixels.shape[:2]))
    check_size(width, height)
    part = crop(height, width)
    top, _, h, w = part
    times = 1 if size is None else min(h / size[0], w / size[1])
    shrink = next((n for n in (8, 4, 2) if times >= 1.5 * n), 1)
    least = {"min_width": -(-width // shrink), "min_factor": float(shrink)} if shrink > 1 else {}
    try:
        if colorspace in ("CMYK", "YCCK"):
            raise ValueError("libjpeg-turbo does not turn it into RGB")
        rows = _first_rows(data, min(height, top + h + 2))  # upsampling of the colours looks two rows ahead
        with _broken_if_it_fails(ValueError):
            pixels = simplejpeg.decode_jpeg(rows, strict=False, **least)
    except ValueError:
        pixels, shrink = _all_pixels(data), 1
        if pixels.shape[:2] != (height, width):
            raise BrokenImage("its headers contradict each other") from None
    return _part(pixels, tuple(n // shrink for n in part))


@_broken_if_it_fails()
def _all_pixels(data: bytes) -> np.ndarray:
    return np.array(with_pillow(data))


def _part(pixels: np.ndarray, part: tuple[int, int, int, int]) -> np.ndarray:
    top, left, h, w = part
    return pixels[top : top + h, left : left + w]


BASELINE = 0xC0, 0xC1  # frames of one scan from top to bottom; ITU-T T.81, table B.1
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
START_OF_SCAN, END_OF_IMAGE = 0xDA, b"\xff\xd9"


def _first_rows(data: bytes, rows: int) -> bytes | bytearray:
    """A JPEG whose header asks for the first `rows` rows only, so that the decoder stops after them.

    libjpeg-turbo then warns of the data that follow; so, instead of its warnings, the mark at the end says here that
    a file is complete, which is what Pillow goes by.

    Raises:
        ValueError: the file is truncated.
    """
    at, frame = 2, None
    while True:
        if at + 4 > len(data) or data[at] != 0xFF:
            raise ValueError("the header is damaged")
        if data[at + 1] == START_OF_SCAN:
            break
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if kind in FRAMES:
            frame = at
        at += 1 if kind == 0xFF else 2 if kind in BARE else 2 + length  # any marker may be padded with 0xFF
    if data.rfind(END_OF_IMAGE) < at:
        raise ValueError("the end is missing")
    if frame is None or data[frame + 1] not in BASELINE:
        return data
    shorter = bytearray(data)
    shorter[frame + 5 : frame + 7] = rows.to_bytes(2, "big")
    return shorter
