"""Compare runs by what they have logged.

    python tools/plot_log.py ./out_finetune_b ./out_finetune_l --output runs.png

draws loss, learning rate, accuracy, accuracy of the EMA and images a second, whichever the runs have, over epochs.
"""

import argparse
import json
import logging
import math
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from util import cli
from util.errors import UserError, as_user_error
from util.files import FORMATS, figure_of, open_regular, output_file, printable, save_figure

LOGGER = logging.getLogger(__name__)
MAX_LOG = 2**28  # bytes
MAX_NUMBER = 2**128
MAX_EPOCHS = 10**9  # as of --epochs
TITLE = "ARM curves"  # in the metadata of the file
QUANTITIES = {
    "train_loss": "training loss",
    "train_lr": "learning rate",
    "test_loss": "loss on val",
    "test_acc1": "top-1 on val (%)",
    "ema_test_acc1": "top-1 of the EMA on val (%)",
    "images_per_second": "images a second",
}


def read(path: Path) -> list[dict]:
    """Read the lines of a log.txt by epoch; lines that are none are counted in a warning and do not count.

    Where a run went back to an earlier epoch, what it logs from there on replaces what it had logged of it and later.

    Args:
        path: of the file, or of the run's folder.

    Returns:
        One dict an epoch: `epoch`, an int from 0, and the logged values; NaN where a value is no number,
        or beyond `MAX_NUMBER`.

    Raises:
        UserError: no such file, or nothing is logged in it.
    """
    with as_user_error(OSError):
        path = path / "log.txt" if path.is_dir() else path
        with open_regular(path) as file:
            content = file.read(MAX_LOG + 1)
    if len(content) > MAX_LOG:
        raise UserError(f"{printable(path)} is larger than {MAX_LOG} bytes, which no log.txt is")
    rows: list[dict] = []
    ignored = 0
    for line in filter(None, map(bytes.strip, content.splitlines())):
        row = _row(line)
        if row is None:
            ignored += 1
            continue
        while rows and rows[-1]["epoch"] >= row["epoch"]:
            rows.pop()
        rows.append(row)
    if ignored:
        LOGGER.warning("%s: %d lines are not of a log, or cut off, and are ignored", printable(path), ignored)
    if not rows:
        raise UserError(f"{printable(path)}: no epoch is logged in it")
    return rows


def _row(line: bytes) -> dict | None:
    """Return the values of a line, those of `QUANTITIES` as floats; None for what is no line of a log."""
    try:
        row = json.loads(line)
        if type(row["epoch"]) is not int or not 0 <= row["epoch"] < MAX_EPOCHS:
            return None
        return row | {key: _number(row[key]) for key in QUANTITIES if key in row}
    except (ValueError, TypeError, KeyError, RecursionError):  # what a crash has left, or another program's
        return None


def _number(value: object) -> float:
    """Return a value as a float, NaN for what is no number, or one that no float32 is and no axis can show."""
    return float(value) if isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER else math.nan


def _label(name: str) -> str:
    """Return a run's name as matplotlib shows it: it leaves out those that begin with _, and sets formulas in $."""
    name = printable(name)
    return ("./" * name.startswith("_") + name).replace("$", r"\$")


def draw(logs: dict[str, list[dict]]) -> Figure:
    """One panel for each quantity that any of the runs has.

    Args:
        logs: lines by the run's name, as `read` returns them.

    Raises:
        UserError: none has any.
    """
    present = [key for key in QUANTITIES if any(key in row for rows in logs.values() for row in rows)]
    if not present:
        raise UserError(f"nothing to draw: no line has any of {', '.join(QUANTITIES)}")
    columns = 2 if len(present) == 4 else min(3, len(present))
    rows_of_panels = -(-len(present) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows_of_panels + 0.4), layout="constrained")
    panels = figure.subplots(rows_of_panels, columns, squeeze=False).flat
    for axis, key in zip(panels, present, strict=False):
        for name, rows in logs.items():
            points = [(row["epoch"] + 1, row.get(key, math.nan)) for row in rows]
            axis.plot(
                *zip(*points, strict=True),
                marker="o" if len(points) < 30 else None,
                markersize=3,
                label=_label(name),
            )
        axis.set_title(QUANTITIES[key], fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in list(figure.axes)[len(present) :]:
        axis.remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser("plot_log.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder, or its log.txt")
    parser.add_argument("--output", type=Path, default=Path("runs.png"), metavar="FILE", help="(default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write one PNG; runs are called by their folders, or where these have equal names by their paths."""
    with as_user_error(OSError):
        folders = [run if run.is_dir() else run.parent for run in args.runs]
    counts = Counter(folder.resolve().name for folder in folders)
    names = [folder.resolve().name if counts[folder.resolve().name] == 1 else str(folder) for folder in folders]
    with as_user_error(ValueError, prefix="--output: "):
        path = args.output if args.output.suffix else args.output.with_suffix(".png")
    if path.suffix[1:].lower() not in FORMATS:
        raise UserError(f"--output: Format {path.suffix[1:]!r} is not supported, only {', '.join(FORMATS)}")
    output_file(path, figure_of(TITLE), *args.runs)
    figure = draw(dict(zip(names, map(read, args.runs), strict=True)))
    with as_user_error(OSError, prefix=f"--output {printable(path)}: "):
        save_figure(figure, path, TITLE, dpi=120)
    print(printable(path))


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
