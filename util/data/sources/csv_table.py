"""Read images that a table lists, with labels by name or by number."""

import csv
import io
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from util.data.sources.image_files import ImageFiles
from util.data.sources.source import MAX_CLASSES, SPLITS, THREADS, NoSplit, choose_split, is_folder, without_labels
from util.errors import UserError, as_user_error
from util.files import open_regular, printable

LOGGER = logging.getLogger("arm")

# Names of the columns, in upper or lower case; the first one that exists is read.
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image"),
    "label": ("label", "class", "class_name"),
    "split": ("split",),
}
KNOWN = [name for names in SPLITS.values() for name in names]  # in the column of splits
DELIMITERS = ",;\t"


class CsvTable(ImageFiles):
    """A CSV file in UTF-8 with a line of column names: path and, perhaps, label and split.

    Relative paths start from the folder of the file. Without a column of splits, all rows are train. In a folder,
    train.csv, val.csv and so on hold a split each. Labels are numbers if all are whole numbers, else the names of
    classes, which are sorted. Paths and splits of all rows are checked, also of those that are not read.
    """

    def __init__(self, data_path: str, split: str, labels: bool = True) -> None:
        about, file, name = f"--data_path csv:{printable(data_path)}", Path(data_path), ""
        with as_user_error(OSError, prefix=f"{about}: "):
            in_folder = is_folder(file)
            if in_folder:
                found = [name for name in KNOWN if (file / f"{name}.csv").exists()]
                chosen = choose_split(found, split, True, about)
                if not chosen:
                    raise NoSplit(f"{about}: there is no {split or 'train'}.csv in it")
                file = file / f"{chosen}.csv"
            table = _Table(file)
        rows = np.arange(len(table.paths))
        if in_folder and table.splits:
            raise UserError(f"{table.shown}: the name says the split, so it must not have a column split")
        if table.splits:
            chosen = choose_split({*table.splits}, split, labels, about)
            if chosen is None:
                raise NoSplit(f"{about}: no row has the split {split}, only {', '.join(sorted({*table.splits}))}")
            name, rows = chosen, rows[np.array(table.splits) == chosen] if chosen else rows
        elif split == "val" and not in_folder:
            raise NoSplit(
                f"{about}: it has no column split, so all its rows are train: add the column, with train and val in "
                "it, or name a folder with train.csv and val.csv"
            )
        self.root = f"csv:{table.shown}{f' ({name})' if name else ''}"
        self.folder = str(file.parent)
        self.paths = np.array([os.fsencode(table.paths[row]) for row in rows])
        self.classes, self.labels = _labels(table, rows, labels)
        if table.repeats:
            LOGGER.info("%s: %d rows repeat an image, which counts as often", table.shown, len(table.repeats))


def _labels(table: "_Table", rows: np.ndarray, needed: bool) -> tuple[list[str], np.ndarray]:
    """Return the names of the classes of the whole table, and the labels of some of its rows, (n,) int64.

    Raises:
        UserError: labels are needed, and one of the rows has none, or an unusable one.
    """
    try:
        if not table.labels:
            raise UserError(f"{table.shown}: it has no column of labels, called {' or '.join(COLUMNS['label'])}")
        table.check([row for row in rows if not table.labels[row]], "it has no label")
        table.check_repeats(table.labels)
        names = sorted({*table.labels} - {""})
        if all(re.fullmatch("-?[0-9]+", name) for name in names):
            wrong = {name for name in names if len(name) > 18 or not 0 <= int(name) < MAX_CLASSES}
            rows_of_wrong = [row for row in rows if table.labels[row] in wrong]
            table.check(rows_of_wrong, f"its label is no number from 0 to {MAX_CLASSES - 1}")
            labels = np.array([int(table.labels[row]) for row in rows], np.int64)
            return [""] * (max(int(name) for name in names if name not in wrong) + 1), labels
        shown = {name: printable(name) for name in names}
        place = {name: number for number, name in enumerate(sorted({*shown.values()}))}
        return [*place], np.array([place[shown[table.labels[row]]] for row in rows], np.int64)
    except UserError as error:
        if needed or table.labels:
            without_labels(str(error), needed)
        return [], np.zeros(len(rows), np.int64)


class _Table:
    """The cells of a file, checked; `labels` and `splits` are empty lists if it has no such column.

    Raises:
        UserError: a line is wrong, which the message names.
        OSError: the file cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.shown = printable(file)
        self.lines: list[int] = []  # of each row, from 1
        self.paths: list[str] = []
        self.labels: list[str] = []
        self.splits: list[str] = []
        with open_regular(file) as opened:
            content = opened.read()
        try:
            self._read(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{self.shown} line {line}: it is not UTF-8: save the table as UTF-8") from error
        self.check([row for row, path in enumerate(self.paths) if "\0" in path], "its path holds a NUL")
        unknown = {*self.splits} - {*KNOWN}
        rows_of_unknown = [row for row, split in enumerate(self.splits) if split in unknown]
        self.check(rows_of_unknown, f"its split is none of {', '.join(KNOWN)}")
        first: dict[str, int] = {}
        rows = enumerate(map(os.path.normpath, self.paths))
        self.repeats = [(first[path], row) for row, path in rows if first.setdefault(path, row) != row]
        self.check_repeats(self.splits)
        with ThreadPoolExecutor(THREADS) as pool:  # threads hide the latency of network file systems
            shares = np.array_split(np.arange(len(self.paths)), THREADS)
            found = pool.map(lambda share: [*self._missing(os.path.dirname(file), share)], shares)
            missing = {row: reason for part in found for row, reason in part}
        self.check([*missing], next(iter(missing.values()), ""))

    def _read(self, text: str) -> None:
        head = text.lstrip().partition("\n")[0]
        delimiter = max(DELIMITERS, key=head.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            filled = (row for row in reader if any(map(str.strip, row)) and row[0].lower() != "sep=")  # Excel's note
            header = next(filled, [])
            place = self._columns(header, delimiter)
            others = [(place[name], cells) for name, cells in (("label", self.labels), ("split", self.splits))
                      if name in place]  # fmt: skip
            for row in reader:
                if len(row) != len(header) or not row[place["path"]]:
                    if any(map(str.strip, row)):  # else it is blank
                        wrong = len(row) != len(header)
                        reason = f"it has {len(row)} columns instead of {len(header)}" if wrong else "it has no path"
                        raise UserError(f"{self.shown} line {reader.line_num}: {reason}")
                    continue
                self.lines.append(reader.line_num)
                self.paths.append(row[place["path"]])
                for column, cells in others:
                    cells.append(row[column].strip())
        except csv.Error as error:
            raise UserError(f"{self.shown} line {reader.line_num}: {error}") from error
        if not self.paths:
            raise UserError(f"{self.shown}: no row follows the names of the columns")
        self.splits[:] = map(str.lower, self.splits)

    def _columns(self, header: Sequence[str], delimiter: str) -> dict[str, int]:
        """Return {path, label or split: position} of the columns, found by their names."""
        names = [name.strip().lower() for name in header]
        found = {kind: [name for name in known if name in names] for kind, known in COLUMNS.items()}
        if not found["path"]:
            raise UserError(
                f"{self.shown}: its first line must name the columns, and one of them {' or '.join(COLUMNS['path'])}; "
                f"it is {printable(delimiter.join(header))[:200]!r}"
            )
        for kind, (first, *others) in ((kind, same) for kind, same in found.items() if same):
            if others or names.count(first) > 1:
                LOGGER.info("%s: the first column %s is read as the %s", self.shown, first, kind)
        return {kind: names.index(same[0]) for kind, same in found.items() if same}

    def _missing(self, folder: str, rows: np.ndarray) -> Iterator[tuple[int, str]]:
        """Yield the rows whose image is no file that can be found, and why."""
        for row in rows:
            try:
                if not stat.S_ISREG(os.stat(os.path.join(folder, self.paths[row])).st_mode):
                    yield row, "it is no regular file"
            except OSError as error:
                slashes = "; write / between folders instead of \\" if "\\" in self.paths[row] else ""
                yield row, f"{error.strerror or error}{slashes}"

    def check(self, rows: Sequence[int], reason: str) -> None:
        """Raise UserError, which names the line and the image of the first of the wrong rows, if there are any."""
        if rows:
            more = f"; {len(rows)} lines are like that" if len(rows) > 1 else ""
            path = printable(self.paths[rows[0]])
            raise UserError(f"{self.shown} line {self.lines[rows[0]]}: {path}: {reason}{more}")

    def check_repeats(self, cells: Sequence[str]) -> None:
        """Raise UserError if an image has other cells in another row."""
        for first, row in self.repeats if cells else []:
            if cells[first] != cells[row]:
                self.check([row], f"it is {cells[row]!r} here, and {cells[first]!r} in line {self.lines[first]}")
