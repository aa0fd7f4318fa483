"""Accuracies with intervals, as a table and as a JSON file."""

import json
import math
import tempfile
from pathlib import Path

from util.errors import UserError


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


def output_file(given: str | None, default: Path) -> Path:
    """Where a result will go; that it can be written there is tried before the work.

    Raises:
        UserError: it cannot.
    """
    path = Path(given or default)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from error
    return path


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from error
