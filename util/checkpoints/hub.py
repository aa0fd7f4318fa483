"""Resolve the name of a checkpoint (a path, a URL or an hf:// name) to a local file.

A name is a path, an http:// or https:// URL, or hf://OWNER/REPO/FILE; hf://OWNER/REPO@REVISION/FILE names another
revision than main. `#sha256=HEX` at its end gives the SHA-256 that the file must have. Every process of a run calls
`locate` without communication: a file lock lets one process of a machine download while the others wait.
"""

import errno
import hashlib
import http.client
import logging
import os
import re
import socket
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock

from util.errors import UserError, as_user_error
from util.files import HUB_NAME, open_regular, printable, replacing, sha256_of

LOGGER = logging.getLogger(__name__)
TIMEOUT = 10  # seconds without an answer or data; also the default of huggingface_hub
OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
WEIGHT_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")

_SHA256 = re.compile(r"[0-9a-f]{64}")


def locate(name: str | os.PathLike) -> tuple[Path, bool]:
    """Return the local file of a checkpoint's name, as described above; download it if it is in no cache.

    Returns:
        The file, and whether its SHA-256 was verified. The file is the path itself, or in the cache of huggingface_hub
        (hf://) or of torch.hub (URLs).

    Raises:
        UserError: the file does not exist, is no regular file, cannot be downloaded, or has another SHA-256.
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
        open_regular(path).close()  # reading a pipe or a device could take forever
        _check(source, sha256, path)
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        reason = "" if isinstance(error, FileNotFoundError) else f": {getattr(error, 'strerror', None) or error}"
        raise UserError(f"no checkpoint file {printable(source)}{reason}") from error
    return path, bool(sha256)


def beside(name: str | os.PathLike) -> Path:
    """Return the path next to which results about weights of this name (see `locate`) are written.

    It is a path itself; for a URL or an hf:// name, the name of its file in the current folder.
    """
    source = os.fspath(name).partition("#sha256=")[0]
    return Path(PurePosixPath(urlsplit(source).path).name if re.match("(https?|hf)://", source) else source)


class HubFile(NamedTuple):
    """A file of a repository: its path in it, its bytes, and the SHA-256 of one in Git LFS, else ""."""

    name: str
    size: int
    sha256: str


def files(name: str) -> tuple[str, list[HubFile]]:
    """Return the commit and the files of a repository of the hub, hf://OWNER/REPO or hf://OWNER/REPO@REVISION.

    Raises:
        UserError: the name has another form, or the hub does not list the files.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    parts = HUB_NAME.fullmatch(name.removeprefix("hf://"))
    if not parts or parts[3]:
        raise UserError(f"{name}: the form is hf://OWNER/REPO or hf://OWNER/REPO@REVISION")
    repo, revision = parts[1], unquote(parts[2] or "main")
    try:
        return _listed(repo, revision)
    except RevisionNotFoundError as error:
        raise UserError(f"{name}: {repo} has no revision {revision}") from error
    except Exception as error:  # those of httpx and the system have no common base class
        raise UserError(f"{name} cannot be listed: {_hub_reason(error)}") from error


def _listed(repo: str, revision: str) -> tuple[str, list[HubFile]]:
    """Do as `files`, and raise what huggingface_hub raises."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT, files_metadata=True)
    siblings = [(file.rfilename, file.size or 0, file.lfs) for file in info.siblings or []]
    return info.sha or revision, [HubFile(file, size, lfs.sha256 if lfs else "") for file, size, lfs in siblings]


def _check(name: str, sha256: str, path: Path, *bad: Path) -> None:
    """Compare a file with a SHA-256, unless empty; if it differs, remove the `bad` files and raise UserError."""
    if sha256 and (found := sha256_of(path)) != sha256:
        for file in bad:
            file.unlink(missing_ok=True)
        raise UserError(f"{name}: its sha256 is {found}, not {sha256}" + (": removed" if bad else ""))


def _hub_file(name: str, sha256: str) -> tuple[Path, bool]:
    # imported here because it takes a third of a second, and reads HF_ENDPOINT, HF_HUB_OFFLINE and the like
    import huggingface_hub as hf
    from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

    parts = HUB_NAME.fullmatch(name.removeprefix("hf://"))
    if not parts:
        raise UserError(f"{name}: the form is hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE")
    repo, revision, file = parts[1], unquote(parts[2] or "main"), parts[3]
    try:
        try:
            if not file:
                raise UserError(f"{name} names no file; {_offers(repo, revision)}")
            # hf_hub_download alone would retry for minutes if the hub does not answer; this request fails early
            hf.get_hf_file_metadata(hf.hf_hub_url(repo, file, revision=revision))
            path = Path(hf.hf_hub_download(repo, file, revision=revision))
        except RemoteEntryNotFoundError as error:
            raise UserError(f"{name}: no such file; {_offers(repo, revision)}") from error
    except UserError:
        raise
    except RevisionNotFoundError as error:
        raise UserError(f"{name}: {repo} has no revision {revision}") from error
    except Exception as error:  # those of httpx, hf_xet and the system have no common base class
        with as_user_error(ValueError, prefix=f"{name}: "):  # an invalid name
            cached = hf.try_to_load_from_cache(repo, file or "", revision=revision)
        if not isinstance(cached, str):
            raise UserError(f"{name} is not in the cache, and {_hub_reason(error)}") from error
        refused = getattr(getattr(error, "response", None), "status_code", 500) < 500
        if refused or getattr(error, "errno", None) in OF_THIS_MACHINE:  # the cached weights may be outdated
            raise UserError(f"{name}: {_hub_reason(error)}") from error
        LOGGER.warning("%s is taken from the cache: %s", name, _hub_reason(error))
        path = Path(cached)
    with as_user_error(OSError):
        of_hub = ""
        if path.is_symlink():  # to blobs/ETAG; the ETag of an LFS file is its sha256
            blob = path.parent / path.readlink()
            if _SHA256.fullmatch(blob.name):
                of_hub = blob.name
                _check(name, of_hub, path, path.resolve(), blob, path)
        if sha256 != of_hub:
            _check(name, sha256, path)
    return path, bool(sha256 or of_hub)


def _offers(repo: str, revision: str) -> str:
    """Return a message that lists the weight files of a repository."""
    _, found = _listed(repo, revision)
    weights = [file.name for file in found if file.name.endswith(WEIGHT_FILES)]
    return f"{repo} has " + (", ".join(weights) or f"no weights among its {len(found)} files")


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
    return f"{constants.ENDPOINT} cannot deliver it: {next(iter(str(error).splitlines()), type(error).__name__)}"


def _url_file(url: str, sha256: str) -> Path:
    from torch.hub import get_dir  # imported here because only URLs need torch

    try:
        # the hash of the URL distinguishes files of one name, such as checkpoint-best.pth
        url_hash = hashlib.sha256(url.encode()).hexdigest()[:16]
        target = Path(get_dir(), "checkpoints", f"{url_hash}-{PurePosixPath(urlsplit(url).path).name[-100:]}")
        if not _is_good(target, sha256):
            # before the lock, so that all processes meet a mistake at the same time and rank 0 can print it
            headers = {"User-Agent": "torch.hub", "Range": "bytes=0-0"}  # some servers refuse urllib's own User-Agent
            with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as answer:
                size = (answer.headers["Content-Range"] or answer.headers["Content-Length"] or "").rpartition("/")[2]
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not _is_good(target, sha256):
                    _download(url, target, sha256, size)
    except HTTPError as error:
        raise UserError(f"{url} is not in the cache, and the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(f"{url} is not in the cache, and cannot be fetched: {reason}") from error
    return target


def _is_good(path: Path, sha256: str) -> bool:
    return path.is_file() and (not sha256 or sha256_of(path) == sha256)


def _download(url: str, target: Path, sha256: str, size: str) -> None:
    """Download a URL; replace `target` only by a complete file with the right size and SHA-256, if they are known."""
    from torch.hub import download_url_to_file

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub has no timeout of its own
    try:
        with replacing(target) as fresh:
            download_url_to_file(url, str(fresh), progress=sys.stderr.isatty())
            # torch.hub keeps a truncated file if the connection ends early
            if size.isdecimal() and fresh.stat().st_size != int(size):
                raise UserError(f"{url}: the transfer ended after {fresh.stat().st_size} of {size} bytes: try again")
            _check(url, sha256, fresh, fresh)
    finally:
        socket.setdefaulttimeout(before)
