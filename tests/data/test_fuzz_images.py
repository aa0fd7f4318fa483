"""Damaged images of every format give an array or `BrokenImage`, in bounded memory and time."""

import contextlib
import io
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from helpers import REPOSITORY, encoded
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from util.data import decode

SIZE = 40, 30  # columns and rows
DAMAGED = 300  # of each kind
pytestmark = pytest.mark.filterwarnings("ignore")  # pytest resets the filter of util.data.decode


def picture():
    rows, columns = np.mgrid[0:30, 0:40].astype(np.uint8)
    return Image.fromarray(np.stack([columns * 6, rows * 8, rows ^ columns], axis=2))


def tiled_tiff(side=16):
    """A TIFF with one tile of zeros for an image of 16 x 16; Pillow cannot write tiles."""
    data = zlib.compress(b"\0" * side**2)
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(data)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + directory + bytes(4)


def frames(kind, **options):
    return encoded(picture(), kind, save_all=True, append_images=[Image.new("RGB", SIZE)] * 2, **options)


KINDS = {
    "JPEG": lambda: encoded(picture()),
    "progressive JPEG": lambda: encoded(picture(), progressive=True),
    "CMYK JPEG": lambda: encoded(picture().convert("CMYK")),
    "MPO": lambda: frames("MPO"),
    "PNG": lambda: encoded(picture(), "PNG"),
    "palette PNG": lambda: encoded(picture().quantize(16), "PNG", transparency=2),
    "16-bit PNG": lambda: encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "PNG"),
    "APNG": lambda: frames("PNG"),
    "GIF": lambda: encoded(picture(), "GIF"),
    "animated GIF": lambda: frames("GIF"),
    "BMP": lambda: encoded(picture(), "BMP"),
    "palette BMP": lambda: encoded(picture().quantize(16), "BMP"),
    "DIB": lambda: encoded(picture(), "DIB"),
    "TIFF": lambda: encoded(picture(), "TIFF"),
    **{
        f"TIFF, {name}": lambda name=name: encoded(picture(), "TIFF", compression=name)
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    },
    "TIFF, group4": lambda: encoded(picture().convert("1"), "TIFF", compression="group4"),
    "tiled TIFF": tiled_tiff,
    "TIFF of pages": lambda: frames("TIFF"),
    "WebP": lambda: encoded(picture(), "WEBP"),
    "lossless WebP": lambda: encoded(picture(), "WEBP", lossless=True),
    "animated WebP": lambda: frames("WEBP"),
    "PPM": lambda: encoded(picture(), "PPM"),
    "PGM": lambda: encoded(picture().convert("L"), "PPM"),
    "PBM": lambda: encoded(picture().convert("1"), "PPM"),
    "PPM in words": lambda: b"P3 40 30 255\n" + b" ".join(b"%d" % value for value in picture().tobytes()),
    "JPEG2000": lambda: encoded(picture(), "JPEG2000"),
    "J2K": lambda: encoded(picture(), "JPEG2000", no_jp2=True),
    "AVIF": lambda: encoded(picture(), "AVIF"),
}
NEEDS = {"AVIF": "avif", "WebP": "webp", "J2K": "jpg_2000", "JPEG2000": "jpg_2000"}


def file_of(kind):
    needed = NEEDS.get(kind.split()[-1])
    if needed and not features.check(needed):
        pytest.skip(f"the installed Pillow is built without {needed}")
    return KINDS[kind]()


def mutations(data, rng):
    """Yield files with flipped bits, overwritten headers, and parts that are cut, repeated or inserted."""
    for _ in range(DAMAGED):
        damaged = bytearray(data)
        how = rng.randrange(6)
        at = rng.randrange(min(len(data), 200) if how < 3 else len(data))
        if how in (0, 3):
            damaged[at] ^= 1 << rng.randrange(8)
        elif how in (1, 4):
            length = rng.choice((1, 2, 4, 8))
            damaged[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f", rng.randbytes(1))) * length
        elif how == 2:
            del damaged[at : at + rng.randrange(1, 20)]
        elif rng.random() < 0.5:
            del damaged[at:]
        else:
            damaged[at:at] = rng.choice((rng.randbytes(9), bytes(damaged[:at][-64:])))
        yield bytes(damaged)


def decoded(data):
    """Return the arrays (h, w, 3) uint8 of both decoders, or None where the image is broken."""
    found, reasons = [], []
    for read in (decode.with_pillow, decode.crop_of, lambda d: decode.crop_of(d, half, (4, 4))):
        try:
            pixels = np.asarray(read(data))
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert pixels.dtype == np.uint8
            assert min(pixels.shape) > 0
            found.append(pixels)
        except decode.BrokenImage as error:
            reasons.append(str(error))
            found.append(None)
    assert all(reason and reason.isprintable() for reason in reasons)
    return found[:2]


def half(height, width):
    return height // 2, width // 2, -(-height // 2), -(-width // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images(kind, monkeypatch, capfd, caplog):
    """Only `BrokenImage` is raised, nothing is printed, and the checksums of a PNG rule out other pixels."""
    monkeypatch.setattr(decode, "MAX_PIXELS", 10**6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6 // 2)  # so that decoding sizes from damaged headers is fast
    data = file_of(kind)
    right = decoded(data)
    assert right[0] is not None
    assert right[0].shape == right[1].shape
    for number, damaged in enumerate(mutations(data, random.Random(kind))):
        for pixels, wanted in zip(decoded(damaged), right, strict=True):
            if pixels is not None and kind.endswith("PNG"):
                assert np.array_equal(pixels, wanted), number
    out, error = capfd.readouterr()
    assert out == ""
    assert error == "" or "TIFF" in kind  # libtiff prints errors itself
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
def test_half_files_are_broken(kind):
    data = file_of(kind)
    if (
        "of pages" in kind or "animated" in kind or kind in ("MPO", "APNG")
    ):  # the first frame is complete in half the file
        data = data[: len(data) // 2 if kind == "TIFF of pages" else len(data) // 8]
    assert decoded(data[: len(data) // 2]) == [None, None]


@pytest.mark.parametrize("kind", ["MPO", "APNG", "animated GIF", "animated WebP", "TIFF of pages"])
def test_the_first_frame_is_read(kind):
    """The others are black."""
    for pixels in decoded(file_of(kind)):
        assert np.abs(pixels.astype(int) - np.array(picture())).mean() < 12


def test_checksums_of_png_chunks_are_checked():
    """Pillow alone does not check the checksum of the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG", compress_level=0)  # stored bytes: only the checksum shows the damage
    at = data.index(b"IDAT") + 300
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with Image.open(io.BytesIO(damaged)) as image, contextlib.suppress(OSError):
        assert not np.array_equal(np.array(image), pixels)  # if this raises, Pillow has begun to check
    for read in (decode.with_pillow, decode.crop_of):
        with pytest.raises(decode.BrokenImage, match="chunk IDAT is damaged"):
            read(damaged)
    end = data.index(b"IEND") - 4
    assert np.array_equal(np.array(decode.with_pillow(data[:end])), pixels)  # only the end marker is missing


@pytest.mark.parametrize("marker", [b"\xff\xd0", b"\xff\xd7", b"\xff\x01", b"\x00\x00", b"\xff\xff\xff"])
def test_odd_markers_in_a_header(photographs, marker):
    """Both decoders read the file or raise `BrokenImage`, and `crop_of` reads all that Pillow reads."""
    data = encoded(photographs[0].resize((40, 30)))
    at = 4 + int.from_bytes(data[4:6], "big")  # after the first segment
    odd = data[:at] + marker + data[at:]
    found = []
    for read in (decode.with_pillow, decode.crop_of):
        try:
            found.append(np.asarray(read(odd)).shape)
        except decode.BrokenImage:
            found.append(None)
    assert found[0] in (None, found[1])


def test_damaged_headers_are_broken_or_read(photographs):
    data = encoded(photographs[0].resize((40, 30)))
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(2, 400)] = rng.integers(256)
        with contextlib.suppress(decode.BrokenImage):
            assert decode.crop_of(bytes(damaged)).ndim == 3


# ---- bounds


def changed(data, *places):
    """Return a file with other bytes at some positions."""
    data = bytearray(data)
    for at, new in places:
        data[at : at + len(new)] = new
    return bytes(data)


def large_jpeg():
    data = encoded(picture())
    return changed(data, (data.index(b"\xff\xc0") + 5, b"\xff\xdc" * 2))


def large_png(side):
    data = changed(encoded(picture(), "PNG"), (16, side.to_bytes(4, "big") * 2))
    return changed(data, (29, zlib.crc32(data[12:29]).to_bytes(4, "big")))


def texts_png():
    """200 texts of 1 MiB, compressed."""
    texts = PngInfo()
    for _ in range(200):
        texts.add_text("key", "x" * 2**20, zip=True)
    return encoded(picture(), "PNG", pnginfo=texts)


def large_tiff():
    data = encoded(picture(), "TIFF", compression="tiff_lzw")
    tags = (data.index(struct.pack("<HHI", tag, 3, 1)) + 8 for tag in (256, 257))
    return changed(data, *((at, (60000).to_bytes(4, "little")) for at in tags))


def long_tag_tiff():
    """A tag of 2^28 values."""
    data = tiled_tiff()
    return changed(data, (data.index(struct.pack("<HHI", 325, 4, 1)) + 4, (2**28).to_bytes(4, "little")))


def large_avif():
    data = encoded(picture(), "AVIF")
    return changed(data, (data.index(b"ispe") + 8, (16000).to_bytes(4, "big") * 2))


LARGE = (60000).to_bytes(4, "big") * 2
BOMBS = {
    "JPEG": large_jpeg,
    "PNG": lambda: large_png(60000),
    "PNG of which Pillow only warns": lambda: large_png(12000),
    "PNG without pixels": lambda: large_png(0),
    "PNG with texts": texts_png,
    "GIF": lambda: changed(encoded(picture(), "GIF"), (6, b"\xff" * 4)),
    "BMP": lambda: changed(encoded(picture(), "BMP"), (18, (60000).to_bytes(4, "little") * 2)),
    "PPM": lambda: b"P6 60000 60000 255 " + bytes(100),
    "TIFF": large_tiff,
    "TIFF of a large tile": lambda: tiled_tiff(12000),
    "TIFF with a long tag": long_tag_tiff,
    "WebP": lambda: changed(encoded(picture(), "WEBP", lossless=True), (21, b"\xff\xff\xff\x0f")),
    "J2K": lambda: changed(encoded(picture(), "JPEG2000", no_jp2=True), (8, LARGE), (24, LARGE)),
    "AVIF": large_avif,
}
READER = r"""
import re, sys
from pathlib import Path
from util.data import decode
# not ru_maxrss, which starts with the memory of the process that has started this one
most = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before = most()
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        data = file.read()
    for read in (decode.with_pillow, decode.crop_of):
        try:
            print("read", path, read(data).size)
        except decode.BrokenImage as error:
            print("broken", path, error)
print(most() - before)
"""


def test_sizes_in_a_header_are_not_allocated(tmp_path):
    """The pixels, texts or values would take 144 MB or more each."""
    paths = []
    for kind, make in BOMBS.items():
        if features.check(NEEDS.get(kind, "zlib")):
            paths.append(tmp_path / kind)
            paths[-1].write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", READER, *paths],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    *results, kilobytes = done.stdout.splitlines()
    assert len(results) == 2 * len(paths)
    assert [line for line in results if not line.startswith("broken")] == []
    assert int(kilobytes) < 100_000


BYTES_PER_PIXEL = 20  # as docs/data.md says


def test_memory_of_decoding(tmp_path):
    """In every format that is common for photographs; JPEG2000 takes most."""
    height, width = 2000, 2500
    photograph = Image.linear_gradient("L").convert("RGB").resize((width, height))
    forms = {"PNG": {}, "TIFF": {}, "JPEG": {"progressive": True}, "WEBP": {"method": 0}, "JPEG2000": {}}
    for kind, options in forms.items():
        (tmp_path / kind).write_bytes(encoded(photograph, kind, **options))
    paths = [tmp_path / kind for kind in forms]
    done = subprocess.run([sys.executable, "-c", READER, *paths], cwd=REPOSITORY, capture_output=True, text=True)
    *results, kilobytes = done.stdout.splitlines()
    assert [line.split()[0] for line in results] == ["read"] * 2 * len(forms)
    assert 1024 * int(kilobytes) / (height * width) == pytest.approx(BYTES_PER_PIXEL, rel=0.1)
