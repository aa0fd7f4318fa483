"""A cache of compiled files that this process will execute: whose they are, and whether they are whole, comes first."""

import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from util.files import sha256_of

LOGGER = logging.getLogger("arm")


@cache
def private_folder() -> tempfile.TemporaryDirectory:
    """Return the folder of what this process compiles for itself alone; removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="arm-ops-")


def cache_folder() -> Path:
    """Return the user's folder of compiled files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "arm-ops" if cache.is_absolute() else Path(private_folder().name)  # relative: there is no home


def cached_or_private(stem: str, suffix: str, build: Callable[[Path], object]) -> Path:
    """Return a compiled file from the cache, or, where the cache cannot be used, one of this process alone.

    Args are those of `cached_file`.
    """
    try:
        return cached_file(cache_folder(), stem, suffix, build)
    except OSError as error:  # the cache cannot be written, or by too many
        LOGGER.info("%s is compiled for this process alone: %s", stem, error)
        return cached_file(Path(private_folder().name), stem, suffix, build)


def cached_file(folder: Path, stem: str, suffix: str, build: Callable[[Path], object]) -> Path:
    """Return a compiled file from a folder, built unless a trustworthy one is there.

    The file is called STEM-SHA256SUFFIX, by the SHA-256 of its content, so that damage shows. A file or folder counts
    only if this user or root owns it and nobody else can write it: what is in it will be executed. A file that does not
    count is removed with a warning and built anew.

    Args:
        folder: of the cache, made for this user alone where it is missing.
        stem: names what the file is compiled from, and for which machine.
        suffix: of its name.
        build: writes it to a path.

    Raises:
        OSError: the folder cannot be made or written, or others can write it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if reason := distrust(folder, stat.S_ISDIR):
        raise OSError(f"{folder} {reason}")
    for path in folder.glob(f"{stem}-*{suffix}"):
        digest = path.name[len(stem) + 1 : len(path.name) - len(suffix)]
        if not re.fullmatch("[0-9a-f]{64}", digest):
            continue
        reason = distrust(path, stat.S_ISREG)
        if not reason and sha256_of(path) == digest:
            return path
        LOGGER.warning("%s %s: built again", path, reason or "is damaged")
        with suppress(OSError):
            path.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch, f"{stem}{suffix}")
        build(fresh)
        fresh.chmod(0o700)  # whatever the umask says
        with fresh.open("rb") as file:
            os.fsync(file.fileno())  # a name that survives a power failure has its content
        # atomic: of ranks that build at the same time each finds a whole file
        return fresh.replace(folder / f"{stem}-{sha256_of(fresh)}{suffix}")


def distrust(path: Path, is_kind: Callable[[int], bool]) -> str:
    """Return why a file or folder must not be executed from, or an empty string."""
    status = path.lstat()
    if not is_kind(status.st_mode):
        return "is a link, or of another kind"
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return ""
