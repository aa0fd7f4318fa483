"""A cache of compiled files; a file is executed only after its owner, permissions and content were checked."""

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
    """Return a folder for compiled files of this process only; it is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="arm-ops-")


def cache_folder() -> Path:
    """Return the user's folder of compiled files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    # A relative path means that there is no home folder.
    return cache / "arm-ops" if cache.is_absolute() else Path(private_folder().name)


def cached_or_private(stem: str, suffix: str, build: Callable[[Path], object]) -> Path:
    """Return a compiled file from the cache or, if the cache cannot be used, one of this process only.

    Arguments are those of `cached_file`.
    """
    try:
        return cached_file(cache_folder(), stem, suffix, build)
    except OSError as error:  # the cache cannot be written, or others can write it
        LOGGER.info("%s is compiled for this process only: %s", stem, error)
        return cached_file(Path(private_folder().name), stem, suffix, build)


def cached_file(folder: Path, stem: str, suffix: str, build: Callable[[Path], object]) -> Path:
    """Return a compiled file from a folder; build it unless a trustworthy one is there.

    The file is named STEM-SHA256SUFFIX after the SHA-256 of its content, so that damage is detected. A file or folder
    is trusted only if this user or root owns it and nobody else can write it, because its content will be executed. A
    file that is not trusted is removed with a warning and built again.

    Args:
        folder: the cache; created with access for this user only.
        stem: identifies the source of the file, and the machine that it is for.
        suffix: the end of the file's name.
        build: function that writes the file to a path.

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
        fresh.chmod(0o700)  # independent of the umask
        with fresh.open("rb") as file:
            os.fsync(file.fileno())  # after a power failure a file that has this name is complete
        # atomic: ranks that build at the same time all find a complete file
        return fresh.replace(folder / f"{stem}-{sha256_of(fresh)}{suffix}")


def distrust(path: Path, is_kind: Callable[[int], bool]) -> str:
    """Return why the content of a file or folder must not be executed, or an empty string."""
    status = path.lstat()
    if not is_kind(status.st_mode):
        return "is a link, or not of the expected kind"
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return ""
