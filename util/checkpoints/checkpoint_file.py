"""Verify files of weights, and read them without executing code or allocating more memory than they need.

A file is verified by a hash (SHA256SUMS beside it, `#sha256=`, the hub's own), else by the CRC-32 of every record of a
file of torch.save, which torch does not check, else not at all. `load_file` logs how.
"""

import functools
import json
import logging
import os
import pickle
import re
import stat
import struct
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from util.checkpoints.hub import locate
from util.errors import UserError
from util.files import from_json, printable, sha256_of, some

LOGGER = logging.getLogger(__name__)
SUMS = "SHA256SUMS"  # file of a checkpoint's folder, in the form of sha256sum
METADATA = "arm"  # key of a .safetensors file's metadata that export.py writes: JSON of `input_size`, `global_pool` ...
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_MAX_SUMS = 2**24  # bytes: some 100,000 files
_IS_FOLDER = 0x10  # attribute of a zip record, of which torch would return uninitialised memory
_LOCAL_HEADER = 30  # bytes before the name of a zip record
# read as what is named first: Lightning's hyperparameters are a dict
_SAFE: list[Any] = [Namespace, (dict, "lightning.fabric.utilities.data.AttributeDict")]
_NOT_TORCH = (pickle.UnpicklingError, LookupError, TypeError, AttributeError, AssertionError, struct.error)


class DamagedCheckpoint(UserError):
    """A file that differs from what was written, or that cannot be loaded as a checkpoint."""


@functools.cache
def say_once(level: int, line: str) -> None:
    """Log a line once, even if a file is read again."""
    LOGGER.log(level, "%s", line)


def hashes(folder: Path) -> dict[str, set[str]]:
    """Read a folder's SHA256SUMS, and log once if it is damaged or cannot be read.

    Returns:
        The hash of each file by name, or two hashes while the file is being replaced; none without a SHA256SUMS.
    """
    path, wrong = folder / SUMS, 0
    sums: dict[str, set[str]] = {}
    text, problem = "", ""
    try:
        if stat.S_ISREG(path.lstat().st_mode):
            with path.open("rb") as file:
                text = os.fsdecode(file.read(_MAX_SUMS + 1))
        else:
            problem = "is a link or no regular file: it is not read"
    except FileNotFoundError:
        return {}
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    if len(text) > _MAX_SUMS:
        text, problem = "", f"is larger than {_MAX_SUMS} bytes: it is not read"
    for line in filter(None, text.split("\n")):
        if match := _SUM.fullmatch(line):
            sums.setdefault(match[2], set()).add(match[1].lower())
        else:
            wrong += 1
            problem = f"is damaged: {wrong} of its lines are no hash and name"
    if problem:
        say_once(logging.WARNING, f"{printable(path)} {problem}")
    return sums


def load_file(path: str | os.PathLike) -> dict:
    """Load a file of torch.save or a .safetensors file onto the CPU.

    The file is read once for its hash (2 GB/s from the page cache, measured on one core) or CRCs (5 GB/s), and once
    for its content.

    Args:
        path: path, URL or hf:// name; see `util.checkpoints.hub`.

    Returns:
        The dict of a file of torch.save; the state dict of a .safetensors file, or `model` and `args` if its metadata
        hold arguments.

    Raises:
        UserError: no such file, or it cannot be read at the moment.
        DamagedCheckpoint: the file is damaged, is no checkpoint, holds types other than tensors, plain values and a
            Namespace, or asks for more memory than it has bytes.
    """
    file, verified = locate(path)
    name = printable(path)
    if file != Path(os.fspath(path).partition("#sha256=")[0]):
        name += f" (delete {printable(file)} to fetch it again)"
    try:
        if not verified:
            sums = hashes(file.parent)
            verified = file.name in sums
            if verified and sha256_of(file) not in sums[file.name]:
                reason = f"{SUMS} beside it has another hash"
                raise DamagedCheckpoint(f"{name} is damaged, or not the file that was written: {reason}")
        if file.suffix == ".safetensors":
            content: object = _load_safetensors(file)
            checked = False
        else:
            with file.open("rb") as opened:
                is_zip = opened.read(4) == b"PK\3\4"  # as torch tells its two formats apart
            checked = is_zip and _check_archive(file, not verified)
            content = _load_torch(file)
    except UserError:
        raise
    except Exception as error:  # the file's content decides what the libraries raise
        reason = printable(next(iter(str(error).splitlines()), "it ends too early"))[:300]
        if isinstance(error, (OSError, MemoryError)) or "allocate memory" in reason:  # the file itself may be good
            raise UserError(f"unreadable checkpoint {name}: {reason or 'not enough memory'}") from error
        if unknown := re.search(r"GLOBAL ([\w.]{1,200})", str(error)):
            reason = f"it holds a {unknown[1]}, and only tensors, plain values and a Namespace are loaded"
        elif isinstance(error, _NOT_TORCH):
            reason = "it is no file that torch.save wrote"
        else:
            raise DamagedCheckpoint(f"unreadable checkpoint {name}: {reason}") from error
        raise DamagedCheckpoint(f"refused checkpoint {name}: {reason}") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{name} is no checkpoint: it holds a {type(content).__name__}, not a dict")
    if not verified:
        known = "its own checksums are right" if checked else "it has no checksums: its content cannot be verified"
        say_once(logging.INFO, f"{printable(file)} is in no {SUMS}; {known}")
    return content


def _check_archive(file: Path, content: bool) -> bool:
    """Check that a zip archive has the form that torch.save writes; with `content`, also every record's CRC-32.

    Returns:
        Whether the archive has CRCs: torch.save can leave them out.

    Raises:
        ValueError, zipfile.BadZipFile: names the record that is damaged, compressed, or larger than its place.
    """
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        if not records or records[0].header_offset or len({record.filename for record in records}) < len(records):
            raise ValueError("its archive does not begin with a record, or has two of one name")
        ends = [*(record.header_offset for record in records[1:]), archive.start_dir]
        for record, end in zip(records, ends, strict=True):
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                raise ValueError(f"its record {record.filename[:100]} is compressed, which torch.save never does")
            if record.external_attr & _IS_FOLDER:
                raise ValueError(f"its record {record.filename[:100]} is marked as a folder")
            if record.header_offset + _LOCAL_HEADER + record.file_size > end:
                raise ValueError(f"its record {record.filename[:100]} is larger than its place in the file")
        known = any(record.CRC for record in records)
        if content and known and (bad := archive.testzip()):
            raise zipfile.BadZipFile(f"its record {bad[:100]} is damaged: it has another CRC-32")
    return known


def _load_torch(file: Path) -> object:
    """Load a file of torch.save; refuse storages that exceed the file, and tensors that exceed their storage."""
    size, asked = file.stat().st_size, 0

    def within(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        nonlocal asked
        asked += storage.nbytes()
        if asked > size:
            raise ValueError("its tensors are larger than the file")
        return storage[:]  # shares the memory, and cannot be resized

    with torch.serialization.safe_globals(_SAFE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols, for example; the checks below find what is wrong
        content = torch.load(file, map_location=within, weights_only=True)  # type: ignore[arg-type]  # older class
    pending: list[tuple[str, object]] = [("", content)]
    seen: set[int] = set()
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
                raise ValueError(f"its tensor {name} is not dense")
            if value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"its tensor {name} of shape {tuple(value.shape)} is larger than what is stored of it")
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (dict, Namespace)):
            parts = value if isinstance(value, dict) else vars(value)
            pending += [(f"{key}"[:100], part) for key, part in parts.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += [(name, part) for part in value]
    return content


def _load_safetensors(file: Path) -> dict:
    """Load a .safetensors file; its library checks every offset and shape against the file's size."""
    with safe_open(file, "pt") as opened:
        known = (opened.metadata() or {}).get(METADATA)
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        json.loads(opened.read(length), object_pairs_hook=_unique)
    state_dict = safetensors.torch.load_file(file)
    if known is None:
        return state_dict
    with suppress(ValueError):
        arguments = from_json(known)
        if isinstance(arguments, dict):
            return {"model": state_dict, "args": Namespace(**arguments)}
    raise ValueError(f"its metadata {METADATA!r} are no JSON object")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """Refuse two entries of one name: the library would take the last."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("its header has two entries of one name")
    return dict(pairs)


StateDict = dict[str, Tensor]

# names of other programs for `model` and `model_ema`: timm's train.py
_OTHER_NAMES = {"state_dict": "model", "state_dict_ema": "model_ema"}

# parts of names that torch.compile and DistributedDataParallel add, at any place
_WRAPPERS = {"_orig_mod", "module"}


def read(path: str | os.PathLike, ignore_keys: Sequence[str] = ()) -> dict:
    """Load a checkpoint onto the CPU without executing anything in it.

    Args:
        path: path, URL or hf:// name of a file of torch.save or a .safetensors file; see `load_file`.
        ignore_keys: shell patterns (`*.angle_embed`) of parameters to leave out; their number is logged.

    Returns:
        The content, see `util.checkpoints.inspection`; weights of timm's train.py (`state_dict`) become `model`.

    Raises:
        UserError: see `load_file`; or a pattern matches no parameter.
        DamagedCheckpoint: see `load_file`.
    """
    content = load_file(path)
    for other, name in _OTHER_NAMES.items():
        if isinstance(content.get(other), dict) and name not in content:
            content[name] = content.pop(other)
    parts = [content[key] for key in weight_keys(content)] or [content]
    state_dicts = [part for part in parts if isinstance(part, dict)]
    ignored = set()
    for pattern in ignore_keys:
        found = [(part, key) for part in state_dicts for key in part if fnmatchcase(unwrapped_name(key), pattern)]
        if not found:
            raise UserError(f"--ignore_keys {pattern}: {printable(path)} has no such key")
        ignored |= {unwrapped_name(key) for _, key in found}
        for part, key in found:
            del part[key]
    if ignored:
        say_once(logging.INFO, f"{printable(path)}: {len(ignored)} keys are ignored: {some(sorted(ignored))}")
    return content


def unwrapped_name(name: object) -> str:
    """Return the name of a parameter without the parts that wrappers of a model add."""
    return ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)


def weight_keys(content: dict) -> list[str]:
    """Return which of `model` and `model_ema` a checkpoint holds; neither for a bare state dict."""
    return [key for key in ("model", "model_ema") if content.get(key) is not None]


def chosen_key(content: dict, key: str | None) -> str | None:
    """Return the key of the weights that `weights` takes, logged if `key` is None; None for a bare state dict."""
    present = weight_keys(content)
    if key is None and len(present) > 1:
        LOGGER.info("the checkpoint holds %s: %s is taken; --model_key chooses", " and ".join(present), present[0])
    return key or (present[0] if present else None)
