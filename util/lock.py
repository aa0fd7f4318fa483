"""One run in an output folder at a time."""

import atexit
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from util.errors import UserError

_HELD: dict[Path, TextIO] = {}


def lock_folder(folder: Path) -> str:
    """Keep other processes out of a folder until this one ends, in whatever way.

    The lock is the system's (`fcntl`, which network file systems pass on to other hosts): it cannot outlive its
    process. `run.lock` says who holds it.

    Args:
        folder: of the run.

    Returns:
        Who held it last and ended without releasing it, or an empty string.

    Raises:
        UserError: another process holds it.
    """
    path = folder.resolve() / "run.lock"
    if path in _HELD:
        return ""
    file = path.open("a+", encoding="utf-8")
    owner = _owner(file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"--output_dir {folder} is in use by {owner or 'another run'}: wait for it, or choose another"
        ) from error
    except OSError as error:
        raise UserError(f"--output_dir {folder}: its file system has no locks ({error.strerror})") from error
    _HELD[path] = file  # the lock goes when any handle of this process to the file is closed
    _write(file, {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    return owner


def _owner(file: TextIO) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _write(file: TextIO, owner: dict) -> None:
    file.truncate(0)
    file.write(json.dumps(owner))
    file.flush()


@atexit.register
def _release() -> None:
    for file in _HELD.values():
        _write(file, {})
        file.close()
