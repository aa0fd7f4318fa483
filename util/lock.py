"""One run in an output folder at a time."""

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
    """Keep other processes out of a folder until this one ends, in whatever way.

    The lock is the system's (`fcntl`, which network file systems pass on to other hosts): it cannot outlive its
    process. `run.lock` says who holds it.

    Args:
        folder: of the run.
        name: what the command line calls it, for messages.

    Returns:
        Who held it last and ended without releasing it, or an empty string.

    Raises:
        UserError: another process holds it.
    """
    path = folder.resolve() / "run.lock"
    if path in _HELD:
        return ""
    if path.is_symlink():
        raise UserError(f"{name} {folder}: its run.lock is a link, through which another file would be written")
    with as_user_error(OSError, prefix=f"{name} {folder}: "):
        file = open_lock(path)
    owner = _owner(file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"{name} {folder} is in use by {owner or 'another run'}: wait for it, or choose another"
        ) from error
    except OSError as error:
        if _lives(file):
            raise UserError(f"{name} {folder} is in use by {owner}: wait for it, or choose another") from error
        LOGGER.warning("%s: its file system has no locks: other hosts are not kept out", folder)
    _HELD[path] = file  # the lock goes when any handle of this process to the file is closed
    with as_user_error(OSError, prefix=f"{name} {folder}: "):
        _write(file, {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    return owner


def in_use(folder: Path) -> bool:
    """Return whether another process holds the lock of a folder.

    Raises:
        UserError: its run.lock cannot be opened, or is a link or no regular file.
    """
    path = folder.resolve() / "run.lock"
    if path in _HELD:  # closing the file below would release it
        return False
    with as_user_error(OSError):
        file = open_lock(path)
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:  # the file system has no locks
            return _lives(file)
    return False


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


def _lives(file: TextIO) -> bool:
    """Whether the owner that the file names is a process of this host."""
    owner = _content(file)
    return bool(owner) and owner["host"] == socket.gethostname() and os.path.exists(f"/proc/{owner['pid']}")


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
