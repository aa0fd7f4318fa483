"""Weights by name: what stands for a checkpoint on a command line becomes a file on this machine.

A name is a path, an http:// or https:// URL, or hf://OWNER/REPO/FILE, at another revision than main
hf://OWNER/REPO@REVISION/FILE. `#sha256=HEX` at its end demands that content. Nothing is asked of the processes of a
run: each calls `locate`, and locks on files let one of a machine download while the others wait.
"""

import errno
import glob
import hashlib
import http.client
import logging
import os
import re
import stat
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from util.errors import UserError, as_user_error
from util.files import printable, sha256_of

LOGGER = logging.getLogger(__name__)
TIMEOUT = 10  # seconds of silence; huggingface_hub's default too
OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
WEIGHT_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")

_SHA256 = re.compile(r"[0-9a-f]{64}")
# a revision's slashes are written %2F, except in the hub's own refs/pr/1 and the like
_HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.*))?")


def locate(name: str | os.PathLike) -> tuple[Path, bool]:
    """Find the file that a name stands for, downloaded where it is not in a cache.

    Args:
        name: a path, URL or hf:// name, with or without #sha256=HEX.

    Returns:
        The path itself, or the file in the cache of huggingface_hub (hf://) or of torch.hub (URLs); and whether it has
        been compared with a sha256.

    Raises:
        UserError: it is not there, no regular file, cannot be fetched, or has another sha256.
    """
    source, given, sha256 = os.fspath(name).partition("#sha256=")
    sha256 = sha256.lower()
    if given and not _SHA256.fullmatch(sha256):
        raise UserError(f"{name}: a sha256 has 64 hexadecimal digits")
    if source.startswith("hf://"):
        return _hub_file(source, sha256)
    if source.startswith(("http://", "https://")):
        return _url_file(source, sha256), bool(sha256)
    path = Path(source)
    try:
        regular = stat.S_ISREG(path.stat().st_mode)  # another one may block for ever, or never end
        if regular:
            _check(source, sha256, path)
    except (OSError, ValueError) as error:  # a name with a NUL
        reason = "" if isinstance(error, FileNotFoundError) else f": {getattr(error, 'strerror', None) or error}"
        raise UserError(f"no checkpoint file {printable(source)}{reason}") from error
    if not regular:
        raise UserError(f"no checkpoint file {printable(source)}: it is no regular file")
    return path, bool(sha256)


def beside(name: str | os.PathLike) -> Path:
    """The path of weights, beside which results about them go; of a URL or hf:// name the file's, in this folder."""
    source = os.fspath(name).partition("#sha256=")[0]
    return Path(PurePosixPath(urlsplit(source).path).name if re.match("(https?|hf)://", source) else source)


def _check(name: str, sha256: str, path: Path, *bad: Path) -> None:
    """Compare a file with a sha256 (where there is one); the `bad` files go if it is another."""
    if sha256 and (found := sha256_of(path)) != sha256:
        for file in bad:
            file.unlink(missing_ok=True)
        raise UserError(f"{name}: its sha256 is {found}, not {sha256}" + (": removed" if bad else ""))


def _hub_file(name: str, sha256: str) -> tuple[Path, bool]:
    # read here: the import takes a third of a second, and reads HF_ENDPOINT, HF_HUB_OFFLINE and the like
    import huggingface_hub as hf
    from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

    parts = _HUB.fullmatch(name)
    if not parts:
        raise UserError(f"{name}: the form is hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE")
    repo, revision, file = parts[1], unquote(parts[2] or "main"), parts[3]
    try:
        try:
            if not file:
                raise UserError(f"{name} names no file; {_offers(repo, revision)}")
            # asked once by hand: hf_hub_download repeats the question to a silent hub for minutes
            hf.get_hf_file_metadata(hf.hf_hub_url(repo, file, revision=revision))
            path = Path(hf.hf_hub_download(repo, file, revision=revision))
        except RemoteEntryNotFoundError as error:
            raise UserError(f"{name}: no such file; {_offers(repo, revision)}") from error
    except UserError:
        raise
    except RevisionNotFoundError as error:
        raise UserError(f"{name}: {repo} has no revision {revision}") from error
    except Exception as error:  # httpx's, hf_xet's and the system's have no base in common
        with as_user_error(ValueError, prefix=f"{name}: "):  # what can be no name
            cached = hf.try_to_load_from_cache(repo, file or "", revision=revision)
        if not isinstance(cached, str):
            raise UserError(f"{name} is not in the cache, and {_hub_reason(error)}") from error
        refused = getattr(getattr(error, "response", None), "status_code", 500) < 500
        if refused or getattr(error, "errno", None) in OF_THIS_MACHINE:  # older weights would be no answer
            raise UserError(f"{name}: {_hub_reason(error)}") from error
        LOGGER.warning("%s is taken from the cache: %s", name, _hub_reason(error))
        path = Path(cached)
    with as_user_error(OSError):
        of_hub = ""
        if path.is_symlink():  # to blobs/ETAG, and the etag of an LFS file is its sha256
            blob = path.parent / path.readlink()
            if _SHA256.fullmatch(blob.name):
                of_hub = blob.name
                _check(name, of_hub, path, path.resolve(), blob, path)
        if sha256 != of_hub:
            _check(name, sha256, path)
    return path, bool(sha256 or of_hub)


def _offers(repo: str, revision: str) -> str:
    """The weight files of a repository, in words."""
    from huggingface_hub import HfApi

    files = [file.rfilename for file in HfApi().model_info(repo, revision=revision, timeout=TIMEOUT).siblings]
    weights = [file for file in files if file.endswith(WEIGHT_FILES)]
    return f"{repo} has " + (", ".join(weights) or f"no weights among its {len(files)} files")


def _hub_reason(error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "the repository is gated: ask for access on its page, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: then `hf auth login` or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} answers {error.response.status_code} {error.response.reason_phrase}"
    return f"{constants.ENDPOINT} does not give it: {next(iter(str(error).splitlines()), type(error).__name__)}"


def _url_file(url: str, sha256: str) -> Path:
    from torch.hub import get_dir  # read here: only this needs torch

    try:
        # many a URL ends in checkpoint-best.pth
        name = f"{_short_hash(url)}-{PurePosixPath(urlsplit(url).path).name[-100:]}"
        target = Path(get_dir(), "checkpoints", name)
        if not _is_good(target, sha256):
            # before the lock, so that all processes find a mistake at the same time and rank 0 can state it
            with _get(url, Range="bytes=0-0") as answer:
                version = answer.headers["ETag"] or answer.headers["Last-Modified"]
                size = answer.headers["Content-Length"]
                if answer.status == 206:
                    size = (answer.headers["Content-Range"] or "").rpartition("/")[2]
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not _is_good(target, sha256):
                    _download(url, target, sha256, version, int(size) if size and size != "*" else None)
    except HTTPError as error:
        raise UserError(f"{url} is not in the cache, and the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(f"{url} is not in the cache, and cannot be fetched: {reason}") from error
    return target


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_good(path: Path, sha256: str) -> bool:
    return path.is_file() and (not sha256 or sha256_of(path) == sha256)


def _get(url: str, **headers: str) -> http.client.HTTPResponse:
    # servers turn urllib's own User-Agent away
    return urlopen(Request(url, headers={"User-Agent": "arm", **headers}), timeout=TIMEOUT)


def _download(url: str, target: Path, sha256: str, version: str | None, size: int | None) -> None:
    """Write a URL's content to `target`, which is complete or absent at any moment.

    Args:
        url: what to fetch.
        target: the file; what an interrupted transfer has brought stands beside it and is gone on with.
        sha256: of the content, or empty.
        version: the server's name for the present content; without one nothing is gone on with.
        size: of the content, where known.
    """
    partial = target.with_name(f"{target.name}.{_short_hash(version or '')}.partial")
    for other in target.parent.glob(f"{glob.escape(target.name)}.*.partial"):
        if other != partial or other.is_symlink() or not other.is_file():
            other.unlink()
    have = partial.stat().st_size if version and size and partial.exists() else 0
    have = have if have <= (size or 0) else 0
    if not have or have != size:
        condition = {"If-Range": version} if have else {}  # changed meanwhile, it comes whole
        with _get(url, Range=f"bytes={have}-", **condition) as answer:
            have = have if answer.status == 206 else 0
            bar = tqdm(desc=url, total=size, initial=have, unit="B", unit_scale=True, unit_divisor=1024, disable=None)
            with bar, partial.open("ab" if have else "wb") as file:
                while block := answer.read1(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    found = partial.stat().st_size
    if size is not None and found != size:
        raise UserError(f"{url}: the transfer ended after {found} of {size} bytes; the next attempt goes on from there")
    _check(url, sha256, partial, partial)
    os.replace(partial, target)
