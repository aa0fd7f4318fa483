"""Accuracies with intervals, as a table and as a JSON file."""

import argparse
import math
from pathlib import Path

from util.checkpoints.hub import beside
from util.distributed.processes import on_main
from util.errors import RunError, as_user_error
from util.files import json_with, output_file, printable, write_json


def wilson(correct: float, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy over the drawing of the images (Wilson 1927), in percent."""
    z, p = 1.959964, correct / images
    centre, half = p + z * z / (2 * images), z * math.sqrt(p * (1 - p) / images + (z / (2 * images)) ** 2)
    return tuple(100 * (centre + sign * half) / (1 + z * z / images) for sign in (-1, 1))


def accuracy(correct: float, correct5: float, images: int) -> dict:
    """`acc1`, `acc5` in percent, the `interval` of `acc1` (see `wilson`) and `images`."""
    interval = wilson(correct, images)
    return {"acc1": 100 * correct / images, "acc5": 100 * correct5 / images, "interval": interval, "images": images}


def with_interval(row: dict) -> str:
    """Top-1 and its interval, for a table."""
    return f"{row['acc1']:.2f} % ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})"


def table(*rows: list) -> str:
    """Rows as a table of Markdown; the first one is its head."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *body])


def result_file(args: argparse.Namespace, suffix: str, results: type) -> Path:
    """Return where the JSON file of a result goes: `--output`, or beside the checkpoint; see `output_file`.

    Args:
        args: `output` and `checkpoint` count.
        suffix: of the default, in the place of the checkpoint's.
        results: type of what an earlier file of this kind has under "results".

    Raises:
        UserError: it cannot be written, or another file is there.
    """
    with as_user_error(ValueError, prefix=f"{args.checkpoint} names no file: "):
        default = beside(args.checkpoint).with_suffix(suffix)
    path = default if args.output is None else Path(args.output)
    ours = json_with(checkpoint=str, weights=str, results=results, args=dict)
    return on_main(lambda: output_file(path, ours, beside(args.checkpoint)))


def write_result(path: Path, settings: dict, content: dict) -> None:
    """Write a result, and the arguments that led to it, on the main process.

    Raises:
        RunError: the file cannot be written; the result has been printed.
    """
    settings = {name: printable(value) if isinstance(value, (str, Path)) else value for name, value in settings.items()}
    content = {"checkpoint": settings["checkpoint"], **content, "args": settings}
    try:
        on_main(lambda: write_json(path, content))
    except OSError as error:
        raise RunError(f"--output {printable(path)} cannot be written: {error.strerror}") from error
