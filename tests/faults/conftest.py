"""Real processes that something happens to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN, noise_images
from util import checkpoint

LENGTH = "--epochs 3 --warmup_epochs 1 --lr 1e-3 --num_workers 1 --save_freq 2".split()
PRETRAIN = ["main_pretrain.py", *TINY_PRETRAIN, "--norm_pix_loss", *LENGTH]
# all that is random, and windows of two batches
RANDOM = "--drop_path 0.3 --mixup 0.8 --cutmix 1 --reprob 0.5 --ema_decay 0.9 --accum_iter 2 --dist_eval".split()
FINETUNE = ["Finetuning/main_finetune.py", *TINY_FINETUNE, *LENGTH, *RANDOM]


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Three classes: 16 images each to train, 7 in all to validate."""
    return noise_images(tmp_path_factory.mktemp("images"), train=16, height=50)


class Started:
    """A process, or several under torchrun, whose output goes to a file."""

    def __init__(self, out: Path, *command: object, processes: int = 1, restarts: int = 0) -> None:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
            launcher += ["--max-restarts", restarts]
        script, *argv = command
        words = [str(word) for word in (*launcher, REPOSITORY / script, *argv)]
        self.out = out
        with out.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)

    @property
    def text(self) -> str:
        return self.out.read_text()

    def until(self, condition: Callable[[], object], seconds: float = 120) -> "Started":
        """Wait for something; the process must not end before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.005)
        return self

    def signal(self, number: int) -> "Started":
        self.process.send_signal(number)
        return self

    def status(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it hangs: {self.text}") from None

    def ranks(self) -> list[int]:
        """The processes that torchrun started, by rank."""
        found = {}
        for pid in children(self.process.pid):
            values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((v for v in values if v.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank.removeprefix(b"RANK="))] = pid
        return [found[rank] for rank in sorted(found)]


def written(path: Path) -> int:
    """When a file was written, 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def start(tmp_path, images):
    """Start a script on the images; what is still running at the end of the test is killed."""
    started = []

    def begin(command: list, *more: object, data: bool = True, **how: int) -> Started:
        words = [*command, *(["--data_path", images] if data else []), *more]
        started.append(Started(tmp_path / f"output-{len(started)}.txt", *words, **how))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            for pid in (*children(one.process.pid), one.process.pid):
                os.kill(pid, signal.SIGKILL)
            one.process.wait()


def assert_same_end(folder: Path, reference: Path) -> None:
    """The last checkpoints of two runs are equal bit for bit: weights, EMA, optimizer, position, best accuracies."""
    got, want = (checkpoint.read(path / "checkpoint-last.pth") for path in (folder, reference))
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
