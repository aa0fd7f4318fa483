"""Packing: targets that hold something else, names of any kind, files that are no images."""

import json
import os
import shutil
import tarfile

import pytest
from helpers import encoded
from PIL import Image

from tools import pack_images
from util.data import readers
from util.errors import RunError, UserError


def run_pack(*words):
    pack_images.main(pack_images.get_args_parser().parse_args([str(word) for word in (*words, "--num_workers", 1)]))


@pytest.fixture
def data(jpeg_folder, tmp_path):
    """Two classes of 8 images to train."""
    for label in (0, 1):
        shutil.copytree(jpeg_folder / "train" / f"class_{label}", tmp_path / "data" / "train" / f"class_{label}")
    return tmp_path / "data"


@pytest.fixture
def target(data, tmp_path):
    """Its shards, of 5 images each; one image is left out."""
    (data / "train" / "class_0" / "x.jpg").write_bytes(b"nothing")
    run_pack(data, tmp_path / "shards", *WORDS)
    return tmp_path / "shards" / "train"


WORDS = "--short_side", 64, "--shard_images", 5, "--max_bad_samples", 3


def test_shards_without_their_plan_are_refused(data, target):
    (target / "packed.json").unlink()
    (target / "000003.tar").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    with pytest.raises(UserError, match=r"shards/train holds shards, but no packed\.json"):
        run_pack(data, target.parent, *WORDS)
    assert {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")} == before


def test_a_shard_of_something_else_is_refused(data, target):
    shutil.copy(target / "000000.tar", target / "000009.tar")
    (target / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000009\.tar is none of the shards that are packed here"):
        run_pack(data, target.parent, *WORDS)
    assert not (target / "000001.tar").exists()


@pytest.mark.parametrize("name", ["packed.json", "broken.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 10**5, b'{"images": NaN}', b"[1]", b'"text"'])
def test_damaged_files_of_a_target(data, target, name, content):
    if name == "broken.json":
        (path,) = target.glob("*.broken.json")
    else:
        path = target / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: |holds shards of other images") as raised:
        run_pack(data, target.parent, *WORDS)
    assert "\n" not in str(raised.value)
    assert str(target) in str(raised.value)


def test_a_damaged_list_of_val_ends_packing_before_train(data, tmp_path):
    shutil.copytree(data / "train", data / "val")
    run_pack(data, tmp_path / "shards")
    (tmp_path / "shards" / "train" / "000000.tar").unlink()
    (tmp_path / "shards" / "val" / "000000.broken.json").write_text("[")
    with pytest.raises(UserError, match=r"val/000000\.broken\.json is damaged"):
        run_pack(data, tmp_path / "shards")
    assert not (tmp_path / "shards" / "train" / "000000.tar").exists()


def test_links_are_replaced_and_not_followed(data, tmp_path):
    """A name that will be written may be a link to another file already, which stays as it is."""
    folder = tmp_path / "shards" / "train"
    folder.mkdir(parents=True)
    other = tmp_path / "other"
    other.write_text("kept")
    (data / "train" / "class_0" / "x.jpg").write_bytes(b"nothing")
    for name in ("000000.partial", "000000.broken.json", "packed.partial"):
        (folder / name).symlink_to(other)
    run_pack(data, tmp_path / "shards", "--short_side", 64, "--max_bad_samples", 1)
    assert other.read_text() == "kept"
    assert not list(folder.glob("*.partial"))
    assert len(json.loads((folder / "000000.broken.json").read_text())) == 1
    assert not [path for path in folder.rglob("*") if path.is_symlink()]


def test_names_that_are_not_utf_8(data, tmp_path, capsys):
    """Members of the shards are printable, and classes are called as they are in the folder."""
    train = os.fsencode(data / "train")
    os.rename(train + b"/class_0", train + b"/caf\xe9")
    for name in (b"\xe9.jpg", b"\xe8.jpg", b"two\nlines.jpg"):
        shutil.copy(train + b"/class_1/0.jpg", train + b"/caf\xe9/" + name)
    with open(train + b"/caf\xe9/broken\xe9.jpg", "wb") as file:
        file.write(b"nothing")
    run_pack(data, tmp_path / "shards", *WORDS)
    folder, packed = (readers.open_source(path, "train") for path in (str(data), f"wds:{tmp_path / 'shards'}"))
    assert packed.classes == folder.classes == [r"caf\xe9", "class_1"]
    assert len(packed.labels) == 19
    names = []
    for shard in packed.shards:
        with tarfile.open(shard) as tar:
            names += tar.getnames()
    assert len(names) == len(set(names)) == 38
    assert all(name.isprintable() and name.isascii() for name in names)
    assert any(name.endswith(r"_two\nlines.jpg") for name in names)
    (found,) = (tmp_path / "shards" / "train").glob("*.broken.json")
    (line,) = json.loads(found.read_text())
    assert r"train/caf\xe9/broken\xe9.jpg: " in line
    assert line in capsys.readouterr().out
    run_pack(data, tmp_path / "shards", *WORDS)  # nothing is left to do
    assert line in capsys.readouterr().out


def test_classes_of_one_printed_name_are_refused(data, tmp_path):
    shutil.copytree(data / "train" / "class_0", os.fsdecode(os.fsencode(data / "train") + b"/caf\xe9"))
    shutil.copytree(data / "train" / "class_0", data / "train" / r"caf\xe9")
    with pytest.raises(UserError, match=r"2 class folders would be called caf\\xe9"):
        run_pack(data, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("more", [[], ["--short_side", 64]])
def test_a_pipe_is_left_out_and_listed(data, tmp_path, capsys, more):
    os.mkfifo(data / "train" / "class_0" / "pipe.jpg")
    with pytest.raises(RunError, match=r"pipe\.jpg: it is no regular file\nthese are more than 0 of 17"):
        run_pack(data, tmp_path / "stopped", *more)
    run_pack(data, tmp_path / "shards", "--max_bad_samples", 1, *more)
    out = capsys.readouterr().out
    assert "train: 16 images in 1 shards" in out
    assert "class_0/pipe.jpg: it is no regular file" in out


def test_an_image_too_narrow_for_a_jpeg_keeps_its_bytes(data, tmp_path):
    file = encoded(Image.new("RGB", (120, 90000)), "PNG")
    (data / "train" / "class_0" / "narrow.png").write_bytes(file)
    run_pack(data, tmp_path / "shards", "--short_side", 100)
    packed = readers.open_source(f"wds:{tmp_path / 'shards'}", "train")
    assert file in [packed.read(index) for index in range(len(packed.labels))]


def test_workers_that_cannot_be_started(data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_images, "ProcessPoolExecutor", full)
    with pytest.raises(RunError, match=r"no worker can be started: No space left on device; .* larger /dev/shm"):
        run_pack(data, tmp_path / "shards")


def test_packing_among_the_images_is_refused(data):
    with pytest.raises(UserError, match="is SRC: shards among the images would be in their way"):
        pack_images.main(pack_images.get_args_parser().parse_args([str(data), str(data)]))
