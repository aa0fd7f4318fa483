"""Tar shards: labels, keys and class names; the index of positions."""

import errno
import multiprocessing
import os
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from data_helpers import broken, contents, dataset_of, denied, put, warnings_of, write_labelled, write_shard
from helpers import TINY_FINETUNE, encoded, read_log
from PIL import Image

from Finetuning import main_finetune
from util.data import datasets
from util.data.sources import readers, tar_shards
from util.errors import UserError


def one_shard(folder, *members):
    folder.mkdir(exist_ok=True)
    write_shard(folder / "train-0.tar", members)
    return f"wds:{folder}"


def test_shards_of_other_tools(tmp_path):
    """Shards as on the hub: splits in file names, keys without a folder, labels in .cls or .json."""
    image = encoded(Image.new("RGB", (20, 20)))
    write_shard(tmp_path / "in1k-train-0000.tar", [("a.jpg", image), ("a.json", b'{"label": 2}'), ("a.txt", b"note")])
    write_shard(tmp_path / "in1k-train-0001.tar", [("b.cls", b"1\n"), ("b.JPEG", image)])
    write_shard(tmp_path / "in1k-validation-0.tar", [("x/c.png", image), ("x/c.cls", b"0")])
    train = readers.open_source(f"wds:{tmp_path}", "train")
    assert (train.labels.tolist(), train.classes) == ([2, 1], ["", "", ""])
    assert train.read(1) == image
    assert train.name(1) == f"{tmp_path}/in1k-train-0001.tar: b.JPEG"
    assert readers.open_source(f"wds:{tmp_path}", "val").classes == ["x"]


@pytest.mark.parametrize(
    ("split", "name", "belongs"),
    [
        ("train", "imagenet-train-000.tar", True),
        ("train", "train_0.tar", True),
        ("train", "retrieval-train-0.tar", True),
        ("train", "constrained-0.tar", False),
        ("val", "retrieval-train-0.tar", False),
        ("val", "interval-000.tar", False),
        ("val", "val.000.tar", True),
        ("val", "IN1k_Val00.tar", True),
        ("val", "imagenet1k-validation-00.tar", True),
    ],
)
def test_splits_are_words_in_the_names_of_shards(tmp_path, split, name, belongs):
    write_labelled(tmp_path / name, "a=0")
    if belongs:
        assert len(tar_shards.TarShards(str(tmp_path), split).labels) == 1
    else:
        with pytest.raises(UserError, match=f"no {split}/"):
            tar_shards.TarShards(str(tmp_path), split)


def test_labels_without_image_are_counted(tmp_path, caplog):
    image = encoded(Image.new("RGB", (20, 20)))
    members = [("a/0.jpg", image), ("a/0.cls", b"0"), ("a/1.heic", image), ("a/1.cls", b"0"), ("a/2.cls", b"0")]
    members += [("a/3.json", b'{"label": 0}'), ("a/4.json", b'{"caption": ""}'), ("a/5.cls", b"0"), ("a/5.png", image)]
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train" / "0.tar", members)
    for _ in range(2):  # found anew, and read from the index
        caplog.clear()
        assert len(tar_shards.TarShards(str(tmp_path), "train").labels) == 2
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.getMessage() == (
            f"{tmp_path}/train: 3 labels have no image of a known format and are left out; "
            "the first: 0.tar: a/1 (.heic, .cls)"
        )
    caplog.clear()
    write_shard(tmp_path / "train" / "0.tar", members[:2])
    tar_shards.TarShards(str(tmp_path), "train")
    assert not caplog.records
    write_shard(tmp_path / "train" / "0.tar", members[2:4])
    with pytest.raises(UserError, match=r"the shards hold no image: 1 labels .* a/1 \(\.heic, \.cls\)"):
        tar_shards.TarShards(str(tmp_path), "train")


CLASSES = {
    # train, val, and the error message or None
    "the same": (["a/0=0", "b/1=1", "c/2=2"], ["c/0=2", "a/1=0", "b/2=1"], None),
    "fewer at the end": (["a/0=0", "b/1=1", "c/2=2"], ["a/0=0", "b/1=1"], None),
    "fewer in the middle": (["a/0=0", "b/1=1", "c/2=2"], ["a/0=0", "c/1=2"], None),
    "names in train": (["a/0=0", "b/1=1", "c/2=2"], ["0=0", "1=2", "2=1"], None),
    "names in val": (["0=0", "1=2", "2=1"], ["a/0=0", "b/1=1", "c/2=2"], None),
    "folders that are no classes": (["x/0=0", "x/1=1", "y/2=0", "y/3=2"], ["z/0=0", "z/1=1", "z/2=2"], None),
    "fewer, with other labels": (["a/0=0", "b/1=1", "c/2=2"], ["a/0=0", "b/1=2"], None),
    "other names": (["a/0=0", "b/1=1"], ["a/0=0", "x/1=1"], "images of 1 classes that {train} does not have: x"),
    "another label, unnamed in train": (["a/0=0", "b/1=2"], ["b/0=1"], None),
    "fewer names in val": (["0=0", "1=1", "2=2"], ["a/0=0", "b/1=1"], "has 2 classes; {train} has 3 and does not name"),
    "more in val": (["a/0=0", "b/1=1"], ["a/0=0", "b/1=1", "c/2=2"], "does not have: c"),
    "more in val, without names": (["0=0", "1=1"], ["0=0", "1=1", "2=2"], "does not have: 2"),
    "more in train than outputs": (["0=0", "1=3"], ["0=0", "1=1"], "has 4 classes, the classifier 3"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classes_of_train_and_val(tmp_path, run_script, capsys, case):
    """Classes are matched by name, otherwise by label."""
    train, val, differing = CLASSES[case]
    write_labelled(tmp_path / "train" / "0.tar", *train)
    write_labelled(tmp_path / "val" / "0.tar", *val)
    words = ["--data_path", f"wds:{tmp_path}", "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 2]
    words += ["--mixup", 0, "--cutmix", 0, "--output_dir", tmp_path / "out"]
    if differing is None:
        run_script(main_finetune, *TINY_FINETUNE, *words)
        assert read_log(tmp_path / "out")[0]["test_images"] == len(val)
        fewer = "val has images of 2 of 3 classes" in capsys.readouterr().out
        assert fewer == ("fewer" in case)
    else:
        with pytest.raises(SystemExit) as exit_info:
            run_script(main_finetune, *TINY_FINETUNE, *words)
        assert exit_info.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert differing.format(train=tmp_path / "train") in line


def test_a_broken_image_in_a_shard_is_named(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    write_shard(folder / "0.tar", [("a/b.jpg", b"nothing"), ("a/b.cls", b"0")])
    assert "0.tar: a/b.jpg: " in broken(readers.open_source(f"wds:{tmp_path}", "train"))


LABELS = {
    ".cls": [b"1.7", b"", b"-1", b"true", b"1_0", b"one", b"1 2", b"1e3", b"20261127123456", b"1000000", b"9" * 5000],
    ".json": [b"1.7", b"true", b'"3"', b"[1]", b"{}", b"NaN", b"Infinity", b"-1", b"1e3", b"1000000", b"9" * 5000],
}


@pytest.mark.parametrize("suffix", LABELS)
def test_labels_are_whole_numbers(tmp_path, suffix):
    for number, label in enumerate(LABELS[suffix]):
        content = label if suffix == ".cls" else b'{"label": %s}' % label
        path = one_shard(tmp_path / f"{number}", ("a/b.jpg", b"x"), (f"a/b{suffix}", content))
        with pytest.raises(UserError, match=rf"train-0\.tar: a/b\{suffix} holds no label: ") as error:
            readers.open_source(path, "train")
        assert len(str(error.value)) < 400
    content = b" 999999\n" if suffix == ".cls" else b'{"score": NaN, "label": 999999}'
    source = readers.open_source(one_shard(tmp_path / "good", ("a.jpg", b"x"), (f"a{suffix}", content)), "train")
    assert (source.labels.tolist(), len(source.classes)) == ([999999], 10**6)


def test_a_cls_file_comes_before_a_json_file(tmp_path):
    members = [("a.jpg", b"x"), ("a.json", b"[]"), ("a.cls", b"3"), ("b.jpg", b"y"), ("b.cls", b"4"), ("b.json", b"5")]
    for order in (members, members[::-1]):
        source = readers.open_source(one_shard(tmp_path, *order), "train")
        assert sorted(zip(source.labels.tolist(), map(source.read, (0, 1)), strict=True)) == [(3, b"x"), (4, b"y")]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("k.jpg", "k.jpg"), "image: k.jpg and k.jpg"),
        (("k.jpg", "k.png"), r"image: k.(jpg|png) and k.(jpg|png)"),
        (("a/k.jpg", "./a//k.JPG"), r"image: a/k.(jpg|JPG) and a/k.(jpg|JPG)"),
        (("k.cls", "k.cls"), "cls: k.cls and k.cls"),
        (("k.json", "k.json"), "json: k.json and k.json"),
    ],
)
def test_a_key_has_one_image_and_one_label(tmp_path, names, shown, first):
    members = [("k.jpg", b"x"), ("k.cls", b"0"), ("a/k.cls", b"0")][: 1 if names[0] == "k.json" else 3]
    members = [member for member in members if member[0] not in names]
    both = [(names[first], b'{"label": 0}'), (names[1 - first], b'{"label": 0}')]
    with pytest.raises(UserError, match=rf"train-0\.tar: the key (a/)?k has more than one {shown}$"):
        readers.open_source(one_shard(tmp_path, both[0], *members, both[1]), "train")


def test_dots_in_keys(tmp_path, caplog):
    """A key with dots is read if it has an image and a label; extra files of another key are not."""
    members = [("a.jpg", b"a"), ("a.cls", b"0"), ("img_1.5x.jpg", b"b"), ("img_1.5x.cls", b"1")]
    members += [("n.v2.PNG", b"c"), ("n.v2.json", b'{"label": 2}'), ("x.y/d.jpg", b"d"), ("x.y/d.cls", b"3")]
    path = one_shard(tmp_path, *members)
    source, lines = warnings_of(caplog, path)
    assert [(label, source.read(i)) for i, label in enumerate(source.labels)] == [*enumerate([b"a", b"b", b"c", b"d"])]
    assert not lines
    members += [("a.mask.png", b"mask"), ("a.meta.json", b"[1.5]"), ("e.left.jpg", b"e"), ("a.depth.cls", b"0")]
    source, lines = warnings_of(caplog, one_shard(tmp_path, *members, ("._a.jpg", b""), ("._a.cls", b"\0")))
    assert len(source.labels) == 4
    assert lines == [
        f"{tmp_path}: 1 labels have no image of a known format and are left out; the first: "
        "train-0.tar: a.depth (.cls); 2 images with a dot in their key have no label and are left out; the first: "
        "train-0.tar: a.mask.png; 1 images or folders are hidden and are left out; the first: train-0.tar: ._a.jpg"
    ]
    with pytest.raises(UserError, match="e has no label"):
        readers.open_source(one_shard(tmp_path, *members, ("e.jpg", b"e")), "train")


def test_ignored_archives_are_counted(tmp_path, caplog):
    write_labelled(tmp_path / "train" / "0.tar", "a=0")
    write_labelled(tmp_path / "in1k-train-1.tar", "b=0")
    put(tmp_path, "train/1.tar.gz", "train/2.TAR", "train/._0.tar", "train/packed.json")
    source, lines = warnings_of(caplog, f"wds:{tmp_path}")
    assert [path.name for path in source.shards] == ["0.tar"]
    assert lines == [
        f"{tmp_path}/train: 3 archives are compressed or not beside the other shards and are left out; "
        f"the first: {tmp_path}/train/1.tar.gz"
    ]
    (tmp_path / "train" / "0.tar").unlink()
    (tmp_path / "in1k-train-1.tar").unlink()
    with pytest.raises(UserError, match=r"as a word, only .*train/1\.tar\.gz"):
        tar_shards.TarShards(str(tmp_path), "train")


def gone(path, _):
    path.unlink()


def shrunk(path, _):
    os.truncate(path, 700)


def replaced(path, _):
    path.unlink()
    os.mkfifo(path)


def unreadable(path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tar_shards.os, "pread", fail)


@pytest.mark.parametrize("how", [gone, shrunk, replaced, unreadable])
def test_a_shard_that_becomes_unreadable(tmp_path, monkeypatch, how):
    """Its images are broken images, with the name of the shard; reading the name never raises."""
    path = one_shard(tmp_path, ("a.jpg", b"x" * 900), ("a.cls", b"0"))
    source = readers.open_source(path, "train")
    tar_shards._opened.cache_clear()
    how(tmp_path / "train-0.tar", monkeypatch)
    said = broken(source)
    assert said.startswith(f"{tmp_path}/train-0.tar: the image at byte 512: ")
    assert said.isprintable()
    samples = datasets.SeededSamples(dataset_of(source), 0)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.ImageDataset, "blank", lambda _: "blank")
        assert samples[0, 0] == ("blank", {0: said})


def test_keys_without_image_and_label_are_counted(tmp_path, caplog):
    """A key with an image of an unknown format only is counted; extra files of an image that is read are not."""
    path = one_shard(
        tmp_path,
        ("a.jpg", b"x"),
        ("a.cls", b"0"),
        ("a.txt", b""),
        ("a.mask.npy", b""),
        ("b.heic", b"x"),
        ("README", b""),
    )
    assert len(readers.open_source(path, "train").labels) == 1
    (line,) = caplog.messages
    assert "1 keys have neither an image of a known format nor a label" in line
    assert "train-0.tar: b (.heic)" in line


# ---- the index


def test_the_index_is_reused(shards, monkeypatch):
    want = contents(tar_shards.TarShards(str(shards), "train"))
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "_images_of", None)  # must not be needed
        assert contents(tar_shards.TarShards(str(shards), "train")) == want
    first = sorted((shards / "train").glob("*.tar"))[0]
    write_shard(first, [("class_0/new.jpg", b"new"), ("class_0/new.cls", b"0")])
    assert ("class_0", b"new") in contents(tar_shards.TarShards(str(shards), "train"))


def empty_zip(path):
    with zipfile.ZipFile(path, "w"):
        pass


DAMAGE = {
    "nothing": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no index"),
    "start of a zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(30)),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "middle": lambda path: path.write_bytes(path.read_bytes()[:400] + b"x" * 200 + path.read_bytes()[600:]),
    "without keys": empty_zip,
    "one array": lambda path: np.save(path.open("wb"), np.arange(3)),
    "pickled": lambda path: np.savez(path, of=np.array([{}])),
    "too few sizes": lambda path: changed(path, size=np.arange(3)),
    "a square of labels": lambda path: changed(path, labels=np.zeros((2, 12), int)),
    "labels in words": lambda path: changed(path, labels=np.array(["a"] * 24)),
    "a shard too many": lambda path: changed(path, shard=np.full(24, 5)),
    "no classes": lambda path: changed(path, classes=np.array([], str)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def changed(path, **arrays):
    with np.load(path) as file:
        np.savez(path, **(dict(file) | arrays))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_made_again(shards, damage):
    want = contents(tar_shards.TarShards(str(shards), "train"))
    index = shards / "train" / "index-train.npz"
    good, files = index.read_bytes(), set(index.parent.iterdir())
    DAMAGE[damage](index)
    assert contents(tar_shards.TarShards(str(shards), "train")) == want
    assert index.is_dir() or index.read_bytes() == good
    assert set(index.parent.iterdir()) == files


def test_an_index_that_cannot_be_written_leaves_no_files(shards, monkeypatch):
    def full(file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tar_shards.np, "savez", lambda file, **_: full(file if isinstance(file, Path) else file.name))
    index = shards / "train" / "index-train.npz"
    index.unlink()
    files = set(index.parent.iterdir())
    assert len(tar_shards.TarShards(str(shards), "train").labels) == 24
    assert set(index.parent.iterdir()) - {index.with_suffix(".lock")} == files - {index.with_suffix(".lock")}


def test_the_index_is_readable_by_others(shards):
    """Its mode follows the umask."""
    index, other = shards / "train" / "index-train.npz", shards / "other"
    other.write_text("")
    assert index.stat().st_mode == other.stat().st_mode


def test_a_read_only_folder(shards, monkeypatch):
    (shards / "train" / "index-train.npz").unlink()
    for error in (OSError(errno.ENOLCK, "No locks available"), OSError(errno.ENOSYS, "Function not implemented")):
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=error))
        assert len(tar_shards.TarShards(str(shards), "train").labels) == 24
        (shards / "train" / "index-train.npz").unlink()
    monkeypatch.setattr(tar_shards.FileLock, "acquire", denied)
    monkeypatch.setattr(tar_shards, "replacing", denied)
    assert len(tar_shards.TarShards(str(shards), "train").labels) == 24
    assert not (shards / "train" / "index-train.npz").exists()


def _start(path, barrier, slow, results):
    """Open the shards as one rank; log every shard whose headers it reads."""
    read = tar_shards._images_of

    def counted(shard, *rest):
        with open(f"{results}.scans", "a") as file:
            file.write(f"{shard.name}\n")
        time.sleep(slow)
        return read(shard, *rest)

    tar_shards._images_of = counted
    barrier.wait()
    with open(f"{results}.{os.getpid()}", "w") as file:
        try:
            file.write(str(len(tar_shards.TarShards(path, "train").labels)))
        except UserError as error:
            file.write(str(error))


def started(shards, tmp_path, count=4):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(count)
    ranks = [fork.Process(target=_start, args=(str(shards), barrier, 0.2, tmp_path / "rank")) for _ in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    scans = (tmp_path / "rank.scans").read_text().split()
    return scans, [(tmp_path / f"rank.{rank.pid}").read_text() for rank in ranks]


def test_one_process_makes_the_index(shards, tmp_path):
    (shards / "train" / "index-train.npz").unlink()
    scans, results = started(shards, tmp_path)
    assert sorted(scans) == [f"00000{number}.tar" for number in range(5)]
    assert results == ["24"] * 4


def test_all_processes_report_the_error_of_one(shards, tmp_path):
    """The others do not scan again, which would delay the message."""
    (shards / "train" / "index-train.npz").unlink()
    (shards / "train" / "000003.tar").write_text("not a tar file" * 100)
    scans, results = started(shards, tmp_path)
    assert len(scans) == 5
    assert len(set(results)) == 1
    assert "000003.tar: " in results[0]
    assert (shards / "train" / "index-train.error").read_text() == results[0]
    write_labelled(shards / "train" / "000003.tar", "class_0/new=0")  # repaired: the stored error is removed
    assert len(tar_shards.TarShards(str(shards), "train").labels) == 20
    assert not (shards / "train" / "index-train.error").exists()


def test_locks_and_index_do_not_follow_links(tmp_path):
    """Nothing is written or truncated through a link in the data folder."""
    path, precious = one_shard(tmp_path, ("a.jpg", b"x"), ("a.cls", b"0")), tmp_path / "precious"
    for name in ("index-train.lock", "index-train.npz"):
        precious.write_text("precious")
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(precious)
        (tmp_path / "index-train.npz").unlink(missing_ok=name.endswith("lock"))
        (tmp_path / "index-train.npz").symlink_to(precious)
        assert len(readers.open_source(path, "train").labels) == 1
        assert precious.read_text() == "precious"
        assert not (tmp_path / "index-train.npz").is_symlink()


def test_a_damaged_index_is_named(tmp_path, caplog):
    """An index of other shards gives no warning."""
    path, index = one_shard(tmp_path, ("a.jpg", b"x"), ("a.cls", b"0")), tmp_path / "index-train.npz"
    readers.open_source(path, "train")
    index.write_bytes(b"damaged")
    assert warnings_of(caplog, path)[1] == [f"{index} cannot be used and is made again: File is not a zip file"]
    assert warnings_of(caplog, path)[1] == []
    one_shard(tmp_path, ("a.jpg", b"new"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"0"))
    source, lines = warnings_of(caplog, path)
    assert (len(source.labels), lines) == (2, [])
