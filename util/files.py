"""Write files atomically and never through a link, read JSON of limited size, and make names printable."""

import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TextIO

from util.errors import UserError, as_user_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_JSON = 2**26  # bytes; the largest file that a script writes lists broken images, one in each line
FORMATS = ("png", "pdf", "svg")  # of figures: their metadata can hold a title
# OWNER/NAME on the Hugging Face hub, or OWNER/NAME@REVISION, then perhaps /PATH. A revision's slashes are written %2F,
# except in the hub's own refs/pr/1 and the like.
HUB_NAME = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.*))?")
ENDS = 2**16  # bytes at each end of a figure's file that are searched for its title


def printable(name: str | bytes | os.PathLike) -> str:
    r"""Return a name as text of one line that can be encoded: bytes that are not UTF-8 become \xNN."""
    text = os.fsdecode(name)  # such bytes as the surrogates U+DC80 to U+DCFF
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


def some(names: Sequence[str], shown: int = 5) -> str:
    """Return the first names and the number of the rest as one line."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(printable(name)[:200] for name in names[:shown]) + more


def reserve(file: BinaryIO, size: int) -> None:
    """Lengthen a file to `size` bytes, which the disk then has for it; raises OSError if it has not."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    block = 2**24
    for start in range(os.stat(file.fileno()).st_size, size, block):  # macOS
        file.write(bytes(min(block, size - start)))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write; it replaces `path`, a link itself and not its target, if the block raises nothing.

    Only one process at a time may write a path: incomplete files of earlier ones are removed. Raises OSError.
    """
    name = f".{path.name[:100]}."
    for leftover in path.parent.glob(f"{glob.escape(name)}*.tmp*"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f"{name}{secrets.token_hex(4)}.tmp")
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
    """Write a text file in UTF-8 atomically; raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically; raises OSError. Numbers that are not finite become null."""
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


def from_json(text: str | bytes, replace: Callable[[dict], object] | None = None) -> object:
    """Parse strict JSON; raise ValueError if it is no JSON, holds NaN or Infinity, or is nested too deeply.

    `replace` returns what takes the place of an object, as soon as that is parsed.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_hook=replace)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_json(path: Path) -> object:
    """Read a JSON file of at most `MAX_JSON` bytes; raise UserError, which names it, if that fails."""
    with as_user_error(OSError), path.open("rb") as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise UserError(f"{path} is larger than {MAX_JSON} bytes")
    with as_user_error(ValueError, prefix=f"{path} is damaged: "):
        return from_json(text)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_regular(path: str | bytes | os.PathLike) -> BinaryIO:
    """Open a file for unbuffered reading; raise OSError also if it is no regular file: a pipe could take forever."""
    return open(_regular(path, os.O_RDONLY), "rb", buffering=0)


def open_lock(path: Path) -> TextIO:
    """Open a lock file for reading and writing; create it if it is missing.

    Raises:
        OSError: it cannot be opened, or is a link or no regular file: another file must not be truncated through it.
    """
    descriptor = _regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    return open(descriptor, "r+", encoding="utf-8", errors="surrogateescape")


def _regular(path: str | bytes | os.PathLike, flags: int) -> int:
    """Return a descriptor of a regular file, without waiting for the other end of a pipe."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return descriptor


def output_file(
    path: Path, is_ours: Callable[[Path], bool], *inputs: str | os.PathLike, flag: str = "--output"
) -> Path:
    """Return the path of a result, after a check that it can be written there and overwrites nothing of value.

    Only a regular file that is an earlier result of the same kind is replaced. A missing folder is created.

    Args:
        path: value of `flag`, or its default.
        is_ours: returns whether a regular file is such a result; see `json_with` and `figure_of`.
        inputs: files that the script reads and that must not be overwritten.
        flag: for messages.

    Raises:
        UserError: names the path, and the reason why it cannot or must not be written.
    """
    name = f"{flag} {printable(path)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return path
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{name} cannot be written: Is a directory")
    if any(os.path.exists(file) and os.path.exists(path) and os.path.samefile(path, file) for file in inputs):
        raise UserError(f"{name} is the checkpoint itself, or another file that is read: give another name")
    if not stat.S_ISREG(mode):
        raise UserError(f"{name} cannot be written: it is a link, a device or a pipe, and no regular file")
    if not is_ours(path):
        raise UserError(f"{name} is there and is no earlier result of this kind: move it, or give another name")
    return path


def json_with(**fields: type) -> Callable[[Path], bool]:
    """Return a function that checks whether a file holds a JSON object with these fields, as earlier results do."""

    def holds(path: Path) -> bool:
        try:
            content = read_json(path)
        except UserError:
            return False
        return isinstance(content, dict) and all(isinstance(content.get(k), kind) for k, kind in fields.items())

    return holds


def figure_of(title: str) -> Callable[[Path], bool]:
    """Return a function that checks whether a file has the title that `save_figure` writes."""

    def holds(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                head = file.read(ENDS)
                file.seek(max(0, path.stat().st_size - ENDS))
                return title.encode() in head + file.read(ENDS)
        except OSError:
            return False

    return holds


def save_figure(figure: "Figure", path: Path, title: str, **options: Any) -> None:
    """Write a figure of matplotlib atomically; raises OSError. The suffix, one of `FORMATS`, gives the format.

    The title (ASCII) goes into the metadata, by which `figure_of` knows the file; `options` are of `Figure.savefig`.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), metadata={"Title": title}, **options)
