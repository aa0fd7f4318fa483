"""What a run tells: a live bar on a terminal or plain lines elsewhere, log.txt and TensorBoard."""

import datetime
import json
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.dist import is_main

LOG_EVERY = 20  # steps between two looks at what the device has computed: plain lines, points in TensorBoard


class Progress:
    """One pass over data as rank 0 shows it: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, title: str, steps: int, done: int = 0) -> None:
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
                left = time.strftime("%H:%M:%S", time.gmtime(left))
                text = "  ".join(f"{name} {value}" for name, value in shown.items())
                print(f"{self.title}  [{self.step}/{self.steps}]  {text}  left {left}", flush=True)
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class ScreenLog:
    """What rank 0 shows, without files."""

    def progress(self, title: str, steps: int, done: int = 0) -> Progress:
        return Progress(title, steps, done)

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class RunLog(ScreenLog):
    """What rank 0 shows and keeps: log.txt (one JSON object a line, as MAE's tools read it) and TensorBoard files.

    Args:
        output_dir: where log.txt grows; it is appended to.
        log_dir: where the TensorBoard files go, once there are values.
    """

    def __init__(self, output_dir: Path, log_dir: Path) -> None:
        self.path, self.log_dir = output_dir / "log.txt", log_dir

    @cached_property
    def writer(self) -> SummaryWriter:
        return SummaryWriter(log_dir=str(self.log_dir))

    def scalars(self, step: int, **values: float) -> None:
        """Add one point to each TensorBoard curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def epoch(self, **values: float) -> None:
        """Append one line to log.txt, and a point to the TensorBoard curve of each evaluated value."""
        evaluated = {name: value for name, value in values.items() if "test_" in name}
        self.scalars(1000 * (values["epoch"] + 1), **evaluated)
        self.writer.flush()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


class SilentLog:
    """Takes every call of a log and says nothing: the log of the other ranks."""

    def progress(self, title: str, steps: int, done: int = 0) -> "SilentLog":
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def open_log(*folders: Path) -> ScreenLog | SilentLog:
    """The log of this rank: a `RunLog` for the two folders given, a `ScreenLog` without them, silent beyond rank 0."""
    if not is_main():
        return SilentLog()
    return RunLog(*folders) if folders else ScreenLog()


def clock(start: float, done: int, total: int) -> str:
    """Time since `start` (of `time.monotonic`) and what is left of `total` epochs after `done` of them."""
    seconds = time.monotonic() - start
    left = datetime.timedelta(seconds=round(seconds / done * (total - done)))
    return f"{seconds:.0f} s since the start, {left} left"
