"""Carry out RandAugment by Triton kernels: two launches per layer for a whole batch, equal to Pillow's bytes.

The first kernel makes a table of 256 values for each image whose operation maps each value by itself; the second
applies the operations, each program on a block of pixels of one image. The number of launches does not depend on the
operations in the batch, and between two layers an image is written and read once, as uint8.

Pillow rounds every product and every sum. Therefore the kernels are compiled without fused multiply-adds, which round
once and sometimes change a byte. Warps are computed in float64, blends in float32, both in Pillow's order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Where each operation stands in OPERATIONS of util/data/randaugment.py: first those that are a table, then the others.
AUTO_CONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, BRIGHTNESS, CONTRAST = map(tl.constexpr, range(8))
COLOR, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = map(tl.constexpr, range(8, 15))
NOTE: tl.constexpr = tl.constexpr(3)  # float64 numbers per operation: its number and two parameters

READ = 4096  # pixels that a program of the first kernel reads at a time
BLOCK = 512  # pixels of a program of the second
WARPS = 8
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where Pillow rounds twice


@triton.jit
def _grey(red, green, blue):
    """Return the brightness from 0 to 255, int32."""
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


@triton.jit
def _blend(first, values, factor):
    """Return (1 - factor) * first + factor * values, in float32, limited to 0 to 255 and truncated to int32."""
    start = first.to(tl.float32)
    mixed = (values.to(tl.float32) - start) * factor + start
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _values(image, plane, pixels, here):
    """Return the three channels of these pixels, int32."""
    red = tl.load(image + pixels, mask=here, other=0).to(tl.int32)
    green = tl.load(image + plane + pixels, mask=here, other=0).to(tl.int32)
    blue = tl.load(image + 2 * plane + pixels, mask=here, other=0).to(tl.int32)
    return red, green, blue


@triton.jit(do_not_specialize=["notes_stride"], do_not_specialize_on_alignment=["notes"])
def tables_kernel(images, notes, tables, plane, notes_stride, READ: tl.constexpr):
    """Write the table (256,) uint8 of one channel of one image, if its operation has one; plane = height * width."""
    program = tl.program_id(0).to(tl.int64)
    number, channel = program // 3, program % 3
    image = images + number * 3 * plane
    note = notes + number * notes_stride
    operation = tl.load(note).to(tl.int32)
    first = tl.load(note + 1)
    level = tl.arange(0, 256)
    table = level
    if (operation == AUTO_CONTRAST) | (operation == EQUALIZE):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, plane, READ):
            pixels = start + tl.arange(0, READ)
            here = pixels < plane
            values = tl.load(image + channel * plane + pixels, mask=here, other=0).to(tl.int32)
            counts += tl.histogram(values, 256, mask=here)
        high = tl.max(tl.where(counts > 0, level, 0), 0)
        if operation == AUTO_CONTRAST:
            low = tl.min(tl.where(counts > 0, level, 255), 0)
            scale = tl.full([], 255.0, tl.float64) / tl.maximum(high - low, 1).to(tl.float64)
            stretched = level.to(tl.float64) * scale + (-low).to(tl.float64) * scale
            stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
            table = tl.where(high > low, stretched, level)
        else:
            step = (plane - tl.sum(tl.where(level == high, counts, 0), 0)) // 255
            before = tl.cumsum(counts, 0) - counts
            even = tl.minimum((before + step // 2) // tl.maximum(step, 1), 255)
            table = tl.where(step > 0, even, level)
    elif operation == INVERT:
        table = 255 - level
    elif operation == POSTERIZE:
        kept = tl.minimum(tl.maximum(first.to(tl.int32), 0), 8)
        table = level & (255 << (8 - kept))
    elif operation == SOLARIZE:
        table = tl.where(level < first.to(tl.int32), level, 255 - level)
    elif operation == SOLARIZE_ADD:
        table = tl.where(level < 128, level + first.to(tl.int32), level)  # at most 127 + 128
    elif operation == BRIGHTNESS:
        table = _blend(level * 0, level, first.to(tl.float32))
    elif operation == CONTRAST:
        total = tl.zeros([], tl.int64)
        for start in range(0, plane, READ):
            pixels = start + tl.arange(0, READ)
            here = pixels < plane
            red, green, blue = _values(image, plane, pixels, here)
            total += tl.sum(tl.where(here, _grey(red, green, blue), 0), 0)
        mean = (2 * total + plane) // (2 * tl.cast(plane, tl.int64))  # rounded half up
        table = _blend(level * 0 + mean.to(tl.int32), level, first.to(tl.float32))
    if (operation >= 0) & (operation <= CONTRAST):
        tl.store(tables + program * 256 + level, table.to(tl.uint8))


@triton.jit
def _cubic(v0, v1, v2, v3, d):
    """Interpolate at d from v1 (0) to v2 (1) with Keys' kernel for a = -1: float64, in Pillow's order."""
    square = 2.0 * (v0 - v1) + v2 - v3
    cube = -v0 + v1 - v2 + v3
    return v1 + d * (v2 - v0 + d * (square + d * cube))


@triton.jit
def _tap(image, row, left, k: tl.constexpr, width, here):
    """Return the pixel k columns right of `left` in the row that starts at `row`, or the border's; float64."""
    column = tl.minimum(tl.maximum(left + k, 0), width - 1)
    return tl.load(image + row + column, mask=here, other=0).to(tl.float64)


@triton.jit
def _warp(image, out, fill, operation, first, second, pixels, here, height, width, plane):
    """Write each pixel from x = a column + b row + c and y = d column + e row + f, of centres; outside it is `fill`.

    The interpolation repeats the border's pixels outside the image, but points outside get `fill`.
    """
    w, h = tl.cast(width, tl.float64), tl.cast(height, tl.float64)
    one, zero = tl.full([], 1.0, tl.float64), tl.full([], 0.0, tl.float64)
    a, b, c = one, zero, zero
    d, e, f = zero, one, zero
    if operation == SHEAR_X:
        b = first
    elif operation == SHEAR_Y:
        d = first
    elif operation == TRANSLATE_X:
        c = first * w
    elif operation == TRANSLATE_Y:
        f = first * h
    else:  # cosine and sine
        a, b = first, second
        d, e = -second, first
        c = first * (-w * 0.5) + second * (-h * 0.5) + w * 0.5
        f = -second * (-w * 0.5) + first * (-h * 0.5) + h * 0.5
    column, row = (pixels % width).to(tl.float64) + 0.5, (pixels // width).to(tl.float64) + 0.5
    x = a * column + b * row + c
    y = d * column + e * row + f
    inside = here & (x >= 0.0) & (x < w) & (y >= 0.0) & (y < h)
    x -= 0.5
    y -= 0.5
    before, above = tl.floor(x), tl.floor(y)
    across, down = x - before, y - above
    left, top = before.to(tl.int32) - 1, above.to(tl.int32) - 1
    for channel in tl.static_range(3):
        rows = ()
        for j in tl.static_range(4):
            start = tl.minimum(tl.maximum(top + j, 0), height - 1) * width + channel * plane
            v0 = _tap(image, start, left, 0, width, inside)
            v1 = _tap(image, start, left, 1, width, inside)
            v2 = _tap(image, start, left, 2, width, inside)
            v3 = _tap(image, start, left, 3, width, inside)
            rows += (_cubic(v0, v1, v2, v3, across),)
        value = _cubic(rows[0], rows[1], rows[2], rows[3], down)
        value = tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)
        outside = tl.load(fill + channel).to(tl.int32)
        tl.store(out + channel * plane + pixels, tl.where(inside, value, outside).to(tl.uint8), mask=here)


@triton.jit
def _smooth(channel, pixels, inner, width):
    """Return the mean of 3 x 3 pixels, the middle one 5 times, rounded to int32; no thirteenth is half way."""
    total = 4 * tl.load(channel + pixels, mask=inner, other=0).to(tl.int32)
    for j in tl.static_range(3):
        for i in tl.static_range(3):
            total += tl.load(channel + pixels + (j - 1) * width + i - 1, mask=inner, other=0).to(tl.int32)
    return (total + 6) // 13


@triton.jit(do_not_specialize=["notes_stride"], do_not_specialize_on_alignment=["notes"])
def operations_kernel(images, out, notes, tables, fill, height, width, notes_stride, BLOCK: tl.constexpr):
    """Apply the operation of an image to a block of its pixels."""
    plane = height * width
    blocks = tl.cdiv(plane, BLOCK)
    number = (tl.program_id(0) // blocks).to(tl.int64)
    pixels = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    here = pixels < plane
    image = images + number * 3 * plane
    out += number * 3 * plane
    note = notes + number * notes_stride
    operation = tl.load(note).to(tl.int32)
    first = tl.load(note + 1)
    if operation >= SHEAR_X:
        _warp(image, out, fill, operation, first, tl.load(note + 2), pixels, here, height, width, plane)
    else:
        red, green, blue = _values(image, plane, pixels, here)
        factor = first.to(tl.float32)
        if operation == COLOR:
            grey = _grey(red, green, blue)
            red, green, blue = _blend(grey, red, factor), _blend(grey, green, factor), _blend(grey, blue, factor)
        elif operation == SHARPNESS:
            row, column = pixels // width, pixels % width
            inner = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)  # the border stays as it is
            red = _blend(tl.where(inner, _smooth(image, pixels, inner, width), red), red, factor)
            green = _blend(tl.where(inner, _smooth(image + plane, pixels, inner, width), green), green, factor)
            blue = _blend(tl.where(inner, _smooth(image + 2 * plane, pixels, inner, width), blue), blue, factor)
        elif operation >= 0:
            table = tables + number * 768
            red = tl.load(table + red).to(tl.int32)
            green = tl.load(table + 256 + green).to(tl.int32)
            blue = tl.load(table + 512 + blue).to(tl.int32)
        tl.store(out + pixels, red.to(tl.uint8), mask=here)
        tl.store(out + plane + pixels, green.to(tl.uint8), mask=here)
        tl.store(out + 2 * plane + pixels, blue.to(tl.uint8), mask=here)


def carry_out(images: Tensor, notes: Tensor, fill: Tensor) -> Tensor:
    """Apply the operations of all layers to the images.

    Args:
        images: (B, 3, H, W) uint8, contiguous.
        notes: (B, layers * NOTE) float64 with any stride between its rows; all tensors are on one device.
        fill: 3 values uint8, the colour that a warp takes for points outside the image.

    Returns:
        (B, 3, H, W) uint8; `images` itself if there is no layer.
    """
    batch, _, height, width = images.shape
    plane, stride, blocks = height * width, notes.stride(0), triton.cdiv(height * width, BLOCK)
    tables = torch.empty(batch, 3, 256, dtype=torch.uint8, device=images.device)
    how = {"num_warps": WARPS, **EXACT}
    with torch.cuda.device_of(images):
        for at in range(0, notes.shape[1], NOTE.value):
            layer, done = notes[:, at:], torch.empty_like(images)
            tables_kernel[(3 * batch,)](images, layer, tables, plane, stride, READ, **how)
            operations_kernel[(batch * blocks,)](images, done, layer, tables, fill, height, width, stride, BLOCK, **how)
            images = done
    return images
