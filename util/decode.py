"""Encoded images to RGB pixels: JPEG through libjpeg-turbo (simplejpeg), everything else through Pillow."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow, too, takes an image for a decompression bomb: 179 million

# rows and columns of an image -> top, left, height, width of the part of it that is wanted
Crop = Callable[[int, int], tuple[int, int, int, int]]


class BrokenImage(Exception):
    """The bytes are no image that can be decoded, or one of more than `MAX_PIXELS`."""


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
        with Image.open(BytesIO(data)) as image:
            if image.mode.startswith("I;16"):  # Pillow's own conversion saturates at 255 of 65535
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # decoders of broken files raise nearly anything
        raise BrokenImage(str(error) or type(error).__name__) from error


def crop_of(data: bytes, crop: Crop, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode a part of an image, only as large as it is needed.

    A JPEG of which the part is at least 3, 6 or 12 times as large as `size` is decoded at a half, a quarter or an
    eighth of its sides, which libjpeg does inside the inverse DCT; after the resize the pixels then differ by less
    than 1 of 255 on average, and the part has moved by less than one of them. What libjpeg-turbo does not decode
    without a warning is left to Pillow to judge.

    Args:
        data: content of an image file.
        crop: draws the part, given the rows and columns of the whole image.
        size: height and width that the part will be resized to; None decodes at full size.

    Returns:
        (h, w, 3) uint8, RGB.

    Raises:
        BrokenImage: says why.
    """
    if not simplejpeg.is_jpeg(data):
        return _part(np.array(with_pillow(data)), crop)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _part(np.array(with_pillow(data)), crop)
    if height * width > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    top, left, h, w = crop(height, width)
    times = 1 if size is None else min(h / size[0], w / size[1])
    shrink = next((n for n in (8, 4, 2) if times >= 1.5 * n), 1)
    try:
        if colorspace in ("CMYK", "YCCK"):
            raise ValueError("libjpeg-turbo does not turn it into RGB")
        pixels = simplejpeg.decode_jpeg(
            data, min_height=height // shrink, min_width=width // shrink, min_factor=float(shrink)
        )
    except ValueError:
        pixels, shrink = np.array(with_pillow(data)), 1
    top, left, h, w = (n // shrink for n in (top, left, h, w))
    return pixels[top : top + h, left : left + w]


def _part(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    top, left, h, w = crop(*pixels.shape[:2])
    return pixels[top : top + h, left : left + w]
