"""Accuracies with intervals, as a table in Markdown and as a JSON file."""

import argparse
import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from util.checkpoints.hub import beside
from util.distributed.processes import on_main
from util.errors import RunError, as_user_error
from util.files import json_with, output_file, printable, write_json

UNANSWERED = {"broken": "broken", "nonfinite": "with logits that are not finite"}  # images that count as wrong
INTERVALS = {"acc1": "interval", "acc5": "interval5"}  # of which accuracy; see `wilson`


def wilson(correct: float, images: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of an accuracy, in percent, for images drawn at random (Wilson 1927)."""
    z, p = 1.959964, correct / images
    centre, half = p + z * z / (2 * images), z * math.sqrt(p * (1 - p) / images + (z / (2 * images)) ** 2)
    low, high = (100 * (centre + sign * half) / (1 + z * z / images) for sign in (-1, 1))
    return max(0.0, low), min(100.0, high)  # rounding can exceed them


def accuracy(correct: float, correct5: float, images: int) -> dict:
    """Return `acc1` and `acc5` in percent, the `interval` of `acc1` (see `wilson`) and `images`."""
    interval = wilson(correct, images)
    return {"acc1": 100 * correct / images, "acc5": 100 * correct5 / images, "interval": interval, "images": images}


def with_interval(row: dict, name: str = "acc1", digits: int = 2) -> str:
    """Return an accuracy and its interval as a cell of a table."""
    low, high = row[INTERVALS[name]]
    return f"{row[name]:.{digits}f} % ({low:.{digits}f} to {high:.{digits}f})"


def escaped(text: str) -> str:
    """Return a text of one line with the characters escaped that Markdown would interpret, in a table too."""
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", text)


def table(*rows: list) -> str:
    """Return rows as a table in Markdown; the first one is its head."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *body])


def beside_checkpoint(checkpoint: str, suffix: str) -> Path:
    """Return the path of a result: that of the checkpoint with another suffix; raise UserError if it names no file."""
    with as_user_error(ValueError, prefix=f"{checkpoint} names no file: "):
        return beside(checkpoint).with_suffix(suffix)


def report_folder(given: str | None, checkpoint: str, files: dict[str, Callable[[Path], bool]]) -> Path:
    """Return the folder of a report: `given`, or CKPT.eval beside the checkpoint.

    `files` are the names of those that will be written there, and what tells that one is of an earlier report.

    Raises:
        UserError: a file of the report cannot be written, or one of another kind is in its place.
    """
    folder = beside_checkpoint(checkpoint, ".eval") if given is None else Path(given)

    def check() -> None:
        for name, is_ours in files.items():
            output_file(folder / name, is_ours)

    on_main(check)
    return folder


def starts_with(text: str) -> Callable[[Path], bool]:
    """Return a function that checks whether a file begins with a text."""

    def holds(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return file.read(len(text)) == text.encode()
        except OSError:
            return False

    return holds


def csv_text(rows: Iterable[Sequence]) -> str:
    """Return rows as CSV; None becomes an empty field."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def result_file(args: argparse.Namespace, suffix: str, results: type) -> Path:
    """Return the path of a result's JSON file: `--output`, or the checkpoint's with another suffix; see `output_file`.

    An earlier file there, whose "results" have the type `results`, is overwritten.

    Raises:
        UserError: the file cannot be written, or one of another kind is there.
    """
    default = beside_checkpoint(args.checkpoint, suffix)
    path = default if args.output is None else Path(args.output)
    ours = json_with(checkpoint=str, weights=str, results=results, args=dict)
    return on_main(lambda: output_file(path, ours, beside(args.checkpoint)))


def write_result(path: Path, settings: dict, content: dict) -> None:
    """Write a result and the script's arguments, on the main process.

    Raises:
        RunError: the file cannot be written; the result has been printed before.
    """
    settings = {name: printable(value) if isinstance(value, (str, Path)) else value for name, value in settings.items()}
    content = {"checkpoint": settings["checkpoint"], **content, "args": settings}
    try:
        on_main(lambda: write_json(path, content))
    except OSError as error:
        raise RunError(f"--output {printable(path)} cannot be written: {error.strerror}") from error
