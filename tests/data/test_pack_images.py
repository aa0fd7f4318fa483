"""Packing images into tar shards: contents, interruptions, odd targets and names, broken files."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from data_helpers import contents, run_pack
from fork_server import ForkedScript, run_forked
from helpers import REPOSITORY, encoded
from PIL import Image

from benchmarks import bench_data
from tools import pack_images
from util import cli
from util.data.sources import folders, readers
from util.errors import RunError, UserError
from util.files import printable
from util.lock import lock_folder


def test_packed_images(photographs, tmp_path, capsys):
    """Larger training images are resized and re-encoded; all other images, and all of val, keep their bytes."""
    for split in ("train", "val"):
        folder = tmp_path / "data" / split / "a.class"
        folder.mkdir(parents=True)
        (folder / "large.image.jpg").write_bytes(encoded(photographs[0]))
        (folder / "large.png").write_bytes(encoded(photographs[1], "PNG"))
        (folder / "small.png").write_bytes(encoded(photographs[1].resize((90, 64)), "PNG"))
    run_pack(tmp_path / "data", tmp_path / "shards", "--short_side", 100)
    assert "train: 3 images in 1 shards" in capsys.readouterr().out
    packed, folder = (readers.open_source(path, "train") for path in (f"wds:{tmp_path}/shards", str(tmp_path / "data")))
    assert packed.classes == ["a.class"]
    found = {packed.name(i).rpartition("/")[2]: packed.read(i) for i in range(3)}
    assert set(found) == {"0_large_image.jpg", "1_large.jpg", "2_small.png"}
    for name, photo in (("0_large_image.jpg", photographs[0]), ("1_large.jpg", photographs[1])):
        with Image.open(io.BytesIO(found[name])) as image:
            assert (image.format, image.size) == ("JPEG", (149, 100))
            want = np.array(photo.resize(image.size, Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(np.array(image.convert("RGB")) - want).mean() < 5
    assert found["2_small.png"] == folder.read(2)
    val, folder = (readers.open_source(path, "val") for path in (f"wds:{tmp_path}/shards", str(tmp_path / "data")))
    assert contents(val) == contents(folder)


@pytest.mark.parametrize("needs", ["nothing", "tifffile"])
def test_images_with_other_channels_are_packed_unchanged(photographs, tmp_path, capsys, monkeypatch, needs):
    """Those of alpha, several bands or pages, and arrays; broken ones are left out with a reason that can help."""
    photo, train = photographs[0], tmp_path / "data" / "train" / "a"
    train.mkdir(parents=True)
    kept = {"rgba.png": photo.convert("RGBA"), "grey_alpha.png": photo.convert("LA"), "cmyk.tif": photo.convert("CMYK")}
    for name, image in kept.items():
        image.save(train / name)
    photo.convert("L").save(train / "pages.tif", save_all=True, append_images=[photo.convert("L")] * 4)
    photo.save(train / "rgb.tif")
    photo.convert("L").save(train / "grey.png")
    photo.convert("RGBA").save(train / "broken.png")
    os.truncate(train / "broken.png", 2000)
    kept |= {"pages.tif": None}
    if needs == "tifffile":
        tifffile = pytest.importorskip("tifffile")
        bands = np.dstack([photo, photo.convert("LA")])  # (H, W, 5)
        tifffile.imwrite(train / "rgb_and_two.tif", bands, photometric="rgb", planarconfig="contig")
        tifffile.imwrite(train / "five.tif", bands.astype(np.uint16), photometric="minisblack", planarconfig="contig")
        kept |= {"rgb_and_two.tif": None, "five.tif": None}
        (train / "short.tif").write_bytes((train / "five.tif").read_bytes()[:-1000])
    broken = 2 if needs == "tifffile" else 1
    run_pack(tmp_path / "data", tmp_path / "shards", "--short_side", 32, "--max_bad_samples", broken)
    out = capsys.readouterr().out
    assert f"{len(kept)} images are neither grey nor RGB, and are stored unchanged\n" in out
    assert f"left out: {broken} broken images:\n" in out
    packed = readers.open_source(f"wds:{tmp_path / 'shards'}", "train")
    stored = [packed.read(index) for index in range(len(packed.labels))]
    for name in kept:
        assert (train / name).read_bytes() in stored
    sizes = sorted(image.size for image in (Image.open(io.BytesIO(data)) for data in stored if data[:2] == b"\xff\xd8"))
    assert (len(stored), sizes) == (len(kept) + 2, [(47, 32)] * 2)


def test_arrays_are_packed_unchanged(photographs, tmp_path, capsys):
    train = tmp_path / "data" / "train" / "a"
    train.mkdir(parents=True)
    np.save(train / "0.npy", np.dstack([photographs[0], photographs[0]]))  # (H, W, 6)
    (train / "1.npy").write_bytes((train / "0.npy").read_bytes()[:-1])
    run_pack(tmp_path / "data", tmp_path / "shards", "--short_side", 32, "--max_bad_samples", 1)
    packed = readers.open_source(f"wds:{tmp_path / 'shards'}", "train")
    assert [packed.read(0)] == [(train / "0.npy").read_bytes()]
    out = capsys.readouterr().out
    assert "1 images are neither grey nor RGB, and are stored unchanged\n" in out
    assert "1.npy: it ends after" in out


def test_packing_resumes(jpeg_folder, tmp_path):
    """After a kill, the missing shards are written, and equal those of an uninterrupted run."""
    words = ["--short_side", "64", "--shard_images", "2"]
    run_pack(jpeg_folder, tmp_path / "whole", *words)
    command = [sys.executable, REPOSITORY / "tools" / "pack_images.py", jpeg_folder, tmp_path / "shards", *words]
    process = ForkedScript([str(w) for w in command], stderr=subprocess.DEVNULL, start_new_session=True)
    first = tmp_path / "shards" / "train" / "000000.tar"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, 9)
    process.wait()
    folder = tmp_path / "shards" / "train"
    (folder / "000005.tar").unlink(missing_ok=True)
    (folder / "000005.partial").write_text("half")
    written = first.stat().st_mtime_ns
    run_pack(jpeg_folder, tmp_path / "shards", *words)
    assert first.stat().st_mtime_ns == written
    for shard in sorted((tmp_path / "whole").rglob("*.tar")):
        assert (tmp_path / "shards" / shard.relative_to(tmp_path / "whole")).read_bytes() == shard.read_bytes()
    assert not list(folder.glob("*.partial"))
    with pytest.raises(UserError, match="holds shards of other images or settings"):
        run_pack(jpeg_folder, tmp_path / "shards", "--short_side", "32", "--shard_images", "2")


def _killed_at(moment, folder, words):
    """Pack in this process; kill it before file operation number `moment` in `folder` (open, rename or remove)."""
    os.setsid()
    left = moment

    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    run_pack(*words)


def files_of(folder):
    """Return the content of all files except the index, whose times differ, and the lock, which names a process."""
    kept = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("index-", "run.lock")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_packing_resumes_after_a_kill_at_any_moment(jpeg_folder, tmp_path, capsys):
    """The same command then gives the files and the broken images of an uninterrupted run."""
    data = tmp_path / "data"
    for label in (0, 1):
        shutil.copytree(jpeg_folder / "train" / f"class_{label}", data / "train" / f"class_{label}")
    names = ["broken.jpg", "of two\nlines.jpg", "also broken.jpg"]
    for name in names:
        (data / "train" / "class_0" / name).write_bytes(b"nothing")
    words = ["--short_side", 64, "--shard_images", 5, "--max_bad_samples", 3]
    run_pack(data, tmp_path / "whole", *words)
    want, whole = files_of(tmp_path / "whole"), capsys.readouterr().out
    assert "train: 16 images in 4 shards" in whole
    assert all(f"class_0/{printable(name)}: " in whole for name in names)
    fork = multiprocessing.get_context("fork")
    for moment in range(100):
        folder = tmp_path / f"killed_{moment}"
        process = fork.Process(target=_killed_at, args=(moment, folder, (data, folder, *words)))
        process.start()
        process.join()  # with a timeout, it would also wait for the workers
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers
        capsys.readouterr()
        run_pack(data, folder, *words)
        assert files_of(folder) == want, moment
        assert capsys.readouterr().out.replace(str(folder), "") == whole.replace(str(tmp_path / "whole"), ""), moment
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert moment > 10


def test_packing_again_after_an_image_was_repaired(jpeg_folder, tmp_path, capsys):
    """The list of broken images of a removed shard is not reused."""
    data, good = tmp_path / "data", (jpeg_folder / "train" / "class_0" / "0.jpg").read_bytes()
    shutil.copytree(jpeg_folder, data)
    (data / "train" / "class_0" / "0.jpg").write_bytes(b"nothing")
    words = [data, tmp_path / "shards", "--short_side", 64, "--shard_images", 100, "--max_bad_samples", 1]
    run_pack(*words)
    (tmp_path / "shards" / "train" / "000000.tar").unlink()
    (data / "train" / "class_0" / "0.jpg").write_bytes(good)
    capsys.readouterr()
    run_pack(*words)
    out = capsys.readouterr().out
    assert "train: 24 images" in out
    assert "left out" not in out


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("more", [[], ["--short_side", 64]])
def test_an_unreadable_file_ends_packing(jpeg_folder, tmp_path, monkeypatch, number, more):
    """It may be readable later, so it is not left out, and the same command resumes."""
    read = folders.Folder.read

    def failing(source, index):
        if index == 5:
            raise OSError(number, os.strerror(number), source.name(index))
        return read(source, index)

    words = [jpeg_folder, tmp_path / "shards", "--shard_images", 5, "--max_bad_samples", 9, *more]
    with monkeypatch.context() as patch:
        patch.setattr(folders.Folder, "read", failing)
        with pytest.raises(RunError, match=rf"class_0/5\.jpg: {os.strerror(number)}.*the same command resumes"):
            run_pack(*words)
    run_pack(*words)
    run_pack(jpeg_folder, tmp_path / "whole", "--shard_images", 5, *more)
    for shard in (tmp_path / "whole").rglob("*.tar"):
        assert (tmp_path / "shards" / shard.relative_to(tmp_path / "whole")).read_bytes() == shard.read_bytes()


def test_broken_links_are_broken_images(jpeg_folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(jpeg_folder / "train", data / "train")
    (data / "train" / "class_0" / "a.jpg").symlink_to(tmp_path / "nowhere")
    (data / "train" / "class_0" / "b.jpg").symlink_to("b.jpg")
    run_pack(data, tmp_path / "shards", "--max_bad_samples", 2)
    assert "left out: 2 broken images:\n  " in capsys.readouterr().out


def test_packing_leaves_broken_images_out(jpeg_folder, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(jpeg_folder, folder)
    for split in ("train", "val"):
        (folder / split / "class_0" / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"1 broken images:\n  .*broken\.jpg: .*\n.*more than 0 of 25"):
        run_pack(folder, tmp_path / "stopped", "--short_side", 64)
    words = [folder, tmp_path / "shards", "--short_side", 64, "--max_bad_samples", 1]
    for _ in range(2):  # the second run has nothing to do
        capsys.readouterr()
        run_pack(*words)
        out = capsys.readouterr().out
        assert "train: 24 images" in out
        assert "left out: 1 broken images:\n  " in out
        assert "val: 8 images" in out  # evaluation reports it


def test_user_mistakes_in_packing(tmp_path, capsys, monkeypatch):
    for words, message in (
        ([tmp_path, tmp_path / "x"], "no train or val in it; --allow_unlabelled packs"),
        ([], "required: SRC, DST"),
    ):
        monkeypatch.setattr(sys, "argv", ["pack_images", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            cli.run_main(pack_images.main, pack_images.get_args_parser())
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


def test_a_mistake_in_val_ends_packing_before_train(jpeg_folder, tmp_path):
    """Images without class folders, and shards of other images."""
    shutil.copytree(jpeg_folder / "train", tmp_path / "data" / "train")
    (tmp_path / "data" / "val").mkdir()
    with pytest.raises(UserError, match="any class folder"):
        run_pack(tmp_path / "data", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    (tmp_path / "other" / "val").mkdir(parents=True)
    (tmp_path / "other" / "val" / "packed.json").write_text("{}")
    with pytest.raises(UserError, match="other/val holds shards of other images or settings"):
        run_pack(jpeg_folder, tmp_path / "other")
    assert not list(tmp_path.rglob("*.tar"))
    with pytest.raises(UserError, match=r"/dev/null"):
        run_pack(jpeg_folder, "/dev/null")


def test_a_second_packer_is_refused(jpeg_folder, tmp_path):
    (tmp_path / "train").mkdir()
    lock_folder(tmp_path / "train")
    done = run_forked([REPOSITORY / "tools" / "pack_images.py", jpeg_folder, tmp_path])
    assert done.returncode == 2
    assert re.search(rf"error: DST {tmp_path}/train is in use by process {os.getpid()} on ", done.stderr)


def test_packed_json_holds_the_settings(shards):
    plan = json.loads((shards / "train" / "packed.json").read_text())
    assert (plan["images"], plan["short_side"], plan["shard_images"]) == (24, None, 5)


@pytest.fixture
def data(jpeg_folder, tmp_path):
    """Two classes of 8 training images."""
    for label in (0, 1):
        shutil.copytree(jpeg_folder / "train" / f"class_{label}", tmp_path / "data" / "train" / f"class_{label}")
    return tmp_path / "data"


@pytest.fixture
def target(data, tmp_path):
    """Shards of 5 images; one broken image is left out."""
    (data / "train" / "class_0" / "x.jpg").write_bytes(b"nothing")
    run_pack(data, tmp_path / "shards", *WORDS)
    return tmp_path / "shards" / "train"


WORDS = "--short_side", 64, "--shard_images", 5, "--max_bad_samples", 3


def test_shards_without_packed_json_are_refused(data, target):
    (target / "packed.json").unlink()
    (target / "000003.tar").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    with pytest.raises(UserError, match=r"shards/train holds shards, but no packed\.json"):
        run_pack(data, target.parent, *WORDS)
    assert {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")} == before


def test_a_foreign_shard_is_refused(data, target):
    shutil.copy(target / "000000.tar", target / "000009.tar")
    (target / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000009\.tar is not one of the shards that are packed here"):
        run_pack(data, target.parent, *WORDS)
    assert not (target / "000001.tar").exists()


@pytest.mark.parametrize("name", ["packed.json", "broken.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 10**5, b'{"images": NaN}', b"[1]", b'"text"'])
def test_damaged_files_in_the_target(data, target, name, content):
    if name == "broken.json":
        (path,) = target.glob("*.broken.json")
    else:
        path = target / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: |holds shards of other images") as raised:
        run_pack(data, target.parent, *WORDS)
    assert "\n" not in str(raised.value)
    assert str(target) in str(raised.value)


def test_a_damaged_list_in_val_ends_packing_before_train(data, tmp_path):
    shutil.copytree(data / "train", data / "val")
    run_pack(data, tmp_path / "shards")
    (tmp_path / "shards" / "train" / "000000.tar").unlink()
    (tmp_path / "shards" / "val" / "000000.broken.json").write_text("[")
    with pytest.raises(UserError, match=r"val/000000\.broken\.json is damaged"):
        run_pack(data, tmp_path / "shards")
    assert not (tmp_path / "shards" / "train" / "000000.tar").exists()


def test_links_are_replaced_and_not_followed(data, tmp_path):
    """If an output file is already a link, its target stays unchanged."""
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


def test_class_names_that_are_not_utf8(data, tmp_path, capsys):
    """Names of members are printable, and classes have the same names as in the folder."""
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
    run_pack(data, tmp_path / "shards", *WORDS)  # nothing to do
    assert line in capsys.readouterr().out


def test_classes_with_the_same_printed_name_are_refused(data, tmp_path):
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


def test_packing_into_the_source_is_refused(data):
    with pytest.raises(UserError, match="is SRC: choose another folder for the shards"):
        pack_images.main(pack_images.get_args_parser().parse_args([str(data), str(data)]))


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_share_of_crops_that_are_enlarged(recipe):
    """All of a small photograph, none of a large one."""
    assert bench_data.enlarged_crops(recipe, 160, 120, draws=50)["crops"] == 1
    assert bench_data.enlarged_crops(recipe, 1600, 1200, draws=50)["crops"] == 0
    found = bench_data.enlarged_crops(recipe, 400, 300, draws=200)
    assert found["area"] == bench_data.SIZES[recipe] ** 2 / (400 * 300)
    assert 0.05 < found["crops"] < 0.7
