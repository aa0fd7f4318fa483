"""Lock an output folder, so that only one run writes to it."""

import atexit
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from util.errors import UserError, as_user_error
from util.files import from_json, open_lock, printable

LOGGER = logging.getLogger(__name__)
_HELD: dict[Path, TextIO] = {}


def lock_folder(folder: Path, name: str = "--output_dir") -> str:
    """Lock a folder for this process until it ends, in whatever way.

    The lock is the operating system's (`fcntl`, which also works over network file systems), and ends with the process.
    The file `run.lock` names the owner.

    Returns:
        The last owner if it ended without releasing the lock, else an empty string.

    Raises:
        UserError: another process holds the lock, or `run.lock` cannot be written. It begins with `name`, a flag.
    """
    path = folder.resolve() / "run.lock"
    if path in _HELD:
        return ""
    if path.is_symlink():
        raise UserError(f"{name} {folder}: its run.lock is a link, which could overwrite another file: remove it")
    with as_user_error(OSError, prefix=f"{name} {folder}: "):
        file = open_lock(path)
    owner = _owner(file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if _is_held(file, error):
            owner = owner or "another run"
            raise UserError(f"{name} {folder} is in use by {owner}: wait for it, or choose another folder") from error
        LOGGER.warning("%s: its file system has no locks: a run on another host would not be noticed", folder)
    _HELD[path] = file  # closing any handle of this process to the file would release the lock
    with as_user_error(OSError, prefix=f"{name} {folder}: "):
        _write(file, {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    return owner


def in_use(folder: Path) -> bool:
    """Return whether another process holds the lock of a folder; raise UserError if that cannot be determined."""
    path = folder.resolve() / "run.lock"
    if path in _HELD:  # closing the file below would release it
        return False
    with as_user_error(OSError):
        file = open_lock(path)
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return _is_held(file, error)
    return False


def is_running(pid: int) -> bool:
    """Return whether a process with this number runs on this machine."""
    try:
        os.kill(pid, 0)  # asks, without a signal
    except PermissionError:  # it is another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0  # 0 and less are groups of processes


def _content(file: TextIO) -> dict:
    file.seek(0)
    with suppress(ValueError):
        owner = from_json(file.read(1000))
        if isinstance(owner, dict) and isinstance(owner.get("pid"), int) and {"host", "since"} <= owner.keys():
            return owner
    return {}


def _owner(file: TextIO) -> str:
    owner = _content(file)
    return printable(f"process {owner['pid']} on {owner['host']} since {owner['since']}") if owner else ""


def _is_held(file: TextIO, error: OSError) -> bool:
    """Return whether a lock failed because of its owner: on a file system without locks, one that runs on this host."""
    if isinstance(error, (BlockingIOError, PermissionError)):
        return True
    owner = _content(file)
    return bool(owner) and owner["host"] == socket.gethostname() and is_running(owner["pid"])


def _write(file: TextIO, owner: dict) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(owner))
    file.flush()


@atexit.register
def _release() -> None:
    for file in _HELD.values():
        with suppress(OSError):
            _write(file, {})
            file.close()
