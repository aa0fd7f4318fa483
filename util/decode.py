"""Encoded images to RGB pixels: JPEG through libjpeg-turbo (simplejpeg), everything else through Pillow."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow, too, takes an image for a decompression bomb: 179 million

# Pillow's formats that are read, and how their files end. Everything else is refused unread: Pillow would hand EPS to
# Ghostscript, which runs programs.
FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png", "apng"),
    "GIF": ("gif",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "JPEG2000": ("jp2", "j2k", "jpc", "jpf", "jpx", "j2c"),
    "AVIF": ("avif", "avifs"),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)  # in lower case, without a dot

# rows and columns of an image -> top, left, height, width of the part of it that is wanted
Crop = Callable[[int, int], tuple[int, int, int, int]]


class BrokenImage(Exception):
    """The bytes are no image that can be decoded, of more than `MAX_PIXELS`, or grey values without a known white."""


def with_pillow(data: bytes) -> Image.Image:
    """Decode with Pillow; the orientation that EXIF may ask for is not applied.

    Args:
        data: content of an image file.

    Returns:
        The image in mode RGB.

    Raises:
        BrokenImage: says why.
    """
    try:
        with Image.open(BytesIO(data), formats=tuple(FORMATS)) as image:
            return (_grey8(image) if image.mode[0] in "IF" else image).convert("RGB")
    except UnidentifiedImageError as error:  # its text is the address of the bytes
        raise BrokenImage("no image of a known kind") from error
    except Exception as error:  # decoders of broken files raise nearly anything
        raise BrokenImage(str(error) or type(error).__name__) from error


BITS_PER_SAMPLE = 258  # a tag of TIFF


def _grey8(image: Image.Image) -> Image.Image:
    """The upper 8 bits of grey values, which Pillow's own conversion cuts off at 255."""
    of_16 = image.mode == "I" and image.format in ("PPM", "PNG")  # Pillow stretches a PGM's values to 16 bits
    if not of_16 and not image.mode.startswith("I;16"):
        raise BrokenImage(f"grey values in Pillow's mode {image.mode}: which value is white is not known")
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]  # 12 in some TIFFs
    return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))


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
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _part(np.array(with_pillow(data)), crop)
    if height * width > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    part = crop(height, width)
    top, _, h, w = part
    times = 1 if size is None else min(h / size[0], w / size[1])
    shrink = next((n for n in (8, 4, 2) if times >= 1.5 * n), 1)
    try:
        if colorspace in ("CMYK", "YCCK"):
            raise ValueError("libjpeg-turbo does not turn it into RGB")
        rows = _first_rows(data, min(height, top + h + 2))  # upsampling of the colours looks two rows ahead
        least = {"min_width": -(-width // shrink), "min_factor": float(shrink)} if shrink > 1 else {}
        pixels = simplejpeg.decode_jpeg(rows, strict=False, **least)
    except ValueError:
        return _part(np.array(with_pillow(data)), lambda *_: part)
    return _part(pixels, lambda *_: tuple(n // shrink for n in part))


def _part(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    top, left, h, w = crop(*pixels.shape[:2])
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
