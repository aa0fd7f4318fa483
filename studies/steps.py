"""Runs of the training scripts: each has its own folder, runs once, and resumes after any interruption."""

import argparse
import hashlib
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeGuard

from filelock import AcquireReturnProxy, FileLock, Timeout

from studies.study import Flags, command_text
from tools import plot_log
from util import arguments, hardware, launch
from util.distributed.signals import StopRequest
from util.errors import INTERRUPTED, Interrupted, RunError, UserError, as_user_error
from util.files import open_lock, read_json, replacing, write_json
from util.lock import in_use

SCRIPTS = {"pretrain": "main_pretrain.py", "finetune": "Finetuning/main_finetune.py"}


@dataclass(frozen=True)
class Machine:
    """How runs share this machine.

    Attributes:
        processes: of each run.
        jobs: runs at a time.
        gpus: values for CUDA_VISIBLE_DEVICES; empty on a machine without GPUs.
    """

    processes: int
    jobs: int
    gpus: tuple[str, ...] = ()

    @property
    def cores(self) -> int:
        """Cores of each process."""
        return max(1, hardware.available_cores() // (self.jobs * self.processes))

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment variables of the run in a slot: its threads, and one GPU for each of its processes."""
        found = {"OMP_NUM_THREADS": str(self.cores)}
        if self.gpus:
            first = slot % (len(self.gpus) // self.processes) * self.processes
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + self.processes])
        return found

    def describe(self) -> dict[str, str | int]:
        """Return date, versions, hardware, and how runs share it."""
        about = hardware.describe(hardware.default_device()) | {"cores": hardware.available_cores()}
        return about | {"threads": self.cores, "processes": self.processes, "jobs": self.jobs}


class Step:
    """One run of a script. Studies and arms that ask for the same run share its folder.

    Args:
        kind: key of `SCRIPTS`.
        seed: of the run.
        flags: all flags that change the result; `--batch_size` is the effective one, over all processes.
        runs: folder of all runs.
        after: the pretraining that a finetuning starts from.
    """

    def __init__(self, kind: str, seed: int, flags: Flags, runs: Path, after: "Step | None" = None) -> None:
        start = {"--finetune": [f"{after.folder}/checkpoint-last.pth"]} if after else {}
        self.kind, self.after, self.flags = kind, after, {**flags, "--seed": [str(seed)], **start}
        text = f"{kind} {command_text(self.flags)}".replace(f"{runs.parent}/", "")  # the folder can be moved
        self.name = f"{kind}-seed{seed}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:8]}"
        self.folder: Path = runs / self.name

    @property
    def batch_size(self) -> int:
        """The effective batch size; raises UserError if the flag is not a number of images."""
        text = (self.flags["--batch_size"] or [""])[-1]
        try:
            return int(arguments.batch(text))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"--batch_size {text} is no number of images") from error

    def arguments(self, machine: Machine) -> str:
        """Return the arguments of the script on a machine."""
        images, workers = self.batch_size // machine.processes, min(10, machine.cores)
        here = {"--batch_size": images, "--num_workers": workers, "--output_dir": self.folder, "--resume": "auto"}
        return command_text({**self.flags, **{name: [str(value)] for name, value in here.items()}})

    def command(self, machine: Machine) -> str:
        """Return the command, as a user would type it in the repository."""
        return launch.command_line(SCRIPTS[self.kind], self.arguments(machine), machine.processes)

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json: `finished`, and `attempts` with commands, commits, machines and times.

        Raises:
            UserError: the file holds something else.
        """
        path = self.path("run.json")
        if not os.path.lexists(path):
            return {"finished": False, "attempts": []}
        record = read_json(path)
        if not _is_record(record):
            raise UserError(f"{path} is no record of a run: remove it, and the run resumes from its checkpoints")
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Write run.json atomically."""
        write_json(self.path("run.json"), record)

    def path(self, name: str) -> Path:
        """Return the path of a file of this run."""
        return launch.ROOT / self.folder / name

    @property
    def finished(self) -> bool:
        """Whether the run has finished; raises UserError like `record`."""
        return self.record["finished"]

    def result(self) -> dict[str, Any]:
        """Return loss, throughput and times of a finished run; of finetuning also the last epoch's accuracy and loss.

        Raises:
            RunError: log.txt lacks an epoch or a value.
        """
        attempts, rows = self.record["attempts"], plot_log.read(self.path("log.txt"))
        epochs = int(self.flags["--epochs"][0])
        if [row["epoch"] for row in rows] != list(range(epochs)):
            raise RunError(f"{self.folder}/log.txt does not hold the {epochs} epochs: remove the folder and repeat")
        logged = ["train_loss", *(("test_acc1", "test_loss", "test_images") if self.kind == "finetune" else ())]
        for row in rows:
            for name in (*logged, "images_per_second"):
                if not _is_number(row.get(name)):
                    raise RunError(f"{self.folder}/log.txt has no {name} of epoch {row['epoch']}: remove the folder")
        speeds = sorted(row["images_per_second"] for row in rows)
        return {
            "run": self.name,
            **{name: rows[-1][name] for name in logged},
            "images_per_second": round(speeds[len(speeds) // 2], 1),
            "seconds": round(sum(attempt["end"] - attempt["start"] for attempt in attempts), 1),
            "attempts": len(attempts),
            "command": attempts[-1]["command"],
            "commit": attempts[-1]["commit"],
            # earlier versions did not record the machine
            "machines": [attempt["machine"] for attempt in attempts if "machine" in attempt],
            "curve": [row["test_acc1"] for row in rows if "test_acc1" in row],
        }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_record(content: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether the content of run.json is a `Step.record`; only a run that has not finished can lack an end."""
    try:
        finished, attempts = content["finished"], content["attempts"]
        return (
            isinstance(finished, bool)
            and isinstance(attempts, list)
            and len(attempts) >= finished
            and all(
                isinstance(attempt["command"], str)
                and isinstance(attempt["commit"], (str, type(None)))
                and isinstance(attempt.get("machine", {}), dict)
                and _is_number(attempt["start"])
                and (_is_number(attempt["end"]) or (attempt["end"] is None and not finished))
                for attempt in attempts
            )
        )
    except (TypeError, KeyError):  # a list, or a field is missing
        return False


def acquire(path: Path, blocking: bool = True) -> AcquireReturnProxy:
    """Acquire a lock file, whose folder is made where it is missing; `with` releases it.

    Raises:
        Timeout: another process has it, and `blocking` is false.
        UserError: the file cannot be written, or is a link or no regular file.
    """
    with as_user_error(OSError):  # its message names the file
        path.parent.mkdir(parents=True, exist_ok=True)
        open_lock(path).close()
    return FileLock(path).acquire(blocking=blocking)


def run_steps(steps: list[Step], machine: Machine, commit: str | None) -> None:
    """Run the steps that are not finished, `machine.jobs` at a time; on any end, stop those that still run.

    Raises:
        UserError: a file of a run is damaged, or is a link or no regular file.
        RunError: a run failed.
        Interrupted: this process, or one of the runs, was asked to stop.
    """
    waiting = [step for step in steps if not step.finished]
    print(f"{len(steps)} runs, {len(steps) - len(waiting)} of them finished; {machine.jobs} at a time", flush=True)
    taking, failed = threading.Lock(), threading.Event()

    def stopping() -> bool:
        return stop.asked or failed.is_set()

    def work(slot: int) -> None:
        try:
            while waiting and not stopping():
                with taking:
                    taken = _take(waiting)
                if taken is None:  # what waits needs a pretraining that still runs, or another runner has it
                    failed.wait(0.1)
                    continue
                step, lock = taken
                with lock:
                    _run(step, machine, slot, commit, stopping)
        except BaseException:
            failed.set()
            raise

    with StopRequest() as stop, ThreadPoolExecutor(machine.jobs) as pool:
        list(pool.map(work, range(min(machine.jobs, len(waiting)))))  # raises what a worker raised
        if stop.asked:
            raise Interrupted("stopped; the same command resumes")


def _take(waiting: list[Step]) -> tuple[Step, AcquireReturnProxy] | None:
    """Remove the first step that can start from the list; return it with its lock, or None."""
    for step in list(waiting):
        if step.after is not None and not step.after.finished:
            continue
        try:
            lock = acquire(step.path("runner.lock"), blocking=False)
        except Timeout:  # another runner has it
            continue
        if not in_use(step.path("")):  # by a run that writes its checkpoint because its runner was killed
            waiting.remove(step)
            if not step.finished:  # by another runner in the meantime
                return step, lock
        lock.lock.release()
    return None


def _run(step: Step, machine: Machine, slot: int, commit: str | None, stopping: Callable[[], bool]) -> None:
    """Run a step and record how it ended; ask it to stop once `stopping()`.

    Raises:
        UserError: output.txt is a link or no regular file.
        RunError: the run failed; the message ends with its last output.
        Interrupted: someone else asked the run to stop.
    """
    command, output = step.command(machine), step.path("output.txt")
    with as_user_error(OSError):
        printed = open_lock(output)
    with printed, output.open("a") as file:
        attempts = _begin(step, {"command": command, "commit": commit, "machine": machine.describe()})
        printed.seek(0, os.SEEK_END)
        process = launch.start(
            command, machine.environment(slot), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            _show_epochs(step.name, process, printed, stopping)
        finally:
            process.terminate()  # does nothing if it has ended
            status = process.wait()
    attempts[-1]["end"] = time.time()
    step.write({"finished": status == 0, "attempts": attempts})
    if status == 0:
        _say(f"{step.name}: finished")
    elif not stopping():
        if status == INTERRUPTED:
            raise Interrupted(f"{step.name} was asked to stop; the same command resumes")
        said = "\n".join(output.read_text(errors="replace").splitlines()[-30:])
        raise RunError(f"{step.name} failed with exit status {status}; {step.folder}/output.txt:\n{said}")


def _begin(step: Step, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Record the start of an attempt, write command.txt, and return all attempts of a step."""
    attempts, output = step.record["attempts"], step.path("output.txt").stat()
    if attempts and attempts[-1]["end"] is None:  # killed with its runner, after its last output, if any
        attempts[-1]["end"] = max(attempts[-1]["start"], output.st_mtime if output.st_size else 0)
    _say(f"{step.name}: $ {about['command']}")
    attempts.append({**about, "start": time.time(), "end": None})
    step.write({"finished": False, "attempts": attempts})
    with as_user_error(OSError), replacing(step.path("command.txt")) as temporary:
        temporary.write_bytes(os.fsencode(about["command"]) + b"\n")
    return attempts


def _show_epochs(name: str, process: subprocess.Popen, printed: TextIO, stopping: Callable[[], bool]) -> None:
    """Show the lines about epochs that a process prints, until it has ended or `stopping()`."""
    ended, rest = False, ""
    while not ended:
        time.sleep(0.1)
        ended = process.poll() is not None or stopping()
        *lines, rest = (rest + printed.read()).split("\n")
        for line in lines:
            if line.startswith("epoch ") and "since the start" in line:
                _say(f"{name}: {line}")


def _say(line: str) -> None:
    print(line + "\n", end="", flush=True)  # in one piece, as other threads print, too
