"""Describe the values of images before a model reads them: channels, orientation, mean and standard deviation."""

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from util.errors import UserError

# of ImageNet's training images, RGB from 0 to 1, as the released code and timm have them
MEAN = 0.485, 0.456, 0.406
STD = 0.229, 0.224, 0.225
LUMA = 0.299, 0.587, 0.114  # share of red, green and blue in grey (ITU-R BT.601), as in Pillow
# of grey images: exact for the mean, and for the deviation if the colours rise and fall together
GREY = tuple((round(sum(w * v for w, v in zip(LUMA, values, strict=True)), 4),) for values in (MEAN, STD))


class Pixels(NamedTuple):
    """How images are decoded and normalised; the default is that of the released code.

    Args:
        mean: of each channel, for values from 0 to 1.
        std: of each channel.
        channels: of an image: 1 is grey, 3 is RGB; any other number is read as it is stored.
        exif: turn images as the orientation in their EXIF data says.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    channels: int = 3
    exif: bool = False

    @property
    def as_stored(self) -> bool:
        """Return whether images are read with the type of number of their file, and not converted to grey or RGB."""
        return self.channels not in (1, 3)

    def __str__(self) -> str:
        """Say in words what they are; equal numbers are named once."""
        mean, std = (
            " ".join(f"{v:g}" for v in ([*{*values}] if len({*values}) == 1 else values)) for values in self[:2]
        )
        turned = ", turned as EXIF says" if self.exif else ""
        return f"images of {self.channels} channels with mean {mean} and deviation {std}{turned}"

    @classmethod
    def of(cls, args: argparse.Namespace, saved: Mapping[str, Any] = MappingProxyType({})) -> "Pixels":
        """Return those of a command line, of an examined model or of a checkpoint.

        Args:
            args: its `mean`, `std`, `in_chans` and `exif` are read; each may be absent or None.
            saved: by the same names, for those that are not in `args`: of the checkpoint to start from. Its mean and
                std are not taken for another number of channels.

        Raises:
            UserError: `--mean` and `--std` do not have one number, or one for each channel; one of them is missing;
                both are, and there is no default for this number of channels; or the mean exceeds the values.
        """
        given = {name: getattr(args, name, None) for name in ("mean", "std", "in_chans", "exif")}
        given = {name: value for name, value in given.items() if value is not None}
        if ("mean" in given) != ("std" in given):
            raise UserError("--mean and --std belong together: give both")
        found: dict[str, Any] = {**saved, **given}
        channels, exif = found.get("in_chans", 3), bool(found.get("exif"))
        if "mean" not in given and not len(found.get("mean", ())) == len(found.get("std", ())) == channels:
            return cls(*_usual(channels), channels, exif)
        for name in ("mean", "std"):
            if len(found[name]) not in (1, channels):
                numbers = "one number" if channels == 1 else f"one number, or {channels}"
                raise UserError(
                    f"--{name} has {len(found[name])} numbers, and images {channels} channels: give {numbers}"
                )
        if channels in (1, 3) and not all(0 <= value <= 1 for value in given.get("mean") or ()):
            raise UserError("--mean: the values of these images are from 0 to 1, so their mean is; divide by 255")
        mean, std = (tuple(found[name]) * (channels // len(found[name])) for name in ("mean", "std"))
        return cls(mean, std, channels, exif)

    def arguments(self) -> dict:
        """Return the arguments that describe them, for checkpoints and results."""
        return {"mean": list(self.mean), "std": list(self.std), "in_chans": self.channels, "exif": self.exif}


IMAGENET = Pixels()


def _usual(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of images of which neither is given: ImageNet's."""
    if channels == 3:
        return MEAN, STD
    if channels == 1:
        return GREY[0], GREY[1]
    raise UserError(
        f"images of {channels} channels have no usual mean and deviation: give --mean and --std, one number or "
        f"{channels} each, of values from 0 to 1"
    )
