"""Small files: written atomically, never through a link; JSON within bounds; names that any terminal can show."""

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn, TextIO

from util.errors import UserError, as_user_error

MAX_JSON = 2**26  # bytes; the largest that a script writes lists broken images, a line each


def printable(name: str | bytes | os.PathLike) -> str:
    r"""Return a name as text of one line that can be encoded: bytes that are not UTF-8 become \xNN."""
    text = os.fsdecode(name)  # such bytes as the surrogates U+DC80 to U+DCFF
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write; it replaces `path`, a link itself and not its target, if the block raises nothing.

    Raises:
        OSError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, whole or not at all; raises OSError. Numbers that are not finite become null."""
    write_text(path, to_json(content, indent=1) + "\n")


def to_json(content: object, indent: int | None = None) -> str:
    """Return strict JSON: numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def from_json(text: str | bytes) -> object:
    """Parse strict JSON.

    Raises:
        ValueError: it is none, holds NaN or Infinity, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_json(path: Path) -> object:
    """Read a JSON file of at most `MAX_JSON` bytes.

    Raises:
        UserError: it cannot be read, or holds something else; the message names the file.
    """
    with as_user_error(OSError), path.open("rb") as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise UserError(f"{path} is larger than {MAX_JSON} bytes")
    with as_user_error(ValueError, prefix=f"{path} is damaged: "):
        return from_json(text)


def open_regular(path: str | bytes | os.PathLike) -> BinaryIO:
    """Open a file for unbuffered reading.

    Raises:
        OSError: it cannot be opened, or is no regular file: reading a pipe or a device could take forever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return open(descriptor, "rb", buffering=0)


def open_lock(path: Path) -> TextIO:
    """Open a file to be locked, made where it is missing, for reading and writing.

    Raises:
        OSError: it cannot be, or is a link or no regular file: another file must not be truncated through it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return open(descriptor, "r+", encoding="utf-8", errors="surrogateescape")
