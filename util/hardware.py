"""Tell what the hardware is; for benchmarks and studies, time a call and write results."""

import ctypes
import datetime
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from util.errors import RunError
from util.files import json_with, output_file, printable, write_json

T = TypeVar("T")
WIDTH = 40  # characters of the column of titles
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def cpu_model() -> str:
    """Return the name of the CPU."""
    text = ""
    with suppress(OSError):  # macOS has no such file
        text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name.*?:[ \t]*(.*)", text, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def available_cores() -> int:
    """Return how many cores this process may use; where the system does not tell (macOS), those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory(largest: int = 2**30) -> None:
    """Let glibc keep the memory that a training step frees, for the next step.

    By default it returns large blocks to the system, which hands them out again page by page, filled with zeros. Other
    allocators, other systems, and the user's settings (MALLOC_ variables, GLIBC_TUNABLES) stay as they are.

    Args:
        largest: bytes; larger blocks go back to the system, and so does what is free at the end, above twice as much.
    """
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        # older versions refuse more than 32 MB; the second call alone would freeze the small default of the first
        if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, largest) or mallopt(_M_MMAP_THRESHOLD, 2**25)):
            mallopt(_M_TRIM_THRESHOLD, 2 * largest - 1)


def describe(device: torch.device) -> dict[str, str | int]:
    """Return date, versions and hardware of this run."""
    machine: dict[str, str | int] = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    machine |= {"cpu": cpu_model(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        import triton

        machine |= {"triton": triton.__version__, "gpu": torch.cuda.get_device_name(device)}
    return machine


def default_device() -> torch.device:
    """Return the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def result_file(kind: str, machine: dict, given: str | Path | None = None) -> Path:
    """Return the path of a report: `given`, or `results/<gpu or cpu>-<date>-<kind>.json`.

    Raises UserError if the file cannot be written, or is there and no report.
    """
    name = re.sub(r"[^a-z0-9]+", "-", str(machine.get("gpu", "cpu")).lower()).strip("-")
    path = RESULTS / f"{name}-{machine['date']}-{kind}.json" if given is None else Path(given)
    return output_file(path, json_with(date=str, torch=str, cpu=str, threads=int))


def write(path: Path, report: dict, quiet: bool = False) -> None:
    """Write a report as JSON and, unless `quiet`, print its path; raise RunError if it cannot be written."""
    try:
        write_json(path, report)
    except OSError as error:
        raise RunError(f"--output {printable(path)} cannot be written: {error.strerror}") from error
    if not quiet:
        print(f"\nwritten to {printable(path)}")


def failure(error: Exception) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def answers(device: torch.device) -> bool:
    """Return whether this process can still use the device: after an illegal memory access no kernel runs any more."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


class Report:
    """The report of a benchmark. Its file is written after every row, so that a benchmark that ends early loses none.

    The file is `output`, or the one that `result_file` chooses by `kind`; `rows` are its "results".

    Raises:
        UserError: see `result_file`.
    """

    def __init__(self, kind: str, device: torch.device, output: str | Path | None, **settings: object) -> None:
        about = describe(device)
        self.path, self.device = result_file(kind, about, output), device
        self.rows: list[dict] = []
        self.content = {**about, **settings, "results": self.rows}
        self.problems: list[str] = []
        self.lost = ""
        print(", ".join(f"{key} {value}" for key, value in about.items()))

    def add(self, title: str, row: dict, work: Callable[[], dict] | str) -> dict | None:
        """Measure a row; if that fails, note it and let the benchmark continue.

        Args:
            title: of the row.
            row: its labels and settings.
            work: measures, and returns numbers for the row, or a reason as "left_out" or "wrong"; or is such a reason.

        Returns:
            The row; None where there are no numbers, which is printed and noted in the row.
        """
        self.rows.append(row)
        if self.lost or isinstance(work, str):
            row["left_out"] = self.lost or work
        else:
            try:
                row |= work()
            except Exception as error:  # of one kernel: the others can still be measured
                traceback.print_exc()
                row["failed"] = failure(error)
        problem = row.get("failed") or row.get("wrong")
        if problem:
            self.problems.append(f"{title}: {problem}")
            if not answers(self.device):
                self.lost = f"{title} has lost the GPU"
        self.save()
        for key in ("left_out", "failed", "wrong"):
            if key in row:
                print(f"{title:<{WIDTH}}{key.replace('_', ' ')}: {row[key]}", flush=True)
                return None
        return row

    def save(self) -> None:
        """Write the file; raise RunError if it cannot be written."""
        write(self.path, self.content, quiet=True)

    def close(self) -> None:
        """Write the file and print its path; raise RunError if that fails, or rows have failed or are wrong."""
        write(self.path, self.content)
        if self.problems:
            raise RunError("; ".join(self.problems))


def time_once(function: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds that one call takes, on a GPU by CUDA events, and its result."""
    if device.type != "cuda":
        began = time.perf_counter()
        result = function()
        return time.perf_counter() - began, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host gets ahead: its time is not measured
    start.record()
    result = function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000, result


def time_rounds(
    forms: dict[str, Callable[[], Tensor]],
    backward: Callable[[Tensor], Callable[[], object]],
    device: torch.device,
    rounds: int,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, dict[str, list[float]]]:
    """Time forward and backward passes of several forms of a computation; rounds interleave, as noise varies with time.

    Args:
        forms: forward passes by name.
        backward: result of a forward pass -> its backward pass.
        device: of the computation.
        rounds: that are timed, after three more.
        before: called with the name before each forward pass, outside of the timing.

    Returns:
        By name, microseconds of `forward`, `backward` and `both` in each round.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": [], "both": []} for name in forms}
    for number in range(rounds + 3):
        for name, form in forms.items():
            before(name)
            ahead, y = time_once(form, device)
            back, _ = time_once(backward(y), device)
            if number >= 3:
                for key, seconds in (("forward", ahead), ("backward", back), ("both", ahead + back)):
                    times[name][key].append(1e6 * seconds)
    return times
