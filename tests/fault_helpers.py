"""Real processes that something happens to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from fork_server import ForkedScript
from helpers import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN

from util.checkpoints import checkpoint_file

LENGTH = "--epochs 3 --warmup_epochs 1 --lr 1e-3 --num_workers 1 --save_freq 2".split()


PRETRAIN = ["main_pretrain.py", *TINY_PRETRAIN, "--norm_pix_loss", *LENGTH]


# all that is random, and windows of two batches
RANDOM = "--drop_path 0.3 --mixup 0.8 --cutmix 1 --reprob 0.5 --ema_decay 0.9 --accum_iter 2 --dist_eval".split()


FINETUNE = ["Finetuning/main_finetune.py", *TINY_FINETUNE, *LENGTH, *RANDOM]


class Process:
    """A process whose output goes to a file; `how` is for Popen."""

    popen = subprocess.Popen

    def __init__(self, out: Path, *words: object, **how: object) -> None:
        self.out = out
        with out.open("w") as file:
            self.process = self.popen([str(word) for word in words], stdout=file, stderr=subprocess.STDOUT, **how)

    @property
    def text(self) -> str:
        return self.out.read_text()

    def until(self, condition: Callable[[], object], seconds: float = 120) -> "Process":
        """Wait for something; the process must not end before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.005)
        return self

    def signal(self, number: int) -> "Process":
        self.process.send_signal(number)
        return self

    def status(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it hangs: {self.text}") from None

    def kill(self) -> None:
        """End it and all that it has started."""
        for pid in (*descendants(self.process.pid), self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Started(Process):
    """One of our scripts, or several processes of it under torchrun."""

    popen = ForkedScript

    def __init__(self, out: Path, script: str, *argv: object, processes: int = 1, restarts: int = 0) -> None:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
            launcher += ["--max-restarts", restarts]
        super().__init__(out, *launcher, REPOSITORY / script, *argv, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def ranks(self) -> list[int]:
        """The processes that torchrun started, by rank."""
        names = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in children(self.process.pid)}
        return [names[name] for name in sorted(names) if name.startswith("rank ")]


def written(path: Path) -> int:
    """When a file was written, 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    """Children, and theirs, whatever sessions they are in; none of a process that has just ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return [one for child in children(pid) for one in (child, *descendants(child))]
    return []


def assert_same_end(folder: Path, reference: Path) -> None:
    """The last checkpoints of two runs are equal bit for bit: weights, EMA, optimizer, position, best accuracies."""
    got, want = (checkpoint_file.read(path / "checkpoint-last.pth") for path in (folder, reference))
    del got["args"], want["args"]
    assert_equal(got, want, "")


def assert_equal(got: object, want: object, where: str) -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for key, value in want.items():
            assert_equal(got[key], value, f"{where}.{key}")
    elif isinstance(want, torch.Tensor):
        assert torch.equal(got, want), where
    else:
        assert got == want, where


def content(epoch, size=200_000):
    """A file of a megabyte, all of whose numbers say which one it is."""
    return {"model": {"weight": torch.full((size,), float(epoch))}, "epoch": epoch - 1, "samples": 0}


def sums_are_right(folder):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    return done.returncode == 0, done.stdout + done.stderr
