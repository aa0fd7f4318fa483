"""Odd files in the folder of a run: files that would execute code, damaged hashes, links, folders and locks."""

import errno
import fcntl
import json
import os
import pickle
import re
import socket
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fault_helpers import FINETUNE, content, sums_are_right

from util.checkpoints import checkpoint_file
from util.checkpoints.checkpoint_folder import CheckpointFolder
from util.errors import UserError
from util.files import sha256_of
from util.lock import is_running, lock_folder


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_file(start, tmp_path, form):
    """The code in the file is not executed: not as --resume, nor --finetune, nor by --resume auto."""
    mark, out = tmp_path / "executed", tmp_path / "out"
    out.mkdir()
    file = out / "checkpoint-last.pth"
    data = {"model": {}, "epoch": 1, "samples": 0, "args": Malicious(mark)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match="refused checkpoint"):
        checkpoint_file.read(file)
    if form == "zip":
        for flags in (["--resume", file], ["--finetune", file], ["--resume", "auto"]):
            folder = out if flags[-1] == "auto" else tmp_path / "other"
            running = start(FINETUNE, "--batch_size", 4, "--output_dir", folder, *flags)
            assert running.status() == 2, running.text
            assert re.search(r"refused checkpoint \S+: it holds a \S*mkdir", running.text)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()  # it would have worked


@pytest.mark.parametrize("kind", ["folder", "link", "fifo", "lines", "others", "long"])
def test_what_is_wrong_with_the_hashes_is_said(tmp_path, caplog, kind):
    """The file is read all the same, and compared with its own CRCs; the next checkpoint writes new hashes."""
    torch.save(content(3), tmp_path / "checkpoint-last.pth")
    sums, other = tmp_path / "SHA256SUMS", tmp_path / "other.txt"
    other.write_text("not to be written\n")
    digest = sha256_of(tmp_path / "checkpoint-last.pth")
    if kind == "folder":
        sums.mkdir()
    elif kind == "link":
        sums.symlink_to(other)
    elif kind == "fifo":
        os.mkfifo(sums)
    elif kind == "long":
        with sums.open("w") as file:
            file.truncate(2**40)  # sparse
    else:
        name = "checkpoint-last.pth" if kind == "lines" else "another.pth"
        sums.write_bytes(b"\xff damaged\n" * (kind == "lines") + f"{digest.upper()} *{name}\n".encode())
    with caplog.at_level("INFO"):
        assert checkpoint_file.read(tmp_path / "checkpoint-last.pth")["epoch"] == 2
    line = {
        "lines": f"{sums} is damaged: 1 of its lines are no hash and name",
        "others": f"{tmp_path}/checkpoint-last.pth is in no SHA256SUMS; its own checksums are right",
        "long": f"{sums} is larger than 16777216 bytes: it is not read",
    }.get(kind, f"{sums} is a link or no regular file: it is not read")
    assert line in caplog.messages
    folder = CheckpointFolder(tmp_path, 2, print)
    folder.save(content(4))
    folder.wait()
    if kind == "folder":
        assert folder.failed
        return
    assert folder.failed is None
    assert sums_are_right(tmp_path) == (True, sums_are_right(tmp_path)[1])
    assert sums.is_file()
    assert not sums.is_symlink()
    assert other.read_text() == "not to be written\n"


@pytest.mark.parametrize("kind", ["fifo", "folder", "zero", "long name", "nul", "not UTF-8"])
def test_what_is_no_file_of_a_checkpoint(tmp_path, kind):
    """One line at once, where opening would block, or never end."""
    path = tmp_path / "c.pth"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    name = {"zero": "/dev/zero", "long name": "x" * 5000, "nul": "a\0b", "not UTF-8": "\udcff.pth"}.get(kind, path)
    with pytest.raises(UserError, match=r"^no checkpoint file") as caught:
        checkpoint_file.read(name)
    assert str(caught.value).isprintable()
    str(caught.value).encode()


def test_odd_files_beside_the_checkpoints(tmp_path):
    """Folders, FIFOs, ages of twelve digits and names that are not UTF-8 are neither read nor in the way."""
    odd = [
        "checkpoint-last-999999999999.pth",
        "checkpoint-last-\u0663.pth",
        "checkpoint-last-01.pth",
        "checkpoint-\udcff.pth",
    ]
    for name in odd:
        (tmp_path / name).write_bytes(b"odd")
    for name in ("checkpoint-x.pth", "checkpoint-last-1.pth", "checkpoint-last-7.pth"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "checkpoint-fifo.pth")
    (tmp_path / "checkpoint-gone.pth").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged") as caught:
        CheckpointFolder(tmp_path, 1, print).newest()
    str(caught.value).encode()
    said = []
    folder = CheckpointFolder(tmp_path, 1, said.append)
    for epoch in range(2):
        folder.save(content(epoch, 100))
        folder.close()
    assert said == []
    assert folder.newest() == (tmp_path / "checkpoint-last.pth", [])
    assert not (tmp_path / odd[0]).exists()  # older than --keep
    assert all((tmp_path / name).exists() for name in odd[1:])


def test_a_large_number_of_checkpoints_to_keep(tmp_path):
    """`--keep` alone allocates nothing."""
    folder = CheckpointFolder(tmp_path, 10**12, print)
    for epoch in range(3):
        folder.save(content(epoch, 100))
    folder.close()
    last = [checkpoint_file.read(tmp_path / f"checkpoint-last{age}.pth")["epoch"] for age in ("", "-1", "-2")]
    assert last == [1, 0, -1]
    assert sums_are_right(tmp_path) == (True, sums_are_right(tmp_path)[1])


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "garbage", "long"])
def test_odd_lock_files(tmp_path, kind):
    """No file is written through a link, and what is in the lock file is not trusted."""
    lock, other = tmp_path / "run.lock", tmp_path / "other.txt"
    other.write_text("not to be written")
    if kind == "link":
        lock.symlink_to(other)
    elif kind == "fifo":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    elif kind == "garbage":
        lock.write_bytes(b'{"pid": "\x1b[2J", "host": [], "since": NaN}\xff')
    else:
        with lock.open("w") as file:
            file.truncate(2**40)
    with nullcontext() if kind in ("garbage", "long") else pytest.raises(UserError, match="--output_dir"):
        assert lock_folder(tmp_path) == ""
        owner = json.loads(lock.read_text())
        assert owner["pid"] == os.getpid()
        assert set(owner) == {"pid", "host", "since"}
    assert other.read_text() == "not to be written"


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    """Only a run on this host is noticed: the process that the file names."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    ended = subprocess.Popen(["true"])
    ended.wait()
    assert [is_running(pid) for pid in (os.getpid(), 1, ended.pid, 0, -1, 10**30)] == [True, True] + [False] * 4
    monkeypatch.setattr(fcntl, "lockf", refuse)
    for pid, running in ((os.getppid(), True), (ended.pid, False)):
        owner = {"host": socket.gethostname(), "pid": pid, "since": "2026-01-01 00:00:00"}
        (tmp_path / "run.lock").write_text(json.dumps(owner))
        with pytest.raises(UserError, match=f"in use by process {pid} on") if running else nullcontext():
            lock_folder(tmp_path)
    assert "its file system has no locks" in caplog.text
