"""Damaged and forged shards and indices give the right content or one line, in bounded time and memory."""

import contextlib
import io
import json
import os
import random
import signal
import tarfile
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from util.data.sources import tar_members, tar_shards
from util.data.sources.source import MAX_CLASSES
from util.errors import UserError

BLOCK = tarfile.BLOCKSIZE
MAX_PEAK = 64 * 2**20  # bytes
MAX_SECONDS = 120


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """End a test that hangs, and fail one that allocates too much."""
    monkeypatch.setattr(tar_shards, "ThreadPoolExecutor", lambda: contextlib.nullcontext(SimpleNamespace(map=map)))
    # pytest.fail raises no Exception, so a reader cannot take it for damage
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the reader hangs"))
    signal.alarm(MAX_SECONDS)
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert peak < MAX_PEAK


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_shard(kind, extra=()):
    """A shard of six images with labels, with names that need an extended header if the format has them."""
    file, rng = io.BytesIO(), random.Random(0)
    long = "" if kind == "ustar" else "é" * 100
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as tar:
        for number in range(6):
            members = [(f"c{number % 3}/{number}{long}.jpg", rng.randbytes(300 + number))]
            members += [(f"c{number % 3}/{number}{long}.cls", b"%d" % (number % 3))]
            for name, content in (*members, *extra[number : number + 1]):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def layout(data):
    """Return (kind, start, end) of the headers, extended headers, images and labels of an undamaged shard."""
    parts, at = [], 0
    while data[at : at + BLOCK].strip(b"\0"):
        info = tarfile.TarInfo.frombuf(data[at : at + BLOCK], "utf-8", "surrogateescape")
        parts.append(("header", at, at + BLOCK))
        at += BLOCK
        kind = "extended" if info.type in tar_members.EXTENDED else "label" if 0 < info.size < 9 else "image"
        parts.append((kind, at, at + info.size))
        at += -(-info.size // BLOCK) * BLOCK
    return parts


def opened(folder):
    """Return the shards of a folder, or the message that refuses them."""
    try:
        return tar_shards.TarShards(str(folder), "train")
    except UserError as error:
        return str(error)


def open_shard(folder, data):
    """Return labels and images in order, or None if the shard is refused in one line."""
    folder.mkdir(exist_ok=True)
    tar_shards._opened.cache_clear()
    for path in folder.iterdir():
        path.unlink()
    (folder / "train-0.tar").write_bytes(data)
    source = opened(folder)
    if isinstance(source, str):
        assert source.startswith(str(folder))
        assert source.isprintable()
        return None
    for index in range(len(source.labels)):
        assert source.name(index).isprintable()
    return [(int(label), source.read(index)) for index, label in enumerate(source.labels)]


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bits_of_a_shard(tmp_path, kind):
    """A flipped bit in a header is noticed or has no effect; one elsewhere changes only the file that it is in."""
    data = make_shard(kind)
    want, parts, rng = open_shard(tmp_path / "s", data), layout(data), random.Random(1)
    assert [label for label, _ in want] == [0, 1, 2] * 2
    noticed = 0
    for number in range(250):
        part, start, end = rng.choice([p for p in parts if p[0] == "header"] if number % 5 else parts)
        at, bit = rng.randrange(start, end), rng.randrange(8)
        damaged = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        got = open_shard(tmp_path / "s", damaged)
        noticed += got is None
        if part == "header":
            assert got in (None, want), (at, bit)
        elif part == "image":
            assert [label for label, _ in got] == [label for label, _ in want]
            changed = [(new, old) for (_, new), (_, old) in zip(got, want, strict=True) if new != old]
            assert [(new.hex(), old.hex()) for new, old in changed] == [
                (damaged[start:end].hex(), data[start:end].hex())
            ]
        elif part == "label":
            assert got is None or [image for _, image in got] == [image for _, image in want]
    assert noticed > 150


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_shards(tmp_path, kind):
    """Truncation is noticed, except among the zeros at the end."""
    data = make_shard(kind)
    want, rng = open_shard(tmp_path / "s", data), random.Random(2)
    content = len(data.rstrip(b"\0"))
    last = -(-content // BLOCK) * BLOCK
    for length in [*range(0, last + 1, BLOCK), *(rng.randrange(last + 1) for _ in range(60))]:
        assert open_shard(tmp_path / "s", data[:length]) is None, length
    assert open_shard(tmp_path / "s", data[: last + 1]) == want


def with_checksum(header):
    """Return the header with a valid checksum."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


NUMBERS = [0, 1, 511, 512, 2**20 + 1, 2**31, 8**11 - 1, 2**40, 2**62, 2**63, 2**80, -1, -512, -1024, -(2**40), -(2**63)]
TYPES = [b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"L", b"K", b"x", b"g", b"Z"]
FIELDS = {"mode": (100, 8), "size": (124, 12), "mtime": (136, 12), "devmajor": (329, 8)}


def number_field(number, length, rng):
    if 0 <= number < 8 ** (length - 1) and rng.random() < 0.7:
        return b"%0*o\0" % (length - 1, number)
    if rng.random() < 0.2:
        return rng.randbytes(length)
    if not -(2 ** (8 * length - 9)) <= number < 2 ** (8 * length - 9):
        number = -1 if number < 0 else 2 ** (8 * length - 9) - 1
    return number.to_bytes(length, "big", signed=True) if number < 0 else b"\x80" + number.to_bytes(length - 1, "big")


@pytest.mark.parametrize("kind", FORMATS)
def test_forged_headers(tmp_path, kind):
    """Forged numbers, types and names with a valid checksum are refused, or read from inside the shard."""
    data = make_shard(kind)
    headers, rng = [start for part, start, _ in layout(data) if part == "header"], random.Random(3)
    refused = 0
    for _ in range(250):
        forged = data
        for at in rng.choices(headers, k=rng.choice((1, 1, 2))):
            header = bytearray(forged[at : at + BLOCK])
            what = rng.choice((*FIELDS, "size", "size", "type", "name"))
            if what == "type":
                header[156:157] = rng.choice(TYPES)
            elif what == "name":
                header[:8] = rng.randbytes(8)
            else:
                start, length = FIELDS[what]
                header[start : start + length] = number_field(rng.choice(NUMBERS), length, rng)
            forged = forged[:at] + with_checksum(bytes(header)) + forged[at + BLOCK :]
        got = open_shard(tmp_path / "s", forged)
        refused += got is None
        assert got is None or all(image in forged and label < MAX_CLASSES for label, image in got)
    assert refused > 100


def member(name, content=b"", kind=b"0", size=None):
    """A member of any type and any size in its header, with a valid checksum."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size is not None:
        header[124:136] = (size % 2**96).to_bytes(12, "big")
        header[124] |= 0x80
    return with_checksum(bytes(header)) + content + bytes(-len(content) % BLOCK)


END = bytes(2 * BLOCK)
LABEL = member("0.cls", b"0")


def record(key, value):
    """A record of an extended header."""
    text = f" {key}={value}\n".encode()
    length = next(n for n in range(99999) if n == len(text) + len(str(n)))
    return str(length).encode() + text


FORGED = {
    "size below zero": (member("0.jpg", b"x", size=-512) + LABEL, "unexpected end of data in 0.jpg"),
    "size of 2^70": (member("0.jpg", b"x", size=2**70) + LABEL, "unexpected end of data in 0.jpg"),
    "extended header of 2^40": (member("x", b"", b"x", 2**40) + LABEL, "unexpected end of data"),
    "extended header below zero": (member("x", b"", b"x", -1024) + LABEL, "unexpected end of data"),
    "long name of 2^40": (member("x", b"", b"L", 2**40) + LABEL, "unexpected end of data"),
    "long name": (member("x", b"a" * 5000, b"L") + LABEL, "the name at byte 5632 is longer than 4096"),
    "large header": (member("x", b"a" * 2**21, b"x") + LABEL, "the extended header at byte 512 has 2097152 bytes"),
    "chain of headers": (member("x", record("path", "0.cls"), b"x") * 3000 + LABEL, "no image"),
    "headers and no member": (member("x", record("path", "a.cls"), b"x"), "a proper end at byte 1024"),
    "digits": (member("x", b"1" * 2**20, b"x") + LABEL, "an extended header is damaged"),
    "record of length 0": (member("x", b"0 a=b\n", b"x") + LABEL, "an extended header is damaged"),
    "record too long": (member("x", b"99 path=b\n", b"x") + LABEL, "an extended header is damaged"),
    "record's size": (member("x", record("size", "-512"), b"x") + LABEL, "unexpected end of data in 0.cls"),
    "record's size of 2^80": (member("x", record("size", str(2**80)), b"g") + LABEL, "unexpected end of data in 0.cls"),
    "sparse": (member("0.jpg", b"x", b"S") + LABEL, "0.jpg is stored as a sparse file"),
    "sparse record": (
        member("x", record("GNU.sparse.major", "1") + record("GNU.sparse.realsize", 2**40), b"x") + LABEL,
        "0.cls is stored as a sparse file",
    ),
    "link to itself": (member("0.cls", b"", b"2") + member("0.jpg", b"x"), "0.cls is a link or a special file"),
    "hard link": (member("0.jpg", b"", b"1") + LABEL, "0.jpg is a link or a special file"),
    "device": (member("0.jpg", b"", b"3") + LABEL, "0.jpg is a link or a special file"),
    "pipe": (member("0.jpg", b"", b"6") + LABEL, "0.jpg is a link or a special file"),
    "label of 2 MiB": (member("0.jpg", b"x") + member("0.cls", b"1" * 2**21), "2097152 bytes are more than 1048576"),
    "nested": (member("0.jpg", b"x") + member("0.json", b"[" * 10**6), "0.json holds no label: "),
    "nested label": (
        member("0.jpg", b"x") + member("0.json", b'{"label": ' + b"[" * 900 + b"]" * 900 + b"}"),
        "0.json holds no label: a list is not a whole number",
    ),
    "digits of a label": (member("0.jpg", b"x") + member("0.json", b'{"label": ' + b"1" * 10**6 + b"}"), "no label: "),
    "text as it stands in no line": (
        member("0.jpg", b"x") + member("0.cls", b"\x1b[2J\n\xff\r0"),
        r"0.cls holds no label: '\x1b[2J\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_forged_members(tmp_path, case):
    content, message = FORGED[case]
    (tmp_path / "train-0.tar").write_bytes(content + END)
    with pytest.raises(UserError) as error:
        tar_shards.TarShards(str(tmp_path), "train")
    assert message in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_random_members(tmp_path):
    """Shards of random members are read or refused."""
    rng = random.Random(4)
    names = "0.jpg 0.cls 0.json 1.a.jpg 1.a.cls a/0.png a/0.cls ./a/1.gif a/1.cls .b/0.jpg x/ README ../0.jpg".split()
    contents = [b"", b"0", b"1", b"1.7", b"-1", b"{}", b'{"label": 1}', b"null", b'{"label": 1e400}', b"\0" * 700]
    kinds, sizes = [b"0"] * 40 + TYPES, [None] * 90 + NUMBERS
    good = member("good.jpg", b"right") + member("good.cls", b"7")
    read = 0
    for _ in range(300):
        members = [
            member(rng.choice(names), rng.choice(contents), rng.choice(kinds), rng.choice(sizes))
            for _ in range(rng.randrange(1, 5))
        ]
        got = open_shard(tmp_path / "s", good + b"".join(members) + rng.choice((END, END, END, b"", b"\1" * BLOCK)))
        assert got is None or got[0] == (7, b"right")
        read += got is not None
    assert 40 < read < 260


# ---- the index


@pytest.fixture
def indexed(tmp_path):
    """The index of a shard, and their content."""
    data = make_shard("ustar", extra=[("c0/left.cls", b"0")])
    want = open_shard(tmp_path / "s", data)
    source = tar_shards.TarShards(str(tmp_path / "s"), "train")
    return tmp_path / "s" / "index-train.npz", (want, source.classes)


def read_again(path):
    source = tar_shards.TarShards(str(path.parent), "train")
    return [(int(label), source.read(index)) for index, label in enumerate(source.labels)], source.classes


def test_damaged_indices(indexed, caplog):
    """A damaged index is made again with one line in the log; its content is always right."""
    path, want = indexed
    good, rng = path.read_bytes(), random.Random(5)
    said = 0
    for number in range(300):
        at = rng.randrange(len(good))
        if number % 3 == 0:
            damaged = good[:at]
        elif number % 3 == 1:
            damaged = good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :]
        else:
            overwritten = rng.choice((rng.randbytes(8), b"\xff" * 8, bytes(8)))
            damaged = good[:at] + overwritten + good[at + 8 :]
        path.write_bytes(damaged)
        caplog.clear()
        assert read_again(path) == want, (number, at)
        lines = [record.getMessage() for record in caplog.records]
        assert lines[-1].endswith("1 labels have no image of a known format and are left out; the first: train-0.tar: "
                                  "c0/left (.cls)")  # fmt: skip
        assert [line.startswith(f"{path} cannot be used and is made again: ") for line in lines[:-1]] in ([], [True])
        said += len(lines) - 1
        assert (len(lines) == 2) == (path.read_bytes() == good != damaged)
    assert said > 200


def array_bytes(array, shape=None):
    """Return a .npy file, whose header may have another shape."""
    file, dtype = io.BytesIO(), np.lib.format.dtype_to_descr(array.dtype)
    header = {"descr": dtype, "fortran_order": False, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def forge(path, compression=zipfile.ZIP_STORED, shape=None, **arrays):
    """Replace arrays in an index, with matching CRCs."""
    with np.load(path) as file:
        kept = dict(file) | {name: np.array(array) for name, array in arrays.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in kept.items():
            archive.writestr(f"{name}.npy", array_bytes(array, shape if name == "offset" else None))


def text(path, name, change):
    with np.load(path) as file:
        return change(str(file[name]))


FORGERIES = {
    "a shape of 2^60": lambda path: forge(path, shape=(2**60,)),
    "a shape of 2^40 columns": lambda path: forge(path, shape=(6, 2**40)),
    "compressed zeros": lambda path: forge(path, zipfile.ZIP_DEFLATED, offset=np.zeros(2**24, np.int64)),
    "a million": lambda path: forge(path, **{name: np.full(2**22, 512) for name in tar_shards.COLUMNS}),
    "int32": lambda path: forge(path, size=np.zeros(6, np.int32)),
    "floats": lambda path: forge(path, labels=np.full(6, np.nan)),
    "no images": lambda path: forge(path, **{name: np.zeros(0, np.int64) for name in tar_shards.COLUMNS}),
    "no axis": lambda path: forge(path, **{name: np.int64(512) for name in tar_shards.COLUMNS}),
    "a negative offset": lambda path: forge(path, offset=[-512, 2048, 4096, 6144, 8192, 10240]),
    "offsets in a header": lambda path: forge(path, offset=[0, 2048, 4096, 6144, 8192, 10240]),
    "overlapping": lambda path: forge(path, offset=[512] * 6),
    "in another order": lambda path: forge(path, offset=[10752, 8704, 6656, 4608, 2560, 512]),
    "beyond the end": lambda path: forge(path, offset=np.arange(1, 7) * 10**6),
    "a size beyond the end": lambda path: forge(path, size=[300, 301, 302, 303, 304, 10**6]),
    "a size of 2^63 - 1": lambda path: forge(path, size=[300, 301, 302, 303, 304, 2**63 - 1]),
    "a negative size": lambda path: forge(path, size=[300, 301, 302, 303, 304, -1]),
    "a negative shard": lambda path: forge(path, shard=[-1] * 6),
    "a negative label": lambda path: forge(path, labels=[-2] * 6),
    "a label of 10^18": lambda path: forge(path, labels=[0, 1, 2, 0, 1, 10**18]),
    "classes without an end": lambda path: forge(path, classes="[" * 10**5),
    "classes in a list": lambda path: forge(path, classes='["a"]'),
    "classes that are numbers": lambda path: forge(path, classes='{"0": 1}'),
    "classes of one name": lambda path: forge(path, classes='{"0": "a", "1": "a"}'),
    "classes of two lines": lambda path: forge(path, classes=json.dumps({"0": "a\nb"})),
    "left out on two lines": lambda path: forge(path, left_out="nothing\n\x1b[2J"),
    "other shards": lambda path: forge(path, of=text(path, "of", lambda of: of.replace("train-0", "train-1"))),
    "an array of texts": lambda path: forge(path, left_out=["a"] * 10**4),
    "objects": lambda path: np.savez(path, of=np.array([{}], object)),
    "a file of 10^12 zeros": lambda path: os.truncate(path, 10**12),
    "a link": lambda path: (path.rename(path.with_name("other")), path.symlink_to("/dev/zero")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_indices(indexed, caplog, case):
    path, want = indexed
    FORGERIES[case](path)
    tracemalloc.reset_peak()
    caplog.clear()
    assert read_again(path) == want
    lines = [record.getMessage() for record in caplog.records]
    assert all(line.isprintable() and len(line) < 500 for line in lines)
    assert len(lines) == 2 - (case == "other shards")
    caplog.clear()
    if case != "a folder":
        assert read_again(path) == want
        assert len(caplog.records) == 1  # the new one is used
