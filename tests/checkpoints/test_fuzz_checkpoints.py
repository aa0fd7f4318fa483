"""Files of weights with random damage: the right content or one line; no wrong content if the file has CRCs."""

import io
import json
import logging
import random
import resource
import struct
import time
import warnings
import zipfile
from argparse import Namespace

import pytest
import safetensors.torch
import torch

from util.checkpoints import checkpoint_file
from util.checkpoints.checkpoint_file import say_once
from util.errors import UserError

MEMORY = 512 * 2**20  # bytes that one read may add to the process
SECONDS = 5  # that one read may take
TENSORS = {"a.weight": torch.arange(300.0).view(20, 15), "b": torch.arange(7), "c": torch.zeros(0, 3)}
CONTENT = {"model": TENSORS, "args": Namespace(input_size=[32], order="row"), "epoch": 3, "best": [0.5, None, "x"]}


def saved(form):
    if form == "safetensors":
        return safetensors.torch.save(TENSORS, {"arm": json.dumps({"input_size": [32], "order": "row"})})
    buffer = io.BytesIO()
    torch.save(CONTENT, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


def positions_of_numbers(form, data):
    """Where the structure of a file is: numbers of zip headers, of pickles, or of a safetensors header."""
    if form == "safetensors":
        return range(8 + struct.unpack("<Q", data[:8])[0])
    if form == "legacy":
        return range(data.index(b"\x80\x02", 200) + 400)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        headers = [range(r.header_offset, r.header_offset + 60) for r in archive.infolist()]
        return [i for header in (*headers, range(archive.start_dir, len(data))) for i in header if i < len(data)]


def damaged(form, data, rng):
    """One mutation: a flipped bit, a shorter file, a number overwritten, a piece moved or zeroed."""
    kind = rng.choice(["bit", "bit", "number", "number", "truncate", "zero", "copy", "longer"])
    new, at = bytearray(data), rng.randrange(len(data))
    if kind == "bit":
        new[at] ^= 1 << rng.randrange(8)
    elif kind == "number":
        at, size = rng.choice(list(positions_of_numbers(form, data))), rng.choice([1, 2, 4, 8])
        number = rng.choice([0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size) - 1, rng.getrandbits(8 * size)])
        new[at : at + size] = number.to_bytes(size, "little")
    elif kind == "truncate":
        del new[at:]
    elif kind == "zero":
        new[at : at + 50] = bytes(len(new[at : at + 50]))
    elif kind == "copy":
        source = rng.randrange(len(data))
        new[at : at + 100] = data[source : source + 100]
    else:
        new[at:at] = rng.randbytes(rng.choice([1, 64]))
    return kind, bytes(new)


def same(got, want):
    if isinstance(want, torch.Tensor):
        return isinstance(got, torch.Tensor) and got.dtype == want.dtype and torch.equal(got, want)
    if isinstance(want, dict):
        return isinstance(got, dict) and got.keys() == want.keys() and all(same(got[k], want[k]) for k in want)
    return type(got) is type(want) and got == want


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_random_damage(tmp_path, form):
    rng, data = random.Random(0), saved(form)
    path = tmp_path / ("c.safetensors" if form == "safetensors" else "c.pth")
    want = CONTENT if form != "safetensors" else {"model": TENSORS, "args": CONTENT["args"]}
    path.write_bytes(data)
    assert same(checkpoint_file.read(path), want)
    before, refused, other = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], 0
    for _ in range(1000):
        kind, changed = damaged(form, data, rng)
        path.write_bytes(changed)
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            try:
                other += not same(checkpoint_file.read(path), want)
            except UserError as error:
                refused.append(str(error))
        assert shown == [], kind
        assert time.monotonic() - start < SECONDS, kind
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY
    assert len(refused) > 250
    assert all(str(path) in line and "\n" not in line and len(line) < 1000 for line in refused)
    assert other == 0 or form != "zip"


def test_every_flipped_bit_of_the_tensors(tmp_path):
    """Without a hash: torch itself would load each as other weights."""
    data, path = saved("zip"), tmp_path / "c.pth"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        record = next(r for r in archive.infolist() if r.file_size == 1200)
    begin = data.index(TENSORS["a.weight"].numpy().tobytes(), record.header_offset)
    for at in range(begin, begin + 1200, 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(checkpoint_file.DamagedCheckpoint, match=r"its record c?\S*data/0 is damaged: .* CRC-32"):
            checkpoint_file.read(path)
    begin = saved("legacy").index(TENSORS["a.weight"].numpy().tobytes())
    path.write_bytes(b"".join((saved("legacy")[:begin], b"\1", saved("legacy")[begin + 1 :])))
    assert not same(checkpoint_file.read(path), CONTENT)  # nothing could tell


def rewritten(change=lambda name, part: part, **options):
    """The zip file with its records changed, and right CRCs."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved("zip"))) as old, zipfile.ZipFile(new, "w", **options) as archive:
        for record in old.infolist():
            archive.writestr(record.filename, change(record.filename, old.read(record)))
    return new.getvalue()


def duplicated():
    with warnings.catch_warnings(), zipfile.ZipFile(new := io.BytesIO(rewritten()), "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[-1], b"again")
    return new.getvalue()


def marked_as_folder(data):
    """torch returns uninitialised memory as the content of such a record, whose CRC is right."""
    at = data.rindex(b"archive/data/0") - 8  # in the directory: the record's attributes, its offset, its name
    return data[:at] + b"\x10" + data[at + 1 :]


def larger(data):
    """Both headers of the largest record claim 10^9 bytes."""
    return data.replace(struct.pack("<II", 1200, 1200), struct.pack("<II", 10**9, 10**9))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rewritten(compression=zipfile.ZIP_DEFLATED), "is compressed, which torch.save never does"),
        (duplicated(), "has two of one name"),
        (marked_as_folder(saved("zip")), "data/0 is marked as a folder"),
        (larger(rewritten()), "is larger than its place in the file"),
        (b"PK\3\4" + bytes(100), "unreadable checkpoint"),
        (rewritten(lambda name, part: b"" if name.endswith("data/0") else part), "unreadable checkpoint"),
    ],
    ids=["compressed", "duplicate", "folder", "size", "nothing", "empty record"],
)
def test_archives_that_torch_save_does_not_write(tmp_path, data, message):
    (tmp_path / "c.pth").write_bytes(data)
    with pytest.raises(checkpoint_file.DamagedCheckpoint, match=message):
        checkpoint_file.read(tmp_path / "c.pth")


class Viewed:
    """Pickled, a tensor of any shape over a storage of 4 elements."""

    def __init__(self, size, stride):
        self.size, self.stride = size, stride

    def __reduce__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            storage = torch.ones(4).storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.size, self.stride, False, {})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("size", "stride"), [((10**12,), (0,)), ((10**10,), (1,)), ((3, 3), (1, 1)), ((10**6, 10**6), (0, 0))]
)
def test_tensors_larger_than_their_storage(tmp_path, zipped, size, stride):
    """Copying one would allocate what its shape says."""
    torch.save({"x": Viewed(size, stride)}, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(checkpoint_file.DamagedCheckpoint, match=r"larger than what is stored of it|not resizable"):
        checkpoint_file.read(tmp_path / "c.pth")


def test_tensors_that_share_a_storage_load(tmp_path):
    base = torch.arange(12.0)
    torch.save({"x": base[:6], "y": base[6:].view(2, 3).t(), "tied": base}, tmp_path / "c.pth")
    content = checkpoint_file.read(tmp_path / "c.pth")
    assert same(content, {"x": base[:6], "y": base[6:].view(2, 3).t(), "tied": base})
    assert content["x"].data_ptr() == content["tied"].data_ptr()


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_that_are_not_dense(tmp_path, kind):
    value = torch.eye(3).to_sparse() if kind == "sparse" else torch.ones(3, device="meta")
    torch.save({"x": value}, tmp_path / "c.pth")
    with pytest.raises(checkpoint_file.DamagedCheckpoint, match="its tensor x is not dense"):
        checkpoint_file.read(tmp_path / "c.pth")


def test_files_without_crcs(tmp_path, caplog):
    """torch.save can leave them out: the file loads, and cannot be verified."""
    torch.serialization.set_crc32_options(False)
    try:
        (tmp_path / "c.pth").write_bytes(saved("zip"))
    finally:
        torch.serialization.set_crc32_options(True)
    with caplog.at_level(logging.INFO):
        assert same(checkpoint_file.read(tmp_path / "c.pth"), CONTENT)
    assert f"{tmp_path}/c.pth is in no SHA256SUMS; it has no checksums" in caplog.text


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("zip", "its own checksums are right"),
        ("legacy", "it has no checksums: its content cannot be verified"),
        ("safetensors", "it has no checksums: its content cannot be verified"),
    ],
)
def test_how_a_file_was_verified_is_logged_once(tmp_path, caplog, form, line):
    say_once.cache_clear()
    path = tmp_path / ("c.safetensors" if form == "safetensors" else "c.pth")
    path.write_bytes(saved(form))
    with caplog.at_level(logging.INFO):
        checkpoint_file.read(path)
        checkpoint_file.read(path)
    assert caplog.messages == [f"{path} is in no SHA256SUMS; {line}"]


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONE = json.dumps(ENTRY).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(b"{}", length=2**62), "unreadable checkpoint"),
        (header(b'{"a":' * 100_000), "unreadable checkpoint"),
        (header({"a": {**ENTRY, "shape": [2**61]}}, bytes(8)), "unreadable checkpoint"),
        (header(b'{"a":%s,"a":%s}' % (ONE, ONE), bytes(8)), "two entries of one name"),
        (header(b'{"__metadata__":{"arm":"{}","arm":"1"},"a":%s}' % ONE, bytes(8)), "two entries of one name"),
        (header({"__metadata__": [1], "a": ENTRY}, bytes(8)), "unreadable checkpoint"),
        *(
            (header({"__metadata__": {"arm": text}, "a": ENTRY}, bytes(8)), "its metadata 'arm' are no JSON object")
            for text in ("", "[1]", "3", "{", '{"input_size": Infinity}', "[" * 100_000, "null")
        ),
    ],
)
def test_headers_of_safetensors(tmp_path, data, message):
    (tmp_path / "c.safetensors").write_bytes(data)
    with pytest.raises(checkpoint_file.DamagedCheckpoint, match=message) as caught:
        checkpoint_file.read(tmp_path / "c.safetensors")
    assert "\n" not in str(caught.value)
