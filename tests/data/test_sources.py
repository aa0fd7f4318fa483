"""Where images are: tar shards and Hugging Face datasets beside folders, and packing one into the other."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN, encoded, finetune_args, loader_args, read_log
from PIL import Image
from torchvision.datasets import ImageFolder

import main_pretrain
from Finetuning import main_finetune
from tools import pack_images
from util.data import datasets, decode, loaders, readers, tar_shards, transforms
from util.errors import RunError, UserError
from util.files import printable
from util.lock import lock_folder

CPU = torch.device("cpu")


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(jpeg_folder, tmp_path):
    """The images of the folder as they are, in shards of 5."""
    run_pack(jpeg_folder, tmp_path / "shards", "--shard_images", "5")
    return tmp_path / "shards"


def run_pack(*words):
    pack_images.main(pack_images.get_args_parser().parse_args([str(word) for word in (*words, "--num_workers", 2)]))


@pytest.fixture
def hub_folder(jpeg_folder, tmp_path):
    """The same images as a dataset that Hugging Face's library has saved."""
    hub = pytest.importorskip("datasets")
    hub.load_dataset(
        "imagefolder", data_dir=str(jpeg_folder), cache_dir=str(tmp_path / "cache")
    ).save_to_disk(tmp_path / "saved")  # fmt: skip
    return tmp_path / "saved"


def contents(source):
    return sorted((source.classes[source.labels[i]], source.read(i)) for i in range(len(source.labels)))


@pytest.mark.parametrize("kind", ["wds", "hfds"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_source_holds_the_same_images(jpeg_folder, request, kind, split):
    path = request.getfixturevalue({"wds": "shards", "hfds": "hub_folder"}[kind])
    folder = readers.open_source(str(jpeg_folder), split)
    source = readers.open_source(f"{kind}:{path}", split)
    assert source.classes == folder.classes == ["class_0", "class_1", "class_2"]
    assert len(source.labels) == (24 if split == "train" else 7)
    assert contents(source) == contents(folder)
    assert {type(source.read(0)), source.labels.dtype} == {bytes, np.dtype(np.int64)}


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_epochs_of_every_source(request, monkeypatch, kind):
    """Every image once over all processes, the same whatever the number of workers, and from the middle on."""
    path = f"{kind}:{request.getfixturevalue({'wds': 'shards', 'hfds': 'hub_folder'}[kind])}"
    transform = transforms.finetune_transform((32, 32), finetune_args())

    def epoch(number, start=0, **changes):
        dataset = datasets.image_dataset(path, "train", transform, "fast")
        loader = loaders.train_loader(dataset, loader_args(**changes), CPU)
        loader.sampler.set_epoch(number, start)
        return list(loader), [index for _, index in loader.sampler]

    whole, order = epoch(1)
    assert sorted(order) == list(range(24))
    assert epoch(2)[1] != order
    for got in (epoch(1, num_workers=2)[0], epoch(1, start=8, num_workers=1)[0]):
        for (imgs, labels), (want, want_labels) in zip(got, whole[-len(got) :], strict=True):
            assert torch.equal(imgs, want)
            assert torch.equal(labels, want_labels)
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        shares.append(epoch(1)[1])
    assert sorted(index for share in shares for index in share) == list(range(24))
    assert {len(share) for share in shares} == {8}


@pytest.mark.parametrize("kind", ["", "wds:", "hfds:"])
@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "v0"])
def test_workers_that_are_not_forked(request, jpeg_folder, kind, aa):
    """Everything that a worker needs can be pickled, as where processes are spawned."""
    path = request.getfixturevalue({"wds:": "shards", "hfds:": "hub_folder"}[kind]) if kind else jpeg_folder
    transform = transforms.finetune_transform((32, 32), finetune_args(aa=aa))
    dataset = datasets.image_dataset(f"{kind}{path}", "train", transform, "fast")
    samples = datasets.SeededSamples(dataset, seed=3)
    (want, numbers), _ = samples[0, 5]
    (got, got_numbers), _ = pickle.loads(pickle.dumps(samples))[0, 5]
    assert torch.equal(got, want)
    assert got_numbers == numbers


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_whole_runs(request, tmp_path, run_script, kind):
    path = f"{kind}:{request.getfixturevalue({'wds': 'shards', 'hfds': 'hub_folder'}[kind])}"
    words = ["--data_path", path, "--batch_size", 8, "--epochs", 1, "--num_workers", 1, "--output_dir"]
    run_script(main_pretrain, *TINY_PRETRAIN, *words, tmp_path / "pretrain")
    run_script(main_finetune, *TINY_FINETUNE, *words, tmp_path / "finetune", "--mixup", 0.8, "--cutmix", 1)
    assert read_log(tmp_path / "finetune")[0]["test_images"] == 7


# ---- tar shards


def test_positions_in_shards_are_found_once(shards, monkeypatch):
    want = contents(tar_shards.TarShards(str(shards), "train"))
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "_images_of", None)  # not needed: they are kept beside the shards
        assert contents(tar_shards.TarShards(str(shards), "train")) == want
    first = sorted((shards / "train").glob("*.tar"))[0]
    write_shard(first, [("class_0/new.jpg", b"new"), ("class_0/new.cls", b"0")])
    assert ("class_0", b"new") in contents(tar_shards.TarShards(str(shards), "train"))


def test_shards_of_other_tools(tmp_path):
    """Names as the hub's ImageNet has them: splits in file names, keys without a folder, labels in .cls or .json."""
    image = encoded(Image.new("RGB", (20, 20)))
    write_shard(tmp_path / "in1k-train-0000.tar", [("a.jpg", image), ("a.json", b'{"label": 2}'), ("a.txt", b"note")])
    write_shard(tmp_path / "in1k-train-0001.tar", [("b.cls", b"1\n"), ("b.JPEG", image)])
    write_shard(tmp_path / "in1k-validation-0.tar", [("x/c.png", image), ("x/c.cls", b"0")])
    train = readers.open_source(f"wds:{tmp_path}", "train")
    assert (train.labels.tolist(), train.classes) == ([2, 1], ["", "", ""])
    assert train.read(1) == image
    assert train.name(1) == f"{tmp_path}/in1k-train-0001.tar: b.JPEG"
    assert readers.open_source(f"wds:{tmp_path}", "val").classes == ["x"]


def write_labelled(path, *keys):
    """A shard with an image for every KEY=LABEL."""
    image = encoded(Image.new("RGB", (20, 20)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [key.split("=") for key in keys]
    write_shard(path, [m for key, label in pairs for m in ((f"{key}.jpg", image), (f"{key}.cls", label.encode()))])


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
def test_a_split_is_a_word_of_a_file_s_name(tmp_path, split, name, belongs):
    write_labelled(tmp_path / name, "a=0")
    if belongs:
        assert len(tar_shards.TarShards(str(tmp_path), split).labels) == 1
    else:
        with pytest.raises(UserError, match=f"no {split}/"):
            tar_shards.TarShards(str(tmp_path), split)


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


def test_an_index_that_cannot_be_written_leaves_nothing_behind(shards, monkeypatch):
    def full(file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tar_shards.np, "savez", lambda file, **_: full(file if isinstance(file, Path) else file.name))
    index = shards / "train" / "index-train.npz"
    index.unlink()
    files = set(index.parent.iterdir())
    assert len(tar_shards.TarShards(str(shards), "train").labels) == 24
    assert set(index.parent.iterdir()) - {index.with_suffix(".lock")} == files - {index.with_suffix(".lock")}


def test_an_index_can_be_read_by_others(shards):
    """As the umask has it, not for its writer alone."""
    index, other = shards / "train" / "index-train.npz", shards / "other"
    other.write_text("")
    assert index.stat().st_mode == other.stat().st_mode


def test_a_folder_that_cannot_be_written(shards, monkeypatch):
    (shards / "train" / "index-train.npz").unlink()
    for error in (OSError(errno.ENOLCK, "No locks available"), OSError(errno.ENOSYS, "Function not implemented")):
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=error))
        assert len(tar_shards.TarShards(str(shards), "train").labels) == 24
        (shards / "train" / "index-train.npz").unlink()
    monkeypatch.setattr(tar_shards.FileLock, "acquire", denied)
    monkeypatch.setattr(tar_shards, "replacing", denied)
    assert len(tar_shards.TarShards(str(shards), "train").labels) == 24
    assert not (shards / "train" / "index-train.npz").exists()


def denied(path, **_):
    raise PermissionError(13, "Permission denied", str(path))


def _start(path, barrier, slow, results):
    """A rank that opens the shards; writes down every shard of which it reads the headers."""
    read = tar_shards._images_of

    def counted(shard):
        with open(f"{results}.scans", "a") as file:
            file.write(f"{shard.name}\n")
        time.sleep(slow)
        return read(shard)

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


def test_one_process_of_a_machine_makes_the_index(shards, tmp_path):
    (shards / "train" / "index-train.npz").unlink()
    scans, results = started(shards, tmp_path)
    assert sorted(scans) == [f"00000{number}.tar" for number in range(5)]
    assert results == ["24"] * 4


def test_all_processes_state_what_one_of_them_found(shards, tmp_path):
    """And none takes as long again, so that the first one has the time to say it."""
    (shards / "train" / "index-train.npz").unlink()
    (shards / "train" / "000003.tar").write_text("not a tar file" * 100)
    scans, results = started(shards, tmp_path)
    assert len(scans) == 5
    assert len(set(results)) == 1
    assert "000003.tar: " in results[0]
    assert (shards / "train" / "index-train.error").read_text() == results[0]
    write_labelled(shards / "train" / "000003.tar", "class_0/new=0")  # mended: what was found is forgotten
    assert len(tar_shards.TarShards(str(shards), "train").labels) == 20
    assert not (shards / "train" / "index-train.error").exists()


def test_labels_without_an_image_are_counted(tmp_path, caplog):
    image = encoded(Image.new("RGB", (20, 20)))
    members = [("a/0.jpg", image), ("a/0.cls", b"0"), ("a/1.heic", image), ("a/1.cls", b"0"), ("a/2.cls", b"0")]
    members += [("a/3.json", b'{"label": 0}'), ("a/4.json", b'{"caption": ""}'), ("a/5.cls", b"0"), ("a/5.png", image)]
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train" / "0.tar", members)
    for _ in range(2):  # also where the index is read
        caplog.clear()
        assert len(tar_shards.TarShards(str(tmp_path), "train").labels) == 2
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.getMessage() == (
            f"{tmp_path}/train: 3 labels have no image of a known kind and are left out; "
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
    # train, val -> the message, or None where labels stand for the same classes
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
    """Names are what pairs, else labels."""
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
    with pytest.raises(decode.BrokenImage, match=r"0\.tar: a/b\.jpg: "):
        datasets.image_dataset(
            f"wds:{tmp_path}", "train", transforms.finetune_transform((32, 32), finetune_args()), "fast"
        )[0]


MISTAKES = {
    "wds:/nowhere": "--data_path wds:/nowhere: no such folder",
    "wds:EMPTY": r"no train/\*\.tar, and no tar file with train in its name",
    "wds:UNLABELLED": r"0\.tar: a has no label, in a \.cls or a \.json file",
    "wds:TRUNCATED": r"0\.tar: unexpected end of data",
    "wds:TEXT": r"0\.tar: ",
    "wds:IMAGELESS": "the shards hold no image",
    "wds:HEADER": r"0\.tar is damaged or incomplete: no file and no proper end at byte 3072$",
    "wds:CUT": r"0\.tar is damaged or incomplete: no file and no proper end at byte 3072$",
    "wds:ZEROS": r"0\.tar is damaged or incomplete: no file and no proper end at byte 3072$",
    "wds:TWO": r"0\.tar is damaged or incomplete: no file and no proper end at byte 6144$",
    "wds:LIST": r"0\.tar: a\.json holds no label: ",
    "wds:NUMBER": r"0\.tar: a\.json holds no label: ",
    "hfds:EMPTY": "--data_path hfds:.*EMPTY: ",
}


@pytest.mark.parametrize("path", MISTAKES)
def test_mistakes(tmp_path, run_script, capsys, path):
    if path.startswith("hfds"):
        pytest.importorskip("datasets")
    image = encoded(Image.new("RGB", (300, 300), (1, 2, 3)))
    for name in (path.rpartition(":")[2] for path in MISTAKES):
        (tmp_path / name.strip("/") / "train").mkdir(parents=True, exist_ok=True)
    write_shard(tmp_path / "UNLABELLED/train/0.tar", [("a.jpg", image)])
    write_shard(tmp_path / "IMAGELESS/train/0.tar", [("a.txt", image)])
    write_shard(tmp_path / "TRUNCATED/train/0.tar", [("a.cls", b"0"), ("a.jpg", image)])
    os.truncate(tmp_path / "TRUNCATED/train/0.tar", 3000)
    whole = tmp_path / "whole.tar"
    write_shard(whole, [(f"{key}.{kind}", b"0") for key in "abc" for kind in ("jpg", "cls")])
    for name, change in {
        "HEADER": lambda data: data[:3100] + b"?" + data[3101:],
        "CUT": lambda data: data[:3072],
        "ZEROS": lambda data: data[:3072] + bytes(3 * 2**20),
        "TWO": lambda data: data[: 6 * 1024] + bytes(10240 - 6 * 1024) + data,
    }.items():
        (tmp_path / name / "train/0.tar").write_bytes(change(whole.read_bytes()))
    for name, content in {"LIST": b'{"label": [1]}', "NUMBER": b"3"}.items():
        write_shard(tmp_path / name / "train/0.tar", [("a.jpg", image), ("a.json", content)])
    (tmp_path / "TEXT/train/0.tar").write_text("not a tar file" * 100)
    words = [*TINY_PRETRAIN, "--output_dir", tmp_path / "out", "--data_path"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *words, path.replace(":", f":{tmp_path}/") if ":/" not in path else path)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(MISTAKES[path], error)


def test_without_hugging_face(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        readers.open_source("hfds:name", "train")


def test_columns_of_a_hub_dataset(tmp_path):
    """Columns are found by their kind; of two labels, the one called label."""
    hub = pytest.importorskip("datasets")
    features = {
        "picture": hub.Image(),
        "coarse": hub.ClassLabel(names=["x"]),
        "label": hub.ClassLabel(names=["a", "b"]),
        "caption": hub.Value("string"),
    }
    rows = {"picture": [Image.new("RGB", (9, 9))] * 2, "coarse": [0, 0], "label": [1, 0], "caption": ["", ""]}
    train = hub.Dataset.from_dict(rows, features=hub.Features(features))
    hub.DatasetDict({"train": train, "test": train}).save_to_disk(tmp_path / "two")
    source = readers.open_source(f"hfds:{tmp_path / 'two'}", "val")
    assert (source.labels.tolist(), source.classes, "(test)" in source.root) == ([1, 0], ["a", "b"], True)
    assert decode.crop_of(source.read(1), lambda h, w: (0, 0, h, w)).shape == (9, 9, 3)
    hub.DatasetDict({"train": train.rename_column("label", "fine")}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="one ClassLabel column or one called 'label'; found: coarse, fine"):
        readers.open_source(f"hfds:{tmp_path / 'other'}", "train")
    with pytest.raises(UserError, match="it has the splits train, and no validation"):
        readers.open_source(f"hfds:{tmp_path / 'other'}", "val")


def test_labels_of_a_hub_dataset_are_read_at_once(tmp_path):
    """Also where rows have been chosen and shuffled before they were saved, and where one has no label."""
    hub = pytest.importorskip("datasets")
    labels = np.random.default_rng(0).integers(0, 9, 10**5)
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(num_classes=9)})
    rows = {"image": [{"bytes": b"%d" % label, "path": None} for label in labels], "label": labels}
    train = hub.Dataset.from_dict(rows, features=features)
    val = train.shuffle(seed=0).select(range(1000, 3000, 2))
    hub.DatasetDict({"train": train, "val": val}).save_to_disk(tmp_path / "saved")
    start = time.monotonic()
    source = readers.open_source(f"hfds:{tmp_path / 'saved'}", "train")
    assert time.monotonic() - start < 2  # row by row it took 5 seconds
    assert np.array_equal(source.labels, labels)
    source = readers.open_source(f"hfds:{tmp_path / 'saved'}", "val")
    assert len(source.labels) == 1000
    assert [int(source.read(index)) for index in range(1000)] == source.labels.tolist()
    some = hub.Dataset.from_dict({"image": rows["image"][:3], "label": [0, None, -1]}, features=features)
    hub.DatasetDict({"train": some}).save_to_disk(tmp_path / "some")
    with pytest.raises(UserError, match="2 images have no label"):
        readers.open_source(f"hfds:{tmp_path / 'some'}", "train")


# ---- packing


def test_packed_images(photographs, tmp_path, capsys):
    """Larger training images are resized and re-encoded, all others and all of val keep their bytes."""
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


def test_packing_goes_on_where_it_was(jpeg_folder, tmp_path):
    """Killed in the middle, it writes what is missing; the shards are those of an uninterrupted run."""
    words = ["--short_side", "64", "--shard_images", "2"]
    run_pack(jpeg_folder, tmp_path / "whole", *words)
    command = [sys.executable, REPOSITORY / "tools" / "pack_images.py", jpeg_folder, tmp_path / "shards", *words]
    process = subprocess.Popen(
        [str(w) for w in command], cwd=REPOSITORY, stderr=subprocess.DEVNULL, start_new_session=True
    )
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
    """Pack in this process; SIGKILL ends it before it opens, renames or removes its so many-th file in `folder`."""
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
    """Content of all files but the index, whose times differ, and the lock, which names a process."""
    kept = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("index-", "run.lock")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_packing_killed_at_any_moment(jpeg_folder, tmp_path, capsys):
    """The same command then ends as an uninterrupted run does: the same files, the same broken images."""
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
        process.join()  # with a limit it would wait for the workers, too
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


def test_packing_again_after_an_image_was_mended(jpeg_folder, tmp_path, capsys):
    """A shard that was not finished takes nothing over from before."""
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
def test_a_file_that_cannot_be_read_ends_packing(jpeg_folder, tmp_path, monkeypatch, number, more):
    """It may be there the next time: it is not left out, and the same command goes on."""
    read = readers.Folder.read

    def failing(source, index):
        if index == 5:
            raise OSError(number, os.strerror(number), source.name(index))
        return read(source, index)

    words = [jpeg_folder, tmp_path / "shards", "--shard_images", 5, "--max_bad_samples", 9, *more]
    with monkeypatch.context() as patch:
        patch.setattr(readers.Folder, "read", failing)
        with pytest.raises(RunError, match=rf"class_0/5\.jpg: {os.strerror(number)}.*the same command goes on"):
            run_pack(*words)
    run_pack(*words)
    run_pack(jpeg_folder, tmp_path / "whole", "--shard_images", 5, *more)
    for shard in (tmp_path / "whole").rglob("*.tar"):
        assert (tmp_path / "shards" / shard.relative_to(tmp_path / "whole")).read_bytes() == shard.read_bytes()


def test_a_link_that_leads_nowhere_is_broken(jpeg_folder, tmp_path, capsys):
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
    for _ in range(2):  # the second time there is nothing left to do
        capsys.readouterr()
        run_pack(*words)
        out = capsys.readouterr().out
        assert "train: 24 images" in out
        assert "left out: 1 broken images:\n  " in out
        assert "val: 8 images" in out  # evaluation finds it and says so


def test_packing_mistakes(tmp_path, capsys, monkeypatch):
    for words, message in (([tmp_path, tmp_path / "x"], "no folder train or val in it"), ([], "required: SRC, DST")):
        monkeypatch.setattr(sys, "argv", ["pack_images", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            pack_images.cli.run(pack_images.main, pack_images.get_args_parser())
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


def test_a_mistake_in_val_ends_packing_before_train(jpeg_folder, tmp_path):
    """Unsorted images, and shards of something else."""
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
    command = [sys.executable, REPOSITORY / "tools" / "pack_images.py", jpeg_folder, tmp_path]
    (tmp_path / "train").mkdir()
    lock_folder(tmp_path / "train")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(rf"error: DST {tmp_path}/train is in use by process {os.getpid()} on ", done.stderr)


def test_plan_of_a_packed_folder_is_readable(shards):
    plan = json.loads((shards / "train" / "packed.json").read_text())
    assert (plan["images"], plan["short_side"], plan["shard_images"]) == (24, None, 5)


# ---- what is left out, refused or broken


def put(root, *paths, content=b"x"):
    """Write files, in folders that are made."""
    for path in paths:
        path = os.path.join(os.fsencode(root), os.fsencode(path))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def test_a_folder_has_the_order_of_torchvision(tmp_path):
    """Resuming and feature caches depend on it: classes, folders below them, capitals, links."""
    names = (
        "b/2.png b/10.JPG a/x/1.jpg a/x-1/1.jpg a/x.y/1.jpg a/z.jpeg a/Z.png a-1/0.webp B/é.tif c/d/e/f/0.bmp c/ü.ppm"
    )
    put(tmp_path / "train", *names.split())
    put(tmp_path / "elsewhere", "deep/1.png", "0.png", "0.pgm")
    (tmp_path / "train" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "image.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "train" / "a" / "nowhere.png").symlink_to(tmp_path / "none")
    (tmp_path / "train" / "a" / "itself.png").symlink_to("itself.png")
    want, got = ImageFolder(str(tmp_path / "train")), readers.Folder(str(tmp_path), "train")
    assert len(want.samples) == 20
    assert [(got.path(index), label) for index, label in enumerate(got.labels.tolist())] == want.samples
    assert [got.name(index) for index in range(20)] == [path for path, _ in want.samples]
    assert (got.classes, got.labels.dtype) == (want.classes, np.dtype(np.int64))


@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
def test_every_suffix_that_is_decoded_is_read(tmp_path, caplog, change):
    names = [f"{number}.{change(suffix)}" for number, suffix in enumerate(sorted(decode.SUFFIXES))]
    put(tmp_path / "train" / "a", *names)
    (tmp_path / "shards").mkdir()
    members = [(name, b"x") for name in names] + [(f"{number}.cls", b"0") for number in range(len(names))]
    write_shard(tmp_path / "shards" / "train.tar", members)
    for path in (str(tmp_path), f"wds:{tmp_path / 'shards'}"):
        source = readers.open_source(path, "train")
        assert sorted(Path(source.name(index)).name.split(" ")[-1] for index in range(len(names))) == sorted(names)
    assert not caplog.records


def warnings_of(caplog, path, split="train"):
    """The source and the lines that opening it gives."""
    caplog.clear()
    return readers.open_source(str(path), split), [record.getMessage() for record in caplog.records]


def test_what_a_folder_leaves_out_is_counted(tmp_path, caplog):
    train = tmp_path / "train"
    put(train, "a/0.jpg", "a/1.heic", "a/2", "a/deep/jpg", "b/0.jpg", "note.txt", "loose.jpg")
    assert warnings_of(caplog, tmp_path)[1] == [
        f"{train}: 2 files lie beside the class folders and are left out; the first: loose.jpg; "
        "3 files do not end as images that can be read and are left out; the first: a/1.heic"
    ]
    put(train, ".DS_Store", "a/.DS_Store", "a/._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "b/.git/x.jpg")
    source, (line,) = warnings_of(caplog, tmp_path)
    assert (source.classes, source.labels.tolist()) == (["a", "b"], [0, 1])
    assert line.endswith("a/1.heic; 3 images or folders are hidden and are left out; the first: .ipynb_checkpoints")
    put(train, "c/0.heic")
    with pytest.raises(UserError, match=r"train: no image in 1 of 3 class folders: c \(2 files lie .* hidden"):
        readers.open_source(str(tmp_path), "train")


LOOPS = {"a/loop": "..", "a/itself": ".", "a/deep/far": "/", "a/deep/near": "../../.."}


@pytest.mark.parametrize("link", LOOPS)
def test_a_link_to_a_folder_that_holds_it_is_refused(tmp_path, caplog, link):
    """It is not followed, and counted: every image counts once."""
    put(tmp_path / "train", "a/0.jpg", "a/deep/0.jpg", "b/0.jpg")
    (tmp_path / "train" / link).symlink_to(LOOPS[link])
    assert readers.Folder(str(tmp_path), "train").labels.tolist() == [0, 0, 1]
    (line,) = caplog.messages
    assert line.endswith(f"1 links lead to folders that hold them and are left out; the first: {link}")


def test_a_class_that_links_to_the_folder_of_all_is_refused(tmp_path):
    put(tmp_path / "train", "a/0.jpg")
    (tmp_path / "train" / "loop").symlink_to(".")
    with pytest.raises(UserError, match=r"no image in 1 of 2 class folders: loop \(1 links lead to folders that hold"):
        readers.Folder(str(tmp_path), "train")


TWICE = {"a/twice": "deep", "a/via": "../../outside"}  # which links to a/


@pytest.mark.parametrize("link", TWICE)
def test_a_link_that_repeats_images_is_refused(tmp_path, link):
    put(tmp_path / "train", "a/0.jpg", "a/deep/0.jpg", "b/0.jpg")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "back").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "train" / link).symlink_to(TWICE[link])
    shown = "a/via/back" if link == "a/via" else "a/(twice|deep)"
    with pytest.raises(UserError, match=f"^{tmp_path}/train/{shown} leads to /.*: its images would count twice"):
        readers.Folder(str(tmp_path), "train")


def test_links_that_double_folders_end(tmp_path):
    """2^40 ways lead through these folders, without a loop."""
    put(tmp_path / "train", "a/0.jpg")
    for depth in range(40):
        (tmp_path / f"{depth}").mkdir()
        for name in "xy":
            (tmp_path / f"{depth}" / name).symlink_to(tmp_path / f"{depth + 1}")
    (tmp_path / "40").mkdir()
    (tmp_path / "train" / "a" / "0").symlink_to(tmp_path / "0")
    with pytest.raises(UserError, match="its images would count twice"):
        readers.Folder(str(tmp_path), "train")


def test_names_that_are_not_utf8(tmp_path, run_script, capsys):
    """From listing through packing to a whole run: printable in every message, and the bytes on the disk are read."""
    for split in ("train", "val"):
        image = encoded(Image.new("RGB", (20, 20)))
        put(tmp_path / split, b"caf\xe9/0\xff.jpg", b"caf\xe9/1.jpg", b"line\nfeed/2.jpg", "é/3.jpg", content=image)
    classes = [r"caf\xe9", r"line\nfeed", "é"]
    folder = readers.Folder(str(tmp_path), "train")
    assert (folder.classes, folder.labels.tolist(), folder.read(0)) == (classes, [0, 0, 1, 2], image)
    assert folder.name(0) == rf"{tmp_path}/train/caf\xe9/0\xff.jpg"
    assert os.fsencode(folder.path(0)) == os.fsencode(tmp_path) + b"/train/caf\xe9/0\xff.jpg"
    run_pack(tmp_path, tmp_path / "packed")
    packed = tar_shards.TarShards(str(tmp_path / "packed"), "train")
    assert packed.classes == classes
    assert any(packed.name(index).endswith(r"000000.tar: caf\xe9/0_0\xff.jpg") for index in range(4))
    write_shard(tmp_path / "0-train.tar", [("caf\udce9/\udcff.jpg", image), ("caf\udce9/\udcff.cls", b"0")])
    shard = tar_shards.TarShards(str(tmp_path), "train")
    assert shard.classes == [r"caf\xe9"]
    assert shard.name(0).startswith(f"{tmp_path}/0-train.tar: caf")
    assert shard.name(0).isprintable()
    words = ["--data_path", tmp_path, "--batch_size", 2, "--epochs", 1, "--warmup_epochs", 0]
    run_script(main_pretrain, *TINY_PRETRAIN, *words, "--output_dir", tmp_path / "out")
    assert len(read_log(tmp_path / "out")) == 1
    put(tmp_path / "train", r"caf\xe9/0.jpg")
    with pytest.raises(UserError, match=r"train: 2 class folders would be called caf\\xe9: rename one"):
        readers.Folder(str(tmp_path), "train")


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    put(tmp_path, "train/a/0.jpg", "train/a/deep/1.jpg", "file")
    long = tmp_path / ("x" * 300)
    for path, message in (
        (tmp_path / "file", "no such folder"),
        (tmp_path / "file" / "below", "no such folder"),
        (long, r"\[Errno 36\] File name too long"),
    ):
        for prefix in ("", "wds:"):
            with pytest.raises(UserError, match=rf"^--data_path {prefix}{re.escape(str(path))}: {message}") as error:
                readers.open_source(f"{prefix}{path}", "train")
            assert str(error.value).isprintable()
    for path in ("wds:", "hfds:"):
        with pytest.raises(UserError, match="nothing follows the colon"):
            readers.open_source(path, "train")
    scan = os.scandir
    # the superuser may read every folder
    monkeypatch.setattr(
        tar_shards.os, "scandir", lambda path: denied(path) if str(path).endswith("deep") else scan(path)
    )
    with pytest.raises(UserError, match=r"^--data_path .*: \[Errno 13\] Permission denied: '.*/train/a/deep'"):
        readers.Folder(str(tmp_path), "train")


def broken(source, index=0):
    """Why an image cannot be read, as training says it."""
    with pytest.raises(decode.BrokenImage) as error:
        dataset_of(source)[index]
    return str(error.value)


def dataset_of(source):
    transform = transforms.finetune_transform((32, 32), finetune_args())
    return datasets.ImageDataset(source, datasets.pixels_by("fast", transform))


def test_files_that_are_none(tmp_path):
    """A pipe in a class folder does not hold up a worker, nor does one in the place of a shard or its index."""
    put(tmp_path / "train", "a/1.jpg")
    os.mkfifo(tmp_path / "train" / "a" / "0.jpg")
    (tmp_path / "train" / "a" / "2.jpg").symlink_to("/dev/zero")
    folder = readers.Folder(str(tmp_path), "train")
    for index in (0, 2):
        assert broken(folder, index).startswith(f"{folder.name(index)}: it is no regular file")
    os.mkfifo(tmp_path / "train-0.tar")
    with pytest.raises(UserError, match=r"train-0\.tar is no regular file"):
        tar_shards.TarShards(str(tmp_path), "train")
    with (tmp_path / "train" / "a" / "1.jpg").open("wb") as file:
        file.truncate(10**12)
    assert "an image of 1000000000000 bytes is larger than " in broken(folder, 1)


def one_shard(folder, *members):
    folder.mkdir(exist_ok=True)
    write_shard(folder / "train-0.tar", members)
    return f"wds:{folder}"


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
def test_a_key_names_one_image_and_one_label(tmp_path, names, shown, first):
    members = [("k.jpg", b"x"), ("k.cls", b"0"), ("a/k.cls", b"0")][: 1 if names[0] == "k.json" else 3]
    members = [member for member in members if member[0] not in names]
    both = [(names[first], b'{"label": 0}'), (names[1 - first], b'{"label": 0}')]
    with pytest.raises(UserError, match=rf"train-0\.tar: the key (a/)?k has more than one {shown}$"):
        readers.open_source(one_shard(tmp_path, both[0], *members, both[1]), "train")


def test_dots_in_keys(tmp_path, caplog):
    """A key with dots that has an image and a label is read; what belongs to the sample of another key is not."""
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
        f"{tmp_path}: 1 labels have no image of a known kind and are left out; the first: "
        "train-0.tar: a.depth (.cls); 2 images with a dot in their key have no label and are left out; the first: "
        "train-0.tar: a.mask.png; 1 images or folders are hidden and are left out; the first: train-0.tar: ._a.jpg"
    ]
    with pytest.raises(UserError, match="e has no label"):
        readers.open_source(one_shard(tmp_path, *members, ("e.jpg", b"e")), "train")


def test_archives_that_are_not_read_are_counted(tmp_path, caplog):
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
def test_a_shard_that_cannot_be_read_any_more(tmp_path, monkeypatch, how):
    """Its images are broken ones like others, named by the shard; finding the name raises nothing."""
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


def test_locks_and_indices_do_not_follow_links(tmp_path):
    """Nothing is written, or emptied, through a link in the folder of the data."""
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


def test_an_index_that_does_not_serve_is_named(tmp_path, caplog):
    """One of other shards is no fault."""
    path, index = one_shard(tmp_path, ("a.jpg", b"x"), ("a.cls", b"0")), tmp_path / "index-train.npz"
    readers.open_source(path, "train")
    index.write_bytes(b"damaged")
    assert warnings_of(caplog, path)[1] == [f"{index} cannot be used, and is made again: File is not a zip file"]
    assert warnings_of(caplog, path)[1] == []
    one_shard(tmp_path, ("a.jpg", b"new"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"0"))
    source, lines = warnings_of(caplog, path)
    assert (len(source.labels), lines) == (2, [])


# ---- Hugging Face datasets of other forms


def saved(folder, split=None, **columns):
    """A dataset with these columns, each a pair of feature and values, that is saved alone."""
    hub = pytest.importorskip("datasets")
    features = hub.Features({name: feature for name, (feature, _) in columns.items()})
    rows = {name: values for name, (_, values) in columns.items()}
    hub.Dataset.from_dict(rows, features=features, split=split and hub.Split(split)).save_to_disk(folder)
    return f"hfds:{folder}"


def test_one_saved_dataset(tmp_path):
    hub = pytest.importorskip("datasets")
    image, label = (hub.Image(), [{"bytes": b"x", "path": None}]), (hub.ClassLabel(names=["a"]), [0])
    path = saved(tmp_path / "alone", image=image, label=label)
    source = readers.open_source(path, "train")
    assert (source.classes, source.labels.tolist(), source.read(0)) == (["a"], [0], b"x")
    with pytest.raises(UserError, match="the splits train, and no validation; one data set that is saved alone counts"):
        readers.open_source(path, "val")
    path = saved(tmp_path / "val", "validation", image=image, label=label)
    assert readers.open_source(path, "val").labels.tolist() == [0]
    with pytest.raises(UserError, match="the splits validation, and no train"):
        readers.open_source(path, "train")


@pytest.mark.parametrize("kind", ["int64", "uint8", "uint64"])
def test_labels_that_are_numbers(tmp_path, kind):
    hub = pytest.importorskip("datasets")
    images = (hub.Image(), [{"bytes": b"x", "path": None}, None])
    path = saved(tmp_path / "data", picture=images, label=(hub.Value(kind), [3, 1]), id=(hub.Value("int64"), [7, 8]))
    source = readers.open_source(path, "train")
    assert (source.labels.tolist(), source.labels.dtype, source.classes) == ([3, 1], np.dtype(np.int64), [""] * 4)
    assert (source.read(0), source.read(1)) == (b"x", b"")
    assert broken(source, 1) == f"hfds:{tmp_path}/data (train) row 1: no image of a known kind"


def test_mistakes_of_hub_datasets(tmp_path):
    hub = pytest.importorskip("datasets")
    images = (hub.Image(), [{"bytes": b"x", "path": None}] * 2)
    name = hub.ClassLabel(names=["a", "b"])
    cases = {
        "empty": ({"image": (hub.Image(), []), "label": (name, [])}, "it is damaged or empty: "),
        "without columns": ({}, "it is damaged or empty: "),
        "without images": ({"label": (name, [0, 1])}, "it needs one Image column"),
        "without labels": ({"image": images}, "it needs one ClassLabel column or one called 'label'; found: none$"),
        "only ids": ({"image": images, "id": (hub.Value("int64"), [0, 1])}, "it needs one ClassLabel column"),
        "fractions": ({"image": images, "label": (hub.Value("float32"), [0, 1])}, r"'label' holds Value\('float32'\)"),
        "truths": ({"image": images, "label": (hub.Value("bool"), [0, 1])}, r"'label' holds Value\('bool'\)"),
        "words": ({"image": images, "label": (hub.Value("string"), ["0", "1"])}, r"'label' holds Value\('string'\)"),
        "no numbers": ({"image": images, "label": (hub.Value("int64"), [None, None])}, "2 images have no label"),
        "below 0": ({"image": images, "label": (hub.Value("int32"), [-1, 0])}, "1 images have no label"),
        "an id": ({"image": images, "label": (hub.Value("int64"), [10**18, 0])}, r"label 10{18} is not below 1000000"),
    }
    for case, (columns, message) in cases.items():
        path = saved(tmp_path / case, **columns)
        with pytest.raises(UserError, match=message) as error:
            readers.open_source(path, "train")
        assert str(error.value).isprintable(), case
        assert path in str(error.value), case
    for damage in ("{", "[" * 10**5, "null", "[]", '{"_data_files": [{"filename": "/dev/zero"}]}'):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "state.json").write_text(damage)
        (tmp_path / "damaged" / "dataset_info.json").write_text(damage)
        with pytest.raises(UserError, match="damaged: ") as error:
            readers.open_source(f"hfds:{tmp_path / 'damaged'}", "train")
        assert str(error.value).isprintable()


def test_keys_without_image_and_label_are_counted(tmp_path, caplog):
    """An image of an unknown kind, without its label; notes on an image that is read are none."""
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
    assert "1 keys have neither an image of a known kind nor a label" in line
    assert "train-0.tar: b (.heic)" in line
