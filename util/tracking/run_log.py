"""What a run tells: a live bar on a terminal or plain lines elsewhere, log.txt and TensorBoard or another tracker."""

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

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.distributed.processes import is_main
from util.errors import RunError, UserError
from util.files import open_lock, open_regular, replacing, to_json, write_text

TRACKER_ID = "tracker-id"  # file in the output folder
LOG_EVERY = 20  # steps between two looks at what the device has computed: plain lines, points in TensorBoard


def show(text: str) -> None:
    """Print a line above a progress bar, if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def show_if_possible(text: str) -> None:
    """Print a line; a full disk behind stdout does not end a run, which keeps what it finds in files."""
    try:
        show(text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(f"what the run says cannot be written: {error.strerror}; it continues, and log.txt tells the epochs")


@cache
def _complain(text: str) -> None:
    """Print a line on stderr, once."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """One pass over data as rank 0 shows it: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, title: str, steps: int, done: int = 0, show: Callable[[str], None] = show) -> None:
        self.show = show
        self.title, self.steps, self.done, self.step, self.images = title, steps, done, done, 0
        self.start, self.bar = time.monotonic(), None
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, desc=title, dynamic_ncols=True, leave=True)

    def update(self, images: int, quiet: bool = False, **values: float) -> None:
        """Count one step of `images` images (all processes together); unless `quiet`, show `values` and the speed."""
        self.step += 1
        self.images += images
        if not quiet:
            seconds = time.monotonic() - self.start
            shown = {name: f"{value:.4g}" for name, value in values.items()}
            shown["img/s"] = f"{self.images / seconds:.0f}"
            if self.bar is not None:
                self.bar.set_postfix(shown, refresh=False)
            else:
                left = seconds / (self.step - self.done) * (self.steps - self.step)
                left = datetime.timedelta(seconds=round(left))
                text = "  ".join(f"{name} {value}" for name, value in shown.items())
                self.show(f"{self.title}  [{self.step}/{self.steps}]  {text}  left {left}")
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class ScreenLog:
    """The log of rank 0 without files."""

    show = staticmethod(show)

    def progress(self, title: str, steps: int, done: int = 0) -> Progress:
        return Progress(title, steps, done, self.show)

    def say(self, text: str) -> None:
        self.show(text)


class Tracker:
    """wandb or trackio with the calls of TensorBoard's `SummaryWriter` that a run uses.

    Args:
        module: wandb or trackio.
        output_dir: of the run, which is named by it and by a number kept there: one that goes on goes on with its
            curves.

    Raises:
        RunError: the tracker could not start.
    """

    def __init__(self, module: ModuleType, output_dir: Path) -> None:
        self.module = module
        try:
            name = f"{output_dir.resolve().name}-{self._id_in(output_dir)}"
            more = {"id": name, "dir": str(output_dir)} if module.__name__ == "wandb" else {}
            module.init(project="arm", name=name, resume="allow", **more)
        except Exception as error:  # network, account, disk: whatever it may be, it is not ours
            raise RunError(f"--tracker {module.__name__}: {error}") from error

    @staticmethod
    def _id_in(output_dir: Path) -> str:
        """Return the id of the run, drawn once and kept in its folder, so that another run there has its own."""
        kept = output_dir / TRACKER_ID
        with suppress(OSError), open_regular(kept) as file:
            known = file.read(100).strip()
            if re.fullmatch(rb"[0-9a-f]{6}", known):
                return known.decode()
        write_text(kept, secrets.token_hex(3))
        return Tracker._id_in(output_dir)

    @staticmethod
    def forget(output_dir: Path) -> None:
        """Let the next process in the folder begin a run of its own."""
        (output_dir / TRACKER_ID).unlink(missing_ok=True)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.module.log({name: value}, step=step)

    def add_image(self, name: str, pixels: np.ndarray, step: int, dataformats: str = "HWC") -> None:
        self.module.log({name: self.module.Image(pixels)}, step=step)

    def flush(self) -> None:
        """They send in the background, and the rest when the process ends."""


class RunLog(ScreenLog):
    """What rank 0 shows and keeps: log.txt (one JSON object a line, as MAE's tools read it), curves and images.

    Args:
        output_dir: where log.txt grows; it is appended to.
        log_dir: where the TensorBoard files go, once there are values.
        tracker: what takes curves and images instead of TensorBoard.
    """

    show = staticmethod(show_if_possible)

    def __init__(self, output_dir: Path, log_dir: Path, tracker: ModuleType | None = None) -> None:
        self.path, self.log_dir, self.tracker = output_dir / "log.txt", log_dir, tracker
        self.complained = False
        self.first_step: int | None = None  # of this process, in curves

    @cached_property
    def writer(self) -> SummaryWriter | Tracker:
        if self.tracker is not None:
            return Tracker(self.tracker, self.path.parent)
        return SummaryWriter(log_dir=str(self.log_dir), purge_step=self.first_step)

    def start_at(self, epoch: int, step: int) -> None:
        """Take back what is logged of the epochs and steps that follow: each is shown once. The first call counts.

        Lines of log.txt move to log.replaced.txt. TensorBoard leaves the points out when it reads its files. A tracker
        can take nothing back: where whole epochs are repeated, a new run begins there.

        Args:
            epoch: the one under way.
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
            with open_lock(aside) as file:  # never through a link
                file.buffer.seek(0, os.SEEK_END)
                file.buffer.writelines(replaced)
            with replacing(self.path) as temporary:
                temporary.write_bytes(b"".join(compress(lines, map(not_, is_replaced))))
            self.say(f"{self.path}: {len(replaced)} epochs from {epoch} on are logged anew; their lines are in {aside}")
            if self.tracker is not None:
                Tracker.forget(self.path.parent)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be logged, on a full disk for example, does not end a run: it is said, once."""
        # a tracker fails in its own ways
        failures = (OSError,) if self.tracker is None else (Exception,)
        try:
            yield
        except RunError:  # it could not start
            raise
        except failures as error:
            if not self.complained:
                self.say(f"the log cannot be written: {error}; training goes on without it")
            self.complained = True

    def scalars(self, step: int, **values: float) -> None:
        """Add one point to each curve."""
        with self._writing():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def images(self, epoch: int, **images: np.ndarray) -> None:
        """Show images, (h, w, 3) uint8 each, as they are after an epoch."""
        with self._writing():
            for name, pixels in images.items():
                self.writer.add_image(name, pixels, 1000 * (epoch + 1), dataformats="HWC")
            self.writer.flush()  # those of the last epoch would be lost: a thread writes them that ends with Python

    def epoch(self, **values: float) -> None:
        """Append one line to log.txt, and a point to the curve of each evaluated value."""
        evaluated = {name: value for name, value in values.items() if "test_" in name}
        self.scalars(1000 * (values["epoch"] + 1), **evaluated)
        with self._writing():
            if self.path.exists():
                open_regular(self.path).close()  # a pipe that nobody reads would stop the run
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read(1) == b"\n" else b"\n")  # a crash has left half a line
                file.write(to_json(values).encode() + b"\n")
            self.writer.flush()


def _epoch_of(line: bytes) -> int | None:
    """Return the epoch that a line of log.txt is of; None for half a line."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return epoch if type(epoch) is int else None


class SilentLog:
    """Takes every call of a log and says nothing: the log of the other ranks."""

    def progress(self, title: str, steps: int, done: int = 0) -> "SilentLog":
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def open_log(*folders: Path, tracker: str = "tensorboard") -> ScreenLog | SilentLog:
    """The log of this rank: a `RunLog` for the two folders given, a `ScreenLog` without them, silent beyond rank 0.

    Raises:
        UserError: the tracker is not installed.
    """
    try:
        module = None if tracker == "tensorboard" else importlib.import_module(tracker)
    except ImportError as error:
        raise UserError(f"--tracker {tracker}: it is not installed: pip install {tracker}") from error
    if not is_main():
        return SilentLog()
    return RunLog(*folders, module) if folders else ScreenLog()


def clock(start: float, done: int, total: int) -> str:
    """Time since `start` (of `time.monotonic`) and what is left of `total` epochs after `done` of them."""
    seconds = time.monotonic() - start
    left = datetime.timedelta(seconds=round(seconds / done * (total - done)))
    return f"{seconds:.0f} s since the start, {left} left"
