"""Log a run: a progress bar on a terminal or lines elsewhere, log.txt, and curves in TensorBoard or another tracker."""

import datetime
import errno
import importlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from itertools import compress
from operator import not_
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from util.arguments import LOG_EVERY
from util.distributed.processes import is_main
from util.errors import RunError, UserError
from util.files import open_lock, open_regular, replacing, to_json, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRACKER_ID = "tracker-id"  # file in the output folder


def show(text: str) -> None:
    """Print a line above a progress bar, if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def show_if_possible(text: str) -> None:
    """Print a line; a full disk behind stdout does not end a run, whose results are in files."""
    try:
        show(text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _warn_once(f"stdout cannot be written: {error.strerror}; the run continues, and log.txt has its results")


@cache
def _warn_once(text: str) -> None:
    """Print a line on stderr, once."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Show the progress of one pass over data: a bar on a terminal, lines elsewhere; nothing if `show` is None.

    An earlier process has made `done` of all its `steps`; lines appear every `every` steps.
    """

    def __init__(
        self,
        title: str,
        steps: int,
        done: int = 0,
        show: Callable[[str], None] | None = show,
        every: int = LOG_EVERY,
    ) -> None:
        self.show, self.every = show, every
        self.title, self.steps, self.done, self.step, self.images = title, steps, done, done, 0
        self.start, self.bar = time.monotonic(), None
        if show is not None and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, desc=title, dynamic_ncols=True, leave=True)

    def update(self, images: int, quiet: bool | None = None, **values: float) -> None:
        """Count a step of `images` images, of all processes together; unless `quiet`, show `values` and throughput.

        By default those with values, every `every`-th step and the last one are shown.
        """
        self.step += 1
        self.images += images
        if quiet is None:
            quiet = not values and self.step % self.every != 0 and self.step != self.steps
        if self.show is not None and not quiet:
            seconds = time.monotonic() - self.start
            shown = {name: f"{value:.4g}" for name, value in values.items()}
            shown["img/s"] = f"{self.images / seconds:.0f}"
            if self.bar is not None:
                self.bar.set_postfix(shown, refresh=False)
            else:
                left = datetime.timedelta(seconds=round(seconds / (self.step - self.done) * (self.steps - self.step)))
                text = "  ".join(f"{name} {value}" for name, value in shown.items())
                self.show(f"{self.title}  [{self.step}/{self.steps}]  {text}  left {left}")
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Log:
    """The log of all ranks but 0, which shows and keeps nothing; base of the other logs.

    Attributes:
        every: steps between two log points, at which the host waits for the device; the same on all ranks.
    """

    every = LOG_EVERY

    def progress(self, title: str, steps: int, done: int = 0) -> Progress:
        """Return the display of one pass over data; see `Progress`."""
        return Progress(title, steps, done, None, self.every)

    def say(self, text: str) -> None:
        """Show a line."""

    def start_at(self, epoch: int, step: int) -> None:
        """Remove values logged later than this position; see `RunLog.start_at`."""

    def scalars(self, step: int, **values: float) -> None:
        """Add one point to each curve."""

    def images(self, epoch: int, **images: np.ndarray) -> None:
        """Show images, (h, w, 3) uint8 each, as they are after an epoch."""

    def epoch(self, **values: float) -> None:
        """Append one line to log.txt, and a point to the curve of each evaluated value; `epoch` is among them."""


class ScreenLog(Log):
    """The log of rank 0 without files."""

    show = staticmethod(show)

    def progress(self, title: str, steps: int, done: int = 0) -> Progress:
        return Progress(title, steps, done, self.show, self.every)

    def say(self, text: str) -> None:
        self.show(text)


class Tracker:
    """Give wandb or trackio the methods of TensorBoard's `SummaryWriter` that a run calls.

    The name of the output folder and an id kept in it name the run, so a resumed run continues its curves.

    Raises:
        RunError: the tracker could not start.
    """

    def __init__(self, module: ModuleType, output_dir: Path) -> None:
        self.module = module
        try:
            name = f"{output_dir.resolve().name}-{self._id_in(output_dir)}"
            more = {"id": name, "dir": str(output_dir)} if module.__name__ == "wandb" else {}
            module.init(project="arm", name=name, resume="allow", **more)
        except Exception as error:  # trackers raise exceptions of many kinds: network, account, disk
            raise RunError(f"--tracker {module.__name__}: {error}") from error

    @staticmethod
    def _id_in(output_dir: Path) -> str:
        """Return the id of the run in this folder; draw it if the folder has none."""
        kept = output_dir / TRACKER_ID
        with suppress(OSError), open_regular(kept) as file:
            known = file.read(100).strip()
            if re.fullmatch(rb"[0-9a-f]{6}", known):
                return known.decode()
        write_text(kept, secrets.token_hex(3))
        return Tracker._id_in(output_dir)

    @staticmethod
    def forget(output_dir: Path) -> None:
        """Delete the id, so that the next process in the folder starts a new run."""
        (output_dir / TRACKER_ID).unlink(missing_ok=True)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.module.log({name: value}, step=step)

    def add_image(self, name: str, pixels: np.ndarray, step: int, dataformats: str = "HWC") -> None:
        self.module.log({name: self.module.Image(pixels)}, step=step)

    def flush(self) -> None:
        """Do nothing: trackers send in the background, and the rest when the process ends."""


class RunLog(ScreenLog):
    """The log of rank 0 with files: log.txt (one JSON object per line, as MAE's tools read it), curves and images.

    It appends to log.txt in `output_dir`; TensorBoard's files are in `log_dir`, unless another `tracker` is used.
    """

    show = staticmethod(show_if_possible)

    def __init__(self, output_dir: Path, log_dir: Path, tracker: ModuleType | None = None) -> None:
        self.path, self.log_dir, self.tracker = output_dir / "log.txt", log_dir, tracker
        self.failed = False
        self.first_step: int | None = None  # of this process, in curves

    @cached_property
    def writer(self) -> "SummaryWriter | Tracker":
        """The experiment tracker, started when the first value is logged."""
        if self.tracker is not None:
            return Tracker(self.tracker, self.path.parent)
        from torch.utils.tensorboard import SummaryWriter  # takes a quarter of a second, and only rank 0 needs it

        return SummaryWriter(log_dir=str(self.log_dir), purge_step=self.first_step)

    def start_at(self, epoch: int, step: int) -> None:
        """Remove what is logged of this epoch, step and later ones, so that each appears once. Later calls do nothing.

        Lines of log.txt move to log.replaced.txt. TensorBoard drops the points when it reads its files. Other trackers
        cannot remove points: where whole epochs are repeated, a new run begins in them.

        Args:
            epoch: the current epoch.
            step: in curves, the first that is not logged yet.
        """
        if self.first_step is not None:
            return
        self.first_step = step
        with self._writing():
            lines = []
            if self.path.exists():
                with open_regular(self.path) as file:
                    lines = file.readlines()
            epochs = [_epoch_of(line) for line in lines]
            is_replaced = [known is not None and known >= epoch for known in epochs]
            replaced = list(compress(lines, is_replaced))
            if not replaced:
                return
            aside = self.path.with_name("log.replaced.txt")
            with open_lock(aside) as file:  # does not follow a link
                file.buffer.seek(0, os.SEEK_END)
                file.buffer.writelines(replaced)
            with replacing(self.path) as temporary:
                temporary.write_bytes(b"".join(compress(lines, map(not_, is_replaced))))
            again = f"{len(replaced)} epochs from {epoch} on are logged again"
            self.say(f"{self.path}: {again}; their old lines are in {aside}")
            if self.tracker is not None:
                Tracker.forget(self.path.parent)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Warn once instead of ending the run when something cannot be logged, on a full disk for example."""
        # trackers raise exceptions of many kinds
        failures: tuple[type[Exception], ...] = (OSError,) if self.tracker is None else (Exception,)
        try:
            yield
        except RunError:  # the tracker could not start
            raise
        except failures as error:
            if not self.failed:
                self.say(f"the log cannot be written: {error}; training continues without it")
            self.failed = True

    def scalars(self, step: int, **values: float) -> None:
        with self._writing():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def images(self, epoch: int, **images: np.ndarray) -> None:
        with self._writing():
            for name, pixels in images.items():
                self.writer.add_image(name, pixels, 1000 * (epoch + 1), dataformats="HWC")
            self.writer.flush()  # the thread that writes ends with Python, and would lose those of the last epoch

    def epoch(self, **values: float) -> None:
        evaluated = {name: value for name, value in values.items() if "test_" in name or name == "rankme"}
        self.scalars(1000 * (int(values["epoch"]) + 1), **evaluated)
        with self._writing():
            if self.path.exists():
                open_regular(self.path).close()  # raises for a pipe, which would block the run
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read(1) == b"\n" else b"\n")  # a crash has left half a line
                file.write(to_json(values).encode() + b"\n")
            self.writer.flush()


def _epoch_of(line: bytes) -> int | None:
    """Return the epoch of a line of log.txt; None for an incomplete line."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return epoch if type(epoch) is int else None


def open_log(folders: tuple[Path, Path] | None = None, tracker: str = "tensorboard", every: int = LOG_EVERY) -> Log:
    """Return the log of this rank: silent except on rank 0.

    Args:
        folders: output folder and folder of the TensorBoard files; None logs to the screen only.
        tracker: tensorboard, wandb or trackio.
        every: steps between two log points.

    Raises:
        UserError: the tracker is not installed.
    """
    try:
        module = None if tracker == "tensorboard" else importlib.import_module(tracker)
    except ImportError as error:
        raise UserError(f"--tracker {tracker}: it is not installed: pip install {tracker}") from error
    log = Log()
    if is_main():
        log = RunLog(*folders, module) if folders else ScreenLog()
    log.every = every
    return log


def clock(start: float, done: int, total: int) -> str:
    """Return the time since `start` (of `time.monotonic`) and the time left of `total` epochs, `done` of them made."""
    seconds = time.monotonic() - start
    left = datetime.timedelta(seconds=round(seconds / done * (total - done)))
    return f"{seconds:.0f} s since the start, {left} left"
