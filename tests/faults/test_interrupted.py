"""Runs that are told to stop, or killed, resume bit for bit as if they had not been interrupted."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from fault_helpers import FINETUNE, PRETRAIN, assert_same_end, written
from helpers import read_log

from util.checkpoints import checkpoint_file
from util.errors import INTERRUPTED
from util.training import resume

COMMANDS = {"pretrain": PRETRAIN, "finetune": FINETUNE}


def log_of(folder):
    """The last line of every epoch."""
    return {row["epoch"]: row for row in read_log(folder)}


@pytest.fixture(scope="module", params=["pretrain", "finetune"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def whole(kind, finished):
    """The run that nothing happens to."""
    return finished(COMMANDS[kind], "--batch_size", 4)


def test_a_run_that_is_told_to_stop(kind, whole, start, tmp_path):
    """SIGTERM in the middle of an epoch, SIGUSR1 after resuming, then to the end."""
    out = tmp_path / "out"
    argv = [COMMANDS[kind], "--batch_size", 4, "--output_dir", out, "--resume", "auto"]
    places = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        begun = written(out / "checkpoint-last.pth")
        running = start(*argv, "--save_every_steps", 1)
        running.until(lambda begun=begun: written(out / "checkpoint-last.pth") > begun)
        assert running.signal(number).status() == INTERRUPTED, running.text
        assert f"{number.name}: the run stops after this update and writes a checkpoint" in running.text
        places.append(resume.position(checkpoint_file.read(out / "checkpoint-last.pth")))
        assert f"stopped in epoch {places[-1][0]} after {places[-1][1]} images" in running.text
    assert any(samples % 48 for _, samples in places), places  # in the middle of an epoch
    assert places[0] < places[1] < (3, 0)
    assert start(*argv).status() == 0
    assert_same_end(out, whole)
    assert log_of(out) == log_of(whole)
    again = start(*argv)
    assert again.status() == 0
    assert "3 epochs, all of them done" in again.text


def test_a_run_that_is_killed(kind, whole, start, tmp_path):
    """SIGKILL three times at random moments: steps since the last checkpoint are repeated."""
    out = tmp_path / "out"
    argv = [COMMANDS[kind], "--batch_size", 4, "--output_dir", out, "--resume", "auto", "--save_every_steps", 2]
    for delay in (0.0, 0.13, 0.31):
        running = start(*argv)
        running.until(lambda running=running: written(out / "checkpoint-last.pth") and "accumulated x" in running.text)
        time.sleep(delay)
        assert running.signal(signal.SIGKILL).status() == -signal.SIGKILL
    running = start(*argv)
    assert running.status() == 0
    assert re.search(r"process \d+ on \S+ since .* ended without releasing", running.text)
    assert_same_end(out, whole)
    assert log_of(out) == log_of(whole)


def test_two_processes(start, tmp_path):
    """One of two gets the signal, both stop at the same update; then a rank is killed, and torchrun starts again."""
    common = [FINETUNE, "--batch_size", 4]
    assert start(*common, "--output_dir", tmp_path / "whole", processes=2).status() == 0
    out = tmp_path / "out"
    argv = [*common, "--output_dir", out, "--resume", "auto", "--save_every_steps", 1]
    running = start(*argv, processes=2)
    running.until((out / "checkpoint-last.pth").exists)
    os.kill(running.ranks()[1], signal.SIGTERM)
    assert running.status() == 1  # torchrun's own, whatever its processes return
    assert "main_finetune.py: stopped" in running.text  # in an epoch, or in the evaluation after it
    begun = written(out / "checkpoint-last.pth")

    running = start(*argv, processes=2, restarts=2)
    running.until(lambda: written(out / "checkpoint-last.pth") > begun)
    os.kill(running.ranks()[1], signal.SIGKILL)
    assert running.status() == 0, running.text
    assert running.text.count("resuming from") == 2
    assert_same_end(out, tmp_path / "whole")


def test_another_number_of_processes(start, finished, tmp_path):
    """1, then 2, then 1: the same images in the same order of updates; sums over processes round differently."""
    whole, out = finished(PRETRAIN, "--batch_size", 4), tmp_path / "out"
    for processes, stops in ((1, True), (2, True), (1, False)):
        begun = written(out / "checkpoint-last.pth")
        argv = ["--output_dir", out, "--resume", "auto", "--batch_size", 4 // processes, "--save_every_steps", 1]
        running = start(PRETRAIN, *argv, processes=processes)
        if not stops:
            assert running.status() == 0, running.text
            continue
        running.until(lambda begun=begun: written(out / "checkpoint-last.pth") > begun)
        assert running.signal(signal.SIGTERM).status() in (INTERRUPTED, 1)
        assert "stopped in epoch" in running.text
    got, want = (checkpoint_file.read(path / "checkpoint-last.pth")["model"] for path in (out, whole))
    for name, value in want.items():
        assert (got[name] - value).nan_to_num().abs().max() < 2e-4, name  # of weights that moved by up to 2e-2
    for epoch, row in log_of(whole).items():
        assert log_of(out)[epoch]["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(start, tmp_path):
    """With --deterministic, bit for bit."""
    out = tmp_path / "out"
    argv = [FINETUNE, "--batch_size", 4, "--device", "cuda", "--deterministic"]
    assert start(*argv, "--output_dir", tmp_path / "whole").status(300) == 0
    running = start(*argv, "--output_dir", out, "--resume", "auto", "--save_every_steps", 1)
    running.until(lambda: written(out / "checkpoint-last.pth"), 300)
    assert running.signal(signal.SIGTERM).status(60) == INTERRUPTED, running.text
    assert start(*argv, "--output_dir", out, "--resume", "auto").status(300) == 0
    assert_same_end(out, tmp_path / "whole")


def test_a_second_signal_leaves_at_once(start, tmp_path):
    """Where the first cannot be followed: here, because loading hangs."""
    argv = ["--epochs", 10**6, "--batch_size", 8, "--vis_freq", 0, "--num_workers", 1, "--output_dir", tmp_path / "out"]
    running = start(PRETRAIN, *argv)
    running.until(lambda: "epoch 1:" in running.text)
    process = running.process.pid
    workers = [int(child) for child in (Path("/proc") / f"{process}/task/{process}/children").read_text().split()]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    time.sleep(1)
    running.signal(signal.SIGTERM).until(lambda: "SIGTERM: the run stops" in running.text)
    running.signal(signal.SIGTERM)  # torchrun and Slurm repeat themselves
    time.sleep(2.5)
    assert running.process.poll() is None
    assert running.signal(signal.SIGTERM).status(10) == 128 + signal.SIGTERM
    assert "SIGTERM again: the process ends at once" in running.text
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
