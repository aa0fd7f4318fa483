"""The operations of timm's RandAugment on batches of uint8 pixels, bit-identical to those in Pillow."""

import copy
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import RandAugment
from torch import Tensor, nn

NOTE = 3  # numbers that describe an operation: its index in `OPERATIONS`, and two parameters
NO_OPERATION = [-1, 0.0, 0.0]


def runs_on_device(step: Callable) -> bool:
    """Return whether a step is a RandAugment with operations of `OPERATIONS` only, all bicubic with the same fill."""
    if not isinstance(step, RandAugment):
        return False
    kwargs = {"fillcolor": step.ops[0].kwargs["fillcolor"], "resample": Image.Resampling.BICUBIC}
    return all(op.aug_fn in OPERATIONS and op.kwargs == kwargs for op in step.ops)


def recording_copy(step: RandAugment) -> RandAugment:
    """Return a copy of a RandAugment that, called with [], returns the `NOTE` numbers of each operation it draws."""
    step = copy.deepcopy(step)
    for op in step.ops:
        op.aug_fn = partial(_note, op.aug_fn)
    step.ops = np.array(step.ops)  # np.random.choice would convert a list at every draw
    return step


def _note(operation: Callable, notes: list[float], magnitude: float = 0.0, **_: object) -> list[float]:
    parameters = magnitude, 0.0
    if operation is timm_ops.rotate:  # Python's sine is bit-identical to Pillow's, whatever the batch
        angle = -math.radians(magnitude % 360)
        parameters = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return [*notes, list(OPERATIONS).index(operation), *parameters]


def carry_out_layers(images: Tensor, notes: Tensor, parameters: Tensor, order: Tensor, fill: Tensor) -> Tensor:
    """Carry out the operations of every layer on each image.

    Args:
        images: (B, C, H, W) uint8, changed in place.
        notes: (B, layers * NOTE) float64 on the CPU, as a `recording_copy` draws them; index -1 is no operation.
        parameters: the same on the device of the images.
        order: (B, layers) int64 on that device: indices that sort the operations of each layer.
        fill: (C, 1, 1) uint8, the colour outside the image.

    Returns:
        (B, C, H, W) uint8.
    """
    functions = list(OPERATIONS.values())
    chunk_size = 1 if images.is_cpu else 16  # a CPU's caches hold about one image; 16 of 224 x 224 take 0.2 GB
    for start, rows in zip(range(0, notes.shape[1], NOTE), order.unbind(1), strict=True):
        numbers, counts = notes[:, start].unique(return_counts=True)
        for number, same in zip(numbers.int().tolist(), rows.split(counts.tolist()), strict=True):
            for chunk in same.split(chunk_size) if number >= 0 else ():
                # (n, 2) -> 2 times (n, 1, 1, 1)
                first, second = parameters[chunk, start + 1 : start + NOTE, None, None, None].unbind(1)
                images[chunk] = functions[number](images[chunk], first, second, fill)
    return images


def _bytes(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)  # truncates, as Pillow does


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace every value v of a channel by entry v of its table; `tables` are (n, C, 256)."""
    indices = images.flatten(2).long()  # (n, C, H, W) -> (n, C, H W)
    return _bytes(tables).gather(2, indices).view_as(images)


def _blend(first: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Blend from `first` (factor 0) to the images (factor 1) and beyond, in float32 and with Pillow's rounding."""
    first = first.float()
    return _bytes((images.float() - first).mul_(factor.float()).add_(first))


# ---- the operations of timm.data.auto_augment: images (n, C, H, W) uint8, two parameters (n, 1, 1, 1) float64, and the
# colour (C, 1, 1) uint8 outside the image -> (n, C, H, W) uint8; C is 1 or 3


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16  # (n, 1, H, W) int32


def auto_contrast(images: Tensor, *_: Tensor) -> Tensor:
    low, high = (f(images.flatten(2), 2, keepdim=True).double() for f in (torch.amin, torch.amax))  # (n, C, 1)
    levels = torch.arange(256, device=images.device)
    # torch computes 255 / x as 255 (1 / x), rounded twice
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    return _look_up(images, torch.where(high > low, levels * scale + -low * scale, levels))


def equalize(images: Tensor, *_: Tensor) -> Tensor:
    values = images.flatten(2).long()  # (n, C, H, W) -> (n, C, H W)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=values.device)
    counts.scatter_add_(2, values, torch.ones_like(values[:1, :1, :1]).expand_as(values))
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255  # (n, C, 1)
    tables = (counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)
    return _look_up(images, torch.where(step > 0, tables, torch.arange(256, device=values.device)))


def invert(images: Tensor, *_: Tensor) -> Tensor:
    return ~images


def posterize(images: Tensor, bits_to_keep: Tensor, *_: Tensor) -> Tensor:
    return images & (255 << (8 - bits_to_keep.long().clamp(0, 8)) & 255).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor, *_: Tensor) -> Tensor:
    return torch.where(images < threshold.short(), images, ~images)  # the threshold can be 256


def solarize_add(images: Tensor, add: Tensor, *_: Tensor) -> Tensor:
    return torch.where(images < 128, images + add.to(torch.uint8), images)  # at most 127 + 128


def brightness(images: Tensor, factor: Tensor, *_: Tensor) -> Tensor:
    return _bytes(images * factor.float())


def contrast(images: Tensor, factor: Tensor, *_: Tensor) -> Tensor:
    count = images.shape[2] * images.shape[3]
    mean = (2 * _grey(images).sum((2, 3), keepdim=True) + count) // (2 * count)  # rounded half up, in integers
    return _blend(mean, images, factor)


def color(images: Tensor, factor: Tensor, *_: Tensor) -> Tensor:
    return _blend(_grey(images), images, factor)


def sharpness(images: Tensor, factor: Tensor, *_: Tensor) -> Tensor:
    smooth, values = images.float(), images.short()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    squares = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = smooth[:, :, 1:-1, 1:-1]  # the border stays as it is
    inner.mul_(4).add_(squares).div_(13).add_(0.5).floor_()
    return _blend(smooth, images, factor)


def _cubic(v0: Tensor, v1: Tensor, v2: Tensor, v3: Tensor, d: Tensor) -> Tensor:
    """Interpolate at d (float64) from v1 (d = 0) to v2 (d = 1) with Keys' kernel, a = -1, in Pillow's order."""
    left, right = v0 - v1, v2 - v3
    both = left + right
    return (left + both).double().sub_(both * d).mul_(d).add_(v2 - v0).mul_(d).add_(v1)


def _warp(images: Tensor, fill: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """Take each pixel from column x and row y, which are float64 and broadcast to (n, 1, H, W); None keeps its own.

    Coordinates refer to the corners of pixels. For interpolation, the pixels of the border are repeated outside the
    image; pixels from points outside are replaced by `fill`.
    """
    height, width = images.shape[2:]
    stride = width + 4
    inside: Tensor | bool = True
    index: Tensor | int = 0
    fractions: list[Tensor | None] = []
    for position, size, step in ((x, width, 1), (y, height, stride)):
        if position is None:
            own = torch.arange(size, device=images.device)
            index = index + (own if step == 1 else own[:, None]) * step
            fractions.append(None)
        else:
            inside = inside & (position >= 0) & (position < size)
            before = (position - 0.5).floor()
            index = index + before.long().clamp_(-1, size - 1) * step
            fractions.append(position - 0.5 - before)
    across, down = fractions
    corner = torch.as_tensor(index + stride + 1)  # index of the upper left one of 4 x 4 pixels
    corner = corner.expand_as(images).flatten(2)  # (n, 1, H, W) -> (n, C, H W)
    padded = nn.functional.pad(images.float(), (2, 2, 2, 2), mode="replicate").flatten(2)  # (n, C, (H + 4) (W + 4))

    def pixel(row: int, column: int) -> Tensor:
        return padded[:, :, row * stride + column :].gather(2, corner).view_as(images)

    def interpolated(row: int) -> Tensor:
        if across is None:
            return pixel(row, 1)
        return _cubic(pixel(row, 0), pixel(row, 1), pixel(row, 2), pixel(row, 3), across)

    values = interpolated(1)
    if down is not None:
        values = _cubic(interpolated(0), values, interpolated(2), interpolated(3), down)
    return torch.where(torch.as_tensor(inside), _bytes(values), fill)


def _centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns (W,) and rows (H, 1) of the centres of the pixels, float64."""
    rows, columns = (torch.arange(n, dtype=torch.float64, device=images.device) + 0.5 for n in images.shape[2:])
    return columns, rows[:, None]


def shear_x(images: Tensor, factor: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    x, y = _centres(images)
    return _warp(images, fill, x=x + factor * y)


def shear_y(images: Tensor, factor: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    x, y = _centres(images)
    return _warp(images, fill, y=factor * x + y)


def translate_x_rel(images: Tensor, share: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    x, _ = _centres(images)
    return _warp(images, fill, x=x + share * images.shape[3])


def translate_y_rel(images: Tensor, share: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    _, y = _centres(images)
    return _warp(images, fill, y=y + share * images.shape[2])


def rotate(images: Tensor, cos: Tensor, sin: Tensor, fill: Tensor) -> Tensor:
    (x, y), half_height, half_width = _centres(images), images.shape[2] / 2, images.shape[3] / 2
    left = cos * -half_width + sin * -half_height + half_width
    top = -sin * -half_width + cos * -half_height + half_height
    return _warp(images, fill, cos * x + sin * y + left, -sin * x + cos * y + top)


OPERATIONS = {
    getattr(timm_ops, function.__name__): function
    for function in (
        auto_contrast, equalize, invert, posterize, solarize, solarize_add, brightness, contrast, color, sharpness,
        shear_x, shear_y, translate_x_rel, translate_y_rel, rotate,
    )
}  # fmt: skip
