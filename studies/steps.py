"""The runs of a study: each in a folder of its own, started at most once at a time, gone on with after any end."""

import argparse
import ctypes
import fcntl
import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from studies.study import Flags, in_words
from tools import plot_log
from util import arguments, hardware, launch
from util.distributed.signals import StopRequest
from util.errors import INTERRUPTED, Interrupted, RunError, UserError, as_user_error
from util.files import open_lock, read_json, replacing, write_json

SCRIPTS = {"pretrain": "main_pretrain.py", "finetune": "Finetuning/main_finetune.py"}
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Machine:
    """How runs are started.

    Attributes:
        processes: of each run.
        jobs: runs side by side.
        gpus: what CUDA_VISIBLE_DEVICES may name; none on CPUs.
    """

    processes: int
    jobs: int
    gpus: tuple[str, ...] = ()

    @property
    def cores(self) -> int:
        """For each process."""
        return max(1, len(os.sched_getaffinity(0)) // (self.jobs * self.processes))

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of the run in a slot: the threads of a process, and the GPUs of the run, one for each process."""
        found = {"OMP_NUM_THREADS": str(self.cores)}
        if self.gpus:
            first = slot % (len(self.gpus) // self.processes) * self.processes
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + self.processes])
        return found

    def describe(self) -> dict[str, str | int]:
        """Date, versions and hardware, and how runs share it."""
        about = hardware.describe(hardware.default_device()) | {"cores": len(os.sched_getaffinity(0))}
        return about | {"threads": self.cores, "processes": self.processes, "jobs": self.jobs}


class Step:
    """One run of a script. Runs that compute the same have the same folder, whatever study or arm asks for them.

    Args:
        kind: key of `SCRIPTS`.
        seed: of the run.
        flags: all that changes the result; `--batch_size` is that of an update.
        runs: folder of all runs.
        after: the pretraining whose weights it starts from.
    """

    def __init__(self, kind: str, seed: int, flags: Flags, runs: Path, after: "Step | None" = None) -> None:
        start = {"--finetune": [f"{after.folder}/checkpoint-last.pth"]} if after else {}
        self.kind, self.after, self.flags = kind, after, {**flags, "--seed": [str(seed)], **start}
        text = f"{kind} {in_words(self.flags)}".replace(f"{runs.parent}/", "")  # wherever the folder is moved to
        self.name = f"{kind}-seed{seed}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:8]}"
        self.folder = runs / self.name

    @property
    def batch_size(self) -> int:
        """Of an update.

        Raises:
            UserError: it is no number of images.
        """
        text = (self.flags["--batch_size"] or [""])[-1]
        try:
            return arguments.batch(text)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"--batch_size {text} is no number of images") from error

    def arguments(self, machine: Machine) -> str:
        """What the script is called with."""
        here = {
            "--batch_size": [str(self.batch_size // machine.processes)],
            "--num_workers": [str(min(10, machine.cores))],
            "--output_dir": [str(self.folder)],
            "--resume": ["auto"],
        }
        return in_words({**self.flags, **here})

    def command(self, machine: Machine) -> str:
        """The command, to be typed in the repository."""
        return launch.command_line(SCRIPTS[self.kind], self.arguments(machine), machine.processes)

    @property
    def record(self) -> dict:
        """Return the content of run.json: `finished`, and `attempts`: commands, commits, machines and times.

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

    def write(self, record: dict) -> None:
        """Write run.json, which is whole at any moment."""
        write_json(self.path("run.json"), record)

    def path(self, name: str) -> Path:
        """A file of this run."""
        return launch.ROOT / self.folder / name

    @property
    def finished(self) -> bool:
        """Whether its result stands."""
        return self.record["finished"]

    def result(self) -> dict:
        """Loss, speed and times of a finished run; of finetuning, accuracy and loss on val after the last epoch.

        Raises:
            RunError: its log has no last epoch.
        """
        record, rows = self.record, plot_log.read(self.path("log.txt"))
        epochs = int(self.flags["--epochs"][0])
        if [row["epoch"] for row in rows] != list(range(epochs)):
            raise RunError(f"{self.folder}/log.txt does not hold the {epochs} epochs: remove the folder and repeat")
        logged = ["train_loss", *(("test_acc1", "test_loss", "test_images") if self.kind == "finetune" else ())]
        for row in rows:
            missing = [name for name in (*logged, "images_per_second") if not _is_number(row.get(name))]
            if missing:
                raise RunError(f"{self.folder}/log.txt has no {missing[0]} of epoch {row['epoch']}: remove the folder")
        speeds = sorted(row["images_per_second"] for row in rows)
        kept = {name: rows[-1][name] for name in logged}
        return {
            "run": self.name,
            **kept,
            "images_per_second": round(speeds[len(speeds) // 2], 1),
            "seconds": round(sum(attempt["end"] - attempt["start"] for attempt in record["attempts"]), 1),
            "attempts": len(record["attempts"]),
            "command": record["attempts"][-1]["command"],
            "commit": record["attempts"][-1]["commit"],
            # attempts of earlier versions do not name theirs
            "machines": [attempt["machine"] for attempt in record["attempts"] if "machine" in attempt],
            "curve": [row["test_acc1"] for row in rows if "test_acc1" in row],
        }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_record(content: object) -> bool:
    """Return whether what run.json holds has the form of `Step.record`; that of a finished run has ended."""
    if not isinstance(content, dict) or not isinstance(content.get("finished"), bool):
        return False
    attempts, finished = content.get("attempts"), content["finished"]
    return (
        isinstance(attempts, list)
        and (bool(attempts) or not finished)
        and all(
            isinstance(attempt, dict)
            and isinstance(attempt.get("command"), str)
            and isinstance(attempt.get("commit"), (str, type(None)))
            and isinstance(attempt.get("machine", {}), dict)
            and _is_number(attempt.get("start"))
            and (_is_number(attempt.get("end")) or ("end" in attempt and attempt["end"] is None and not finished))
            for attempt in attempts
        )
    )


class Job:
    """A step under way: its process, and the lock that other runners and what is left of dead ones respect.

    The lock is passed on to the process, so that it lasts as long as that one lives, and not the runner alone.
    """

    def __init__(self, step: Step, lock: TextIO, machine: Machine, slot: int, commit: str | None) -> None:
        self.step, self.lock = step, lock
        output, self.attempts = step.path("output.txt"), step.record["attempts"]
        if os.path.lexists(output) and (output.is_symlink() or not output.is_file()):
            raise UserError(f"{output} is no regular file: remove it")
        if self.attempts and self.attempts[-1]["end"] is None:  # killed with its runner, after its last word, if any
            start, said = self.attempts[-1]["start"], output.stat().st_mtime if output.exists() else 0
            self.attempts[-1]["end"] = max(start, said)
        command, about = step.command(machine), {"commit": commit, "machine": machine.describe()}
        print(f"{step.name}: $ {command}", flush=True)
        self.attempts.append({"command": command, **about, "start": time.time(), "end": None})
        step.write({"finished": False, "attempts": self.attempts})
        with as_user_error(OSError), replacing(step.path("command.txt")) as temporary:
            temporary.write_bytes(os.fsencode(command) + b"\n")
        self.shown = output.stat().st_size if output.exists() else 0
        with output.open("a") as file:
            self.process = launch.start(
                command,
                machine.environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.fileno(),),
                preexec_fn=_end_with_runner,
            )

    def new_epochs(self) -> list[str]:
        """The lines about epochs that have been printed since the last call."""
        with self.step.path("output.txt").open("rb") as file:
            file.seek(self.shown)
            printed = file.read()
        whole = printed[: printed.rfind(b"\n") + 1]
        self.shown += len(whole)
        lines = whole.decode(errors="replace").splitlines()
        return [line for line in lines if line.startswith("epoch ") and "since the start" in line]

    def end(self) -> None:
        """Note how the process ended.

        Raises:
            RunError: it failed; the message ends with what it printed last.
            Interrupted: it was asked to stop.
        """
        status = self.process.wait()
        self.attempts[-1]["end"] = time.time()
        self.step.write({"finished": status == 0, "attempts": self.attempts})
        self.lock.close()
        if status == INTERRUPTED:
            raise Interrupted(f"{self.step.name} was asked to stop; the same command goes on")
        if status:
            last = self.step.path("output.txt").read_text(errors="replace").splitlines()[-30:]
            said = "\n".join(last)
            raise RunError(f"{self.step.name} failed with exit status {status}; {self.step.folder}/output.txt:\n{said}")

    def stop(self) -> None:
        """Ask the process to stop."""
        if self.process.poll() is None:
            self.process.terminate()


def _end_with_runner() -> None:
    """Ask this process to stop when the runner dies, even if that is killed."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_steps(steps: list[Step], machine: Machine, commit: str | None) -> None:
    """Run what is not finished yet, as many at a time as the machine takes; on any end, ask those under way to stop.

    Raises:
        RunError: a run failed.
        Interrupted: this process, or one of the runs, was asked to stop.
    """
    waiting = [step for step in steps if not step.finished]
    print(f"{len(steps)} runs, {len(steps) - len(waiting)} of them finished; {machine.jobs} at a time", flush=True)
    jobs: dict[int, Job] = {}
    with StopRequest() as stop:
        try:
            while waiting or jobs:
                if stop.asked:
                    raise Interrupted("stopped; the same command goes on")
                for slot, job in list(jobs.items()):
                    ended = job.process.poll() is not None
                    for line in job.new_epochs():
                        print(f"{job.step.name}: {line}", flush=True)
                    if ended:
                        del jobs[slot]
                        job.end()
                        print(f"{job.step.name}: finished", flush=True)
                for slot in set(range(machine.jobs)) - jobs.keys():
                    job = _start_next(waiting, machine, slot, commit)
                    if job is not None:
                        jobs[slot] = job
                time.sleep(0.1)
        finally:
            for job in jobs.values():
                job.stop()
            for job in jobs.values():
                job.process.wait()
                job.lock.close()


def _start_next(waiting: list[Step], machine: Machine, slot: int, commit: str | None) -> Job | None:
    """Start the first step whose pretraining is finished and that no other runner has, and take it off the list."""
    for step in list(waiting):
        if step.after is not None and not step.after.finished:
            continue
        with as_user_error(OSError):  # its message names the file
            step.path("").mkdir(parents=True, exist_ok=True)
            lock = open_lock(step.path("runner.lock"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another runner has it, or what a killed one left is still writing its checkpoint
            lock.close()
            continue
        waiting.remove(step)
        if step.finished:  # by another runner meanwhile
            lock.close()
            continue
        return Job(step, lock, machine, slot, commit)
    return None
