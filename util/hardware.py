"""What benchmarks and studies share: the machine's name, times of a step, and the file of results."""

import datetime
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from util.errors import RunError
from util.files import json_with, output_file, printable, write_json

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def cpu_model() -> str:
    """Name the CPU."""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, str | int]:
    """Date, versions and hardware of this run."""
    machine = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    machine |= {"cpu": cpu_model(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        import triton

        machine |= {"triton": triton.__version__, "gpu": torch.cuda.get_device_name(device)}
    return machine


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def result_file(kind: str, machine: dict, given: str | Path | None = None) -> Path:
    """Return where a report goes: `given`, else `results/<gpu or cpu>-<date>-<kind>.json`.

    Raises:
        UserError: it cannot be written there, or a file is there that is no report.
    """
    name = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", "cpu").lower()).strip("-")
    path = RESULTS / f"{name}-{machine['date']}-{kind}.json" if given is None else Path(given)
    return output_file(path, json_with(date=str, torch=str, cpu=str, threads=int))


def write(path: Path, report: dict, quiet: bool = False) -> None:
    """Write a report as JSON and, unless `quiet`, say where.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        write_json(path, report)
    except OSError as error:
        raise RunError(f"--output {printable(path)} cannot be written: {error.strerror}") from error
    if not quiet:
        print(f"\nwritten to {printable(path)}")


def failure(error: Exception) -> str:
    """Return what went wrong in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def answers(device: torch.device) -> bool:
    """Return whether this process can still use the device: after a kernel's invalid access no other kernel runs."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def time_once(function: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Seconds that one call takes on the device, by CUDA events there, and its result."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = function()
        return time.perf_counter() - start, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host gets ahead: its own time does not count
    start.record()
    result = function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000, result
