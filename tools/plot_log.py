"""Compare runs by their logs.

    python tools/plot_log.py ./out_finetune_b ./out_finetune_l --output runs.png

draws losses, learning rate, accuracies, effective rank and throughput over epochs, as far as the runs have them.
"""

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util import cli
from util.errors import UserError, as_user_error
from util.files import FORMATS, figure_of, open_regular, output_file, printable, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOGGER = logging.getLogger(__name__)
MAX_LOG = 2**28  # bytes
MAX_NUMBER = 2**128
MAX_EPOCHS = 10**9  # as of --epochs
TITLE = "ARM curves"  # in the metadata of the file
QUANTITIES = {
    "train_loss": "training loss",
    "test_loss": "loss on val",
    "train_lr": "learning rate",
    "test_acc1": "top-1 on val (%)",
    "ema_test_acc1": "top-1 of the EMA on val (%)",
    "test_knn_acc1": "top-1 of nearest neighbours (%)",
    "rankme": "effective rank of features (RankMe)",
    "images_per_second": "images a second",
}


def read(path: Path) -> list[dict]:
    """Read the lines of a log.txt; ignore malformed lines, and log their number.

    If the epochs go back at some line, that line and the following replace earlier ones of the same or later epochs.

    Args:
        path: of the file, or of the run's folder.

    Returns:
        One dict per epoch: `epoch`, an int from 0, and the logged values; NaN where a value is no number,
        or beyond `MAX_NUMBER`.

    Raises:
        UserError: no such file, or it holds no epoch.
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
        LOGGER.warning("%s: %d malformed or incomplete lines are ignored", printable(path), ignored)
    if not rows:
        raise UserError(f"{printable(path)}: no epoch is logged in it")
    return rows


def _row(line: bytes) -> dict | None:
    """Return the values of a line, those of `QUANTITIES` as floats; None for a malformed line."""
    try:
        row = json.loads(line)
        if type(row["epoch"]) is not int or not 0 <= row["epoch"] < MAX_EPOCHS:
            return None
        return row | {key: _number(row[key]) for key in QUANTITIES if key in row}
    except (ValueError, TypeError, KeyError, RecursionError):  # an incomplete line, or one of another program
        return None


def _number(value: object) -> float:
    """Return a value as a float; NaN if it is no number, or too large for an axis."""
    return float(value) if isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER else math.nan


def _label(name: str) -> str:
    """Return a run's name as a label of matplotlib, which would hide names with a leading _ and typeset $."""
    name = printable(name)
    return ("./" * name.startswith("_") + name).replace("$", r"\$")


def draw(logs: dict[str, list[dict]]) -> "Figure":
    """Draw one panel for each quantity that any of the runs has.

    Args:
        logs: lines by the run's name, as `read` returns them.

    Raises:
        UserError: the runs have no quantity.
    """
    from matplotlib.figure import Figure  # takes a second, which --help and a user's mistake need not
    from matplotlib.ticker import MaxNLocator

    present = [key for key in QUANTITIES if any(key in row for rows in logs.values() for row in rows)]
    if not present:
        raise UserError(f"nothing to draw: no line has any of {', '.join(QUANTITIES)}")
    columns = 2 if len(present) == 4 else min(3, len(present))
    rows_of_panels = -(-len(present) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows_of_panels + 0.4), layout="constrained")
    panels = figure.subplots(rows_of_panels, columns, squeeze=False).flat
    for axis, key in zip(panels, present, strict=False):
        for name, rows in logs.items():
            measured = [row for row in rows if key in row]  # some values are not measured after every epoch
            epochs, values = [row["epoch"] + 1 for row in measured], [row[key] for row in measured]
            axis.plot(epochs, values, marker="o" if len(epochs) < 30 else None, markersize=3, label=_label(name))
        axis.set_title(QUANTITIES[key], fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in list(figure.axes)[len(present) :]:
        axis.remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("plot_log.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder, or its log.txt")
    parser.add_argument("--output", type=Path, default=Path("runs.png"), metavar="FILE", help="(default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the figure; runs are named by their folders, or by their paths if folders have the same name."""
    with as_user_error(OSError):
        folders = [run if run.is_dir() else run.parent for run in args.runs]
    short = [folder.resolve().name for folder in folders]
    names = [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]
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
