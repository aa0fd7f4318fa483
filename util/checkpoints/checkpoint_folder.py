"""The checkpoints of one run: written atomically, in the background; find the newest undamaged one.

`checkpoint-last.pth` is the newest, `checkpoint-last-1.pth` the one before it, and so on. SHA256SUMS holds the hash of
every file, in the form of `sha256sum`. The hash of a new file is added before the file gets its name, so a complete
file never looks damaged.
"""

import copy
import itertools
import os
import re
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.checkpoints import checkpoint_file
from util.checkpoints.checkpoint_file import SUMS, DamagedCheckpoint, hashes
from util.distributed.parallel import full_tensor
from util.errors import RunError, UserError
from util.files import printable, replacing, sha256_of

LAST = "checkpoint-last.pth"


class CheckpointFolder:
    """The folder of a run's checkpoints; one process writes, and `say` shows a line to the user.

    It keeps the newest `keep` checkpoints, beside those with other names.
    """

    def __init__(self, path: Path, keep: int, say: Callable[[str], None]) -> None:
        self.path, self.keep, self.say = path, keep, say
        self.sums = self._known()
        self.staged: object = None
        self.names: tuple[str, ...] = ()  # further names of what is staged
        self.writing: threading.Thread | None = None
        self.failed: str | None = None
        self.lost: set[str] = set()  # further names whose file was never written

    def save(self, content: dict, *names: str) -> None:
        """Copy a checkpoint to the memory of the host, and write it in the background.

        A failed write is reported and leaves the older files; training continues. A checkpoint with further names is
        written again before the next one.

        Args:
            content: of types that `torch.save` and `checkpoint_file.read` can handle; see `on_host`.
            *names: further names for the file, beside `checkpoint-last.pth`.
        """
        self.wait()
        if self.failed and self.names:
            self._write()
            self.lost |= set(self.names) if self.failed else set()
        self.staged, self.names = on_host(content, self.staged), names
        self.writing = threading.Thread(target=self._write)
        self.writing.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self.writing is not None:
            self.writing.join()
            self.writing = None

    def close(self) -> None:
        """Wait, and raise RunError if the last checkpoint could not be written."""
        self.wait()
        if self.failed:
            raise RunError(self.failed)

    def _write(self) -> None:
        temporary = self.path / ".checkpoint.tmp"
        try:
            temporary.unlink(missing_ok=True)  # a killed run may have left it, with a further name already
            torch.save(self.staged, temporary)
            _sync(temporary)
            digest = sha256_of(temporary)
            self._publish(temporary, digest, self.names)
            self.failed = None
            self.lost -= set(self.names)
        except Exception as error:  # the run continues in any case; torch reports a full disk as a RuntimeError
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
            with suppress(OSError):
                reason += f" ({shutil.disk_usage(self.path).free / 1e6:.0f} MB are free)"
                temporary.unlink(missing_ok=True)
            self.failed = f"the checkpoint could not be written to {self.path}: {reason}; the older ones are untouched"
            self.say(self.failed)
            with suppress(OSError):
                self.sums = self._known()  # it may have failed between two renames

    def _known(self) -> dict[str, str]:
        """Return the hash of each file here that SHA256SUMS names; of two hashes, the one that the file has."""
        known = {}
        for name, digests in hashes(self.path).items():
            if name == os.path.basename(name) and os.path.isfile(self.path / name):  # no FIFO, which could block
                if len(digests) > 1:
                    digests = {sha256_of(self.path / name)} & digests or digests
                known[name] = min(digests)
        return known

    def _publish(self, temporary: Path, digest: str, names: tuple[str, ...]) -> None:
        """Give the file its names, and rename the files that had them before."""
        for name in (LAST, *names):  # files of an earlier version, which kept no hashes
            if name not in self.sums and (self.path / name).is_file():
                self.sums[name] = sha256_of(self.path / name)
        rotated = [LAST]
        while len(rotated) < self.keep and (self.path / rotated[-1]).exists():
            rotated.append(f"checkpoint-last-{len(rotated)}.pth")
        moves = list(itertools.pairwise(rotated))
        too_old = {path for age, path in _older(self.path).items() if age >= self.keep}
        after = {n: known for n, known in self.sums.items() if n not in rotated and (self.path / n).exists()}
        after |= {new: self.sums[old] for old, new in moves if old in self.sums}
        after |= dict.fromkeys((LAST, *names), digest)
        self._write_sums({*self.sums.items(), *after.items()})
        for old, new in reversed(moves):
            move = _link if old == LAST else os.replace  # so that a checkpoint-last.pth is always there
            move(self.path / old, self.path / new)
        for name in names:
            _link(temporary, self.path / name)
        os.replace(temporary, self.path / LAST)
        for path in too_old:
            path.unlink()
        _sync(self.path)
        self.sums = {name: known for name, known in after.items() if self.path / name not in too_old}
        self._write_sums(self.sums.items())

    def _write_sums(self, sums: Iterable[tuple[str, str]]) -> None:
        with replacing(self.path / SUMS) as temporary:
            temporary.write_bytes(os.fsencode("".join(f"{digest}  {name}\n" for name, digest in sorted(sums))))
        _sync(self.path)

    def newest(self) -> tuple[Path | None, list[str]]:
        """Return the newest undamaged checkpoint, and rename damaged newer ones to *.damaged.

        Returns:
            Its path, or None if there is no checkpoint; and the reasons why newer ones are damaged.

        Raises:
            UserError: all are damaged, or one cannot be read at the moment; nothing is renamed then.
        """
        last = [path for path in (self.path / LAST, *_older(self.path).values()) if path.is_file()]
        files = {path for path in self.path.glob("checkpoint-*.pth") if path.is_file()}
        others = sorted(files - set(last), key=lambda path: path.stat().st_mtime_ns)
        damaged = {}
        for path in (*last, *reversed(others)):
            try:
                checkpoint_file.read(path)
            except DamagedCheckpoint as error:
                damaged[path] = str(error)
                continue
            for other in damaged:
                _put_aside(other)
            return path, list(damaged.values())
        aside = [printable(path) for path in self.path.glob("checkpoint-*.damaged*")]
        if damaged or aside:
            raise UserError(f"every checkpoint in {self.path} is damaged: {'; '.join([*damaged.values(), *aside])}")
        return None, []


def _older(folder: Path) -> dict[int, Path]:
    """Return the files checkpoint-last-1.pth, checkpoint-last-2.pth and so on by number, the newest first."""
    ages = {}
    for path in folder.glob("checkpoint-last-*.pth"):
        if (match := re.fullmatch(r"checkpoint-last-([1-9][0-9]*)\.pth", path.name)) and path.is_file():
            ages[int(match[1])] = path
    return dict(sorted(ages.items()))


def _put_aside(path: Path) -> None:
    """Rename a file to *.damaged, or to *.damaged-1 and so on if that exists."""
    names = itertools.chain([f"{path.name}.damaged"], (f"{path.name}.damaged-{i}" for i in itertools.count(1)))
    path.rename(next(new for new in map(path.with_name, names) if not new.exists()))


def on_host(content: Any, memory: object = None) -> Any:
    """Copy nested dicts and lists of tensors to the CPU, into the memory of an earlier copy where it fits.

    Sharded tensors are gathered one after the other, while the other processes call `join_gather`.
    """
    copied = _copy(content, memory)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the copies were only queued
    return copied


def _copy(value: object, memory: object) -> object:
    if isinstance(value, Tensor):
        value = full_tensor(value)
        if not isinstance(memory, Tensor) or (memory.shape, memory.dtype) != (value.shape, value.dtype):
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return memory.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        parts = memory if isinstance(memory, dict) else {}
        return type(value)((name, _copy(part, parts.get(name))) for name, part in value.items())
    if isinstance(value, list):
        known = memory if isinstance(memory, list) else []
        return [_copy(part, known[i] if i < len(known) else None) for i, part in enumerate(value)]
    return copy.deepcopy(value) if isinstance(value, Namespace) else value


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it if the file system has no links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        _sync(temporary)
    os.replace(temporary, target)


def _sync(path: Path) -> None:
    """Write the content of a file, or the names in a folder, to the disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
