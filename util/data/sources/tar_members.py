"""Read the headers of tar files that may be damaged or forged."""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from util.errors import UserError, as_user_error
from util.files import printable

MAX_NAME = 4096  # characters in the name of a file in a shard, as in Linux
MAX_HEADER = 2**20  # bytes of an extended tar header, which holds a long name or attributes
MAX_PADDING = 2**21  # bytes at the end of a tar shard; tar -b 2048 writes up to half of this
LONG_NAMES = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
EXTENDED = *LONG_NAMES, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE  # headers that precede a member


def members(file: BinaryIO, shard: str) -> Iterator[tarfile.TarInfo]:
    """Yield name, type, size and `offset_data` of each member of a tar file, in bounded memory and time.

    `tarfile` parses each header here, but does not iterate: it allocates the size in a header, recurses into chains of
    headers, takes a damaged header for the end and, before Python 3.14, loops forever at a negative size.

    Raises:
        UserError: the file is damaged, incomplete, or has members that are stored as sparse files.
    """
    end, position = os.fstat(file.fileno()).st_size, 0
    shared: dict[bytes, bytes] = {}  # records of extended headers for all following members
    own: dict[bytes, bytes] = {}  # and for the next member
    while True:
        try:
            block = os.pread(file.fileno(), tarfile.BLOCKSIZE, position)
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            break
        extended = member.type in EXTENDED
        records = {} if extended else shared | own
        if b"path" in records:
            member.name = records[b"path"].decode("utf-8", "surrogateescape")
        if b"size" in records:
            member.size = int(records[b"size"]) if re.fullmatch(b"[0-9]{1,18}", records[b"size"]) else -1
        if member.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse.") for key in records):
            raise UserError(f"{shard}: {printable(member.name)} is stored as a sparse file: pack it without --sparse")
        if len(member.name) > MAX_NAME:
            raise UserError(f"{shard}: the name at byte {position} is longer than {MAX_NAME}")
        member.offset_data = position = position + tarfile.BLOCKSIZE
        if extended or member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:  # all others have no content
            position += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.size < 0 or position > end:
            raise UserError(f"{shard}: unexpected end of data in {printable(member.name)}")
        if not extended:
            own = {}
            yield member
            continue
        if member.size > MAX_HEADER:
            raise UserError(f"{shard}: the extended header at byte {member.offset_data} has {member.size} bytes")
        content = os.pread(file.fileno(), member.size, member.offset_data)
        if member.type in LONG_NAMES:
            if member.type == tarfile.GNUTYPE_LONGNAME:
                own[b"path"] = content.partition(b"\0")[0]
            continue
        with as_user_error(ValueError, prefix=f"{shard}: "):
            (shared if member.type == tarfile.XGLTYPE else own).update(_records(content))
    # the loop also ends at a damaged header; the end of an archive is zeros
    rest = os.pread(file.fileno(), MAX_PADDING + 1, position)
    if own or not 0 < len(rest) <= MAX_PADDING or rest.strip(b"\0"):
        if not position:
            raise UserError(f"{shard}: not an uncompressed tar file")
        raise UserError(f"{shard} is damaged or incomplete: neither a file nor a proper end at byte {position}")


RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")


def _records(content: bytes) -> dict[bytes, bytes]:
    """Parse an extended header, whose records are "LENGTH KEY=VALUE" and a line feed; raise ValueError."""
    records, start = {}, 0
    while start < len(content):
        match = RECORD.match(content, start)
        end = start + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise ValueError("an extended header is damaged")
        records[match[2]] = content[match.end() : end - 1]
        start = end
    return records
