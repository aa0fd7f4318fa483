"""Checkpoint files: killed writers, damage, full and read-only disks, files that would execute something."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from fault_helpers import PRETRAIN, assert_same_end, content, sums_are_right
from fork_server import ForkedScript
from helpers import REPOSITORY

from util.checkpoints import checkpoint_file
from util.checkpoints.checkpoint_folder import CheckpointFolder
from util.errors import RunError, UserError
from util.files import sha256_of
from util.training.run_state import Run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, 3, print)
    for epoch in range(5):
        folder.save(content(epoch), *([f"checkpoint-{epoch}.pth"] if epoch % 2 else []))
        folder.wait()
    last = [f"checkpoint-last{age}.pth" for age in ("", "-1", "-2")]
    assert names(tmp_path) == sorted(["SHA256SUMS", "checkpoint-1.pth", "checkpoint-3.pth", *last])
    assert [checkpoint_file.read(tmp_path / name)["epoch"] for name in last] == [3, 2, 1]
    assert checkpoint_file.read(tmp_path / "checkpoint-3.pth")["epoch"] == 2
    assert sums_are_right(tmp_path) == (True, sums_are_right(tmp_path)[1])
    assert folder.newest() == (tmp_path / "checkpoint-last.pth", [])


def test_what_is_written_is_what_was_saved(tmp_path):
    """Training continues, in the memory that the checkpoint was copied from, while it is written."""
    folder = CheckpointFolder(tmp_path, 2, print)
    weight = torch.zeros(20_000_000)
    for number in range(3):
        weight.fill_(number)
        folder.save({"model": {"weight": weight}, "epoch": number, "samples": 0})
        weight.fill_(99)
    folder.wait()
    assert (checkpoint_file.read(tmp_path / "checkpoint-last.pth")["model"]["weight"] == 2).all()
    assert (checkpoint_file.read(tmp_path / "checkpoint-last-1.pth")["model"]["weight"] == 1).all()


WRITER = """
import os, sys
from pathlib import Path
from fault_helpers import content
from util.checkpoints import checkpoint_file
from util.checkpoints.checkpoint_folder import CheckpointFolder

folder = CheckpointFolder(Path(sys.argv[1]), 2, print)
newest, _ = folder.newest()
begin = 0 if newest is None else checkpoint_file.read(newest)["epoch"] + 2
for epoch in range(begin, 1_000_000):
    folder.save(content(epoch), *([f"checkpoint-{epoch}.pth"] if epoch % 5 == 0 else []))
    folder.wait()
    os.write(1, f"{epoch}\\n".encode())  # whole or not at all, wherever the kill comes
"""


def test_a_writer_killed_at_20_random_moments(tmp_path):
    """Each writer resumes from the files of the one before. Every file loads at every moment and is what its name
    says, and the newest is at least the last that was announced."""
    rng = random.Random(0)
    (tmp_path / "writer.py").write_text(WRITER)
    out = tmp_path / "out"
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}
    command = [sys.executable, str(tmp_path / "writer.py"), str(out)]
    for _ in range(20):
        with ForkedScript(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
            announced = int(writer.stdout.readline())
            time.sleep(rng.uniform(0, 0.15))
            writer.kill()
            for line in writer.stdout:
                announced = int(line)
        assert writer.returncode == -signal.SIGKILL
        found = {}
        for path in out.glob("checkpoint-*.pth"):
            kept = checkpoint_file.read(path)  # by its hash, too
            found[path.name] = kept["epoch"] + 1
            assert (kept["model"]["weight"] == found[path.name]).all()
            number = re.fullmatch(r"checkpoint-(\d+)\.pth", path.name)
            assert number is None or int(number[1]) == found[path.name]
        assert found["checkpoint-last.pth"] >= announced
        assert found.get("checkpoint-last-1.pth", -1) <= found["checkpoint-last.pth"]
        assert CheckpointFolder(out, 2, print).newest() == (out / "checkpoint-last.pth", [])
    assert announced > 20


def test_a_writer_killed_between_two_names(tmp_path, monkeypatch):
    """A file that has its name is never written to again."""
    folder = CheckpointFolder(tmp_path, 2, print)
    folder.save(content(0))
    folder.wait()
    replace = os.replace

    def killed(old, new):
        if Path(new).name == "checkpoint-last.pth":
            raise KeyboardInterrupt  # which nobody catches, like a kill
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder._publish(*written_aside(tmp_path, content(5)), ("checkpoint-5.pth",))
    monkeypatch.undo()
    again = CheckpointFolder(tmp_path, 2, print)
    for epoch in (6, 7):
        again.save(content(epoch))
        again.wait()
        assert checkpoint_file.read(tmp_path / "checkpoint-5.pth")["epoch"] == 4
    assert [checkpoint_file.read(tmp_path / f"checkpoint-last{age}.pth")["epoch"] for age in ("", "-1")] == [6, 5]


def written_aside(folder, data):
    path = folder / ".checkpoint.tmp"
    torch.save(data, path)
    return path, sha256_of(path)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {"truncated": truncate, "a bit": flip_a_bit, "empty": lambda path: path.write_bytes(b"")}


def test_the_newest_file_is_damaged(start, tmp_path):
    """It is named and put aside, and the one before it used: the run ends as if nothing had happened."""
    argv = [PRETRAIN, "--batch_size", 4, "--keep", 3, "--save_every_steps", 4, "--output_dir"]
    assert start(*argv, tmp_path / "whole").status() == 0
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out, copy_function=os.link)
    (out / "log.txt").unlink()
    flip_a_bit(out / "checkpoint-last.pth")
    running = start(*argv, out, "--resume", "auto")
    assert running.status() == 0, running.text
    assert re.search(
        r"checkpoint-last\.pth is damaged, or .* another hash; renamed to \*\.damaged$", running.text, re.M
    )
    assert (out / "checkpoint-last.pth.damaged").exists()
    assert f"resuming from {out}/checkpoint-last-1.pth" in running.text
    flip_a_bit(tmp_path / "whole" / "checkpoint-last.pth")  # the same file: back to what it was
    assert_same_end(out, tmp_path / "whole")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(start, tmp_path, damage):
    folder = CheckpointFolder(tmp_path, 3, print)
    for epoch in range(3):
        folder.save(content(epoch))
    folder.wait()
    DAMAGES[damage](tmp_path / "checkpoint-last.pth")
    newest, (reason,) = folder.newest()
    assert newest == tmp_path / "checkpoint-last-1.pth"
    assert f"{tmp_path}/checkpoint-last.pth" in reason
    assert (tmp_path / "checkpoint-last.pth.damaged").exists()
    for path in tmp_path.glob("checkpoint-*.pth"):
        DAMAGES[damage](path)
    for _ in range(2):  # and a second start does not begin from nothing
        with pytest.raises(UserError, match=f"every checkpoint in {tmp_path} is damaged"):
            folder.newest()
    if damage == "a bit":
        running = start(PRETRAIN, "--batch_size", 4, "--output_dir", tmp_path, "--resume", "auto")
        assert running.status() == 2
        assert f"error: every checkpoint in {tmp_path} is damaged: " in running.text


def test_a_damaged_file_that_was_asked_for(tmp_path):
    folder = CheckpointFolder(tmp_path, 2, print)
    folder.save(content(1))
    folder.wait()
    flip_a_bit(tmp_path / "checkpoint-last.pth")
    with pytest.raises(UserError, match=r"checkpoint-last\.pth is damaged, or not the file that was written"):
        checkpoint_file.read(tmp_path / "checkpoint-last.pth")


def test_two_files_that_changed_places(tmp_path):
    """Each has a hash of its own."""
    folder = CheckpointFolder(tmp_path, 2, print)
    for epoch in range(2):
        folder.save(content(epoch))
    folder.wait()
    (tmp_path / "checkpoint-last.pth").rename(tmp_path / "other")
    (tmp_path / "checkpoint-last-1.pth").rename(tmp_path / "checkpoint-last.pth")
    with pytest.raises(UserError, match="damaged, or not the file"):
        checkpoint_file.read(tmp_path / "checkpoint-last.pth")


def test_what_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
    """An error of the disk or of memory ends the start; no file is renamed, and the next start finds it."""
    folder = CheckpointFolder(tmp_path, 2, print)
    folder.save(content(1))
    folder.wait()
    for error in (
        OSError(5, "Input/output error"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", fails)
        with pytest.raises(UserError, match="unreadable checkpoint"):
            folder.newest()
        monkeypatch.undo()
        assert folder.newest() == (tmp_path / "checkpoint-last.pth", [])


def test_the_newest_is_what_was_written_last(tmp_path):
    """Also where a run went back to an earlier epoch; and a smaller --keep removes what is older."""
    folder = CheckpointFolder(tmp_path, 4, print)
    for epoch in (1, 2, 3, 900):
        folder.save(content(epoch), f"checkpoint-{epoch}.pth")
        folder.wait()
    folder = CheckpointFolder(tmp_path, 2, print)
    folder.save(content(500))
    folder.wait()
    assert folder.newest()[0] == tmp_path / "checkpoint-last.pth"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-last*")) == [
        "checkpoint-last-1.pth",
        "checkpoint-last.pth",
    ]
    (tmp_path / "checkpoint-last.pth").unlink()
    (tmp_path / "checkpoint-last-1.pth").unlink()
    assert folder.newest()[0] == tmp_path / "checkpoint-900.pth"


def test_hashes_that_are_damaged_themselves(tmp_path):
    folder = CheckpointFolder(tmp_path, 2, print)
    folder.save(content(1))
    folder.wait()
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\xfe nothing\n")
    assert CheckpointFolder(tmp_path, 2, print).newest()[0] == tmp_path / "checkpoint-last.pth"


def test_files_of_an_earlier_version_have_no_hashes(tmp_path):
    """They load, and being replaced does not make them look damaged."""
    torch.save(content(3), tmp_path / "checkpoint-last.pth")
    assert CheckpointFolder(tmp_path, 2, print).newest()[0] == tmp_path / "checkpoint-last.pth"
    folder = CheckpointFolder(tmp_path, 2, print)
    folder.save(content(4))
    folder.wait()
    assert [checkpoint_file.read(tmp_path / f"checkpoint-last{age}.pth")["epoch"] for age in ("", "-1")] == [3, 2]
    assert sums_are_right(tmp_path)[0], sums_are_right(tmp_path)[1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system of a given size can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk(small_disk):
    """Training gets a message and continues; the older files stay whole; a later write succeeds once there is room."""
    said = []
    folder = CheckpointFolder(small_disk, 2, said.append)
    for epoch in range(2):
        folder.save(content(epoch))
    filler = small_disk / "filler"
    folder.wait()
    filler.write_bytes(bytes(1_000_000))
    folder.save(content(2))
    folder.wait()
    ((line),) = said
    assert re.match(rf"the checkpoint could not be written to {small_disk}: .*\d+ MB are free.* untouched$", line)
    assert folder.newest() == (small_disk / "checkpoint-last.pth", [])
    assert checkpoint_file.read(small_disk / "checkpoint-last.pth")["epoch"] == 0
    with pytest.raises(RunError, match="could not be written"):
        folder.close()
    filler.unlink()
    folder.save(content(3))
    folder.close()
    assert checkpoint_file.read(small_disk / "checkpoint-last.pth")["epoch"] == 2
    assert not [name for name in names(small_disk) if name.startswith(".")]


@pytest.mark.parametrize("freed", [True, False])
def test_the_best_file_on_a_disk_that_is_full_for_a_while(small_disk, freed):
    """A file with a name of its own is written once more; if that fails too, the end of the run says so."""
    folder = CheckpointFolder(small_disk, 2, lambda line: None)
    folder.save(content(0, 100_000), "checkpoint-best.pth")
    folder.wait()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2_500_000))
    folder.save(content(1, 100_000), "checkpoint-best.pth")
    folder.wait()
    if freed:
        filler.unlink()
    folder.save(content(2, 100_000))
    folder.wait()
    filler.unlink(missing_ok=True)
    assert folder.lost == (set() if freed else {"checkpoint-best.pth"})
    folder.save(content(3, 100_000))
    folder.close()
    assert checkpoint_file.read(small_disk / "checkpoint-last.pth")["epoch"] == 2
    assert checkpoint_file.read(small_disk / "checkpoint-best.pth")["epoch"] == (0 if freed else -1)
    run = Run(Namespace(start_epoch=None), None, None)
    run.folder = folder
    with nullcontext() if freed else pytest.raises(RunError, match=r"^checkpoint-best\.pth could not be written"), run:
        pass
    with run:
        folder.save(content(4, 100_000), "checkpoint-best.pth")
        folder.wait()


def test_a_run_on_a_full_disk(start, small_disk):
    """It trains to its end, says what was not written, and does not end as if all were well."""
    running = start(PRETRAIN, "--batch_size", 4, "--output_dir", small_disk)
    running.until(lambda: "objective arm" in running.text)  # before, the run would be refused
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):  # to the last byte: no log either
            pass
    assert running.status() == 1
    assert "epoch 2: loss" in running.text
    assert running.text.count("the checkpoint could not be written") >= 2
    assert running.text.count("the log cannot be written") == 1
    full = start(PRETRAIN, "--batch_size", 4, "--output_dir", small_disk / "more")
    assert full.status() == 2
    assert "No space left on device" in full.text.splitlines()[-1]


def test_a_read_only_disk(small_disk, start):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    running = start(PRETRAIN, "--batch_size", 4, "--output_dir", small_disk / "out")
    assert running.status() == 2
    assert re.search(r"error: --output_dir \S+ cannot be written: Read-only file system$", running.text.strip())
