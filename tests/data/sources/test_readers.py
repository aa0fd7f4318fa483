"""Folders, tar shards and Hugging Face datasets give the same samples; new readers; user mistakes; image folders."""

import importlib
import os
import pickle
import re
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import broken, contents, denied, put, run_pack, warnings_of, write_shard
from helpers import TINY_FINETUNE, TINY_PRETRAIN, encoded, finetune_args, loader_args, read_log
from PIL import Image
from torchvision.datasets import ImageFolder

import main_pretrain
from Finetuning import main_finetune
from util.data import datasets, decode, loaders, transforms
from util.data.sources import folders, readers, tar_shards
from util.data.sources.source import hash_states
from util.errors import UserError

CPU = torch.device("cpu")


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
    """All processes together see every image once; samples do not depend on workers, nor on a start in the middle."""
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
def test_samples_can_be_pickled_for_spawned_workers(request, jpeg_folder, kind, aa):
    """A worker that is spawned instead of forked gives the same samples."""
    path = request.getfixturevalue({"wds:": "shards", "hfds:": "hub_folder"}[kind]) if kind else jpeg_folder
    transform = transforms.finetune_transform((32, 32), finetune_args(aa=aa))
    dataset = datasets.image_dataset(f"{kind}{path}", "train", transform, "fast")
    samples = datasets.SeededSamples(dataset, seed=3)
    (want, numbers), _ = samples[0, 5]
    (got, got_numbers), _ = pickle.loads(pickle.dumps(samples))[0, 5]
    assert torch.equal(got, want)
    assert got_numbers == numbers


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_runs_from_every_source(request, tmp_path, run_script, kind):
    path = f"{kind}:{request.getfixturevalue({'wds': 'shards', 'hfds': 'hub_folder'}[kind])}"
    words = ["--data_path", path, "--batch_size", 8, "--epochs", 1, "--num_workers", 1, "--output_dir"]
    run_script(main_pretrain, *TINY_PRETRAIN, *words, tmp_path / "pretrain")
    run_script(main_finetune, *TINY_FINETUNE, *words, tmp_path / "finetune", "--mixup", 0.8, "--cutmix", 1)
    assert read_log(tmp_path / "finetune")[0]["test_images"] == 7


READER = """
from io import BytesIO

import numpy as np
from PIL import Image


class Colours:
    def __init__(self, path, split, labels):
        self.root, self.classes = f"colours:{path} ({split})", ["red", "green", "blue"]
        self.labels = np.arange(int(path)) % 3

    def read(self, index):
        file = BytesIO()
        colour = np.eye(3, dtype=int)[self.labels[index]] * 200 + index
        Image.new("RGB", (40, 30), tuple(colour.tolist())).save(file, "PNG")
        return file.getvalue()

    def name(self, index):
        return f"{self.root} image {index}"

    def state(self):
        return self.root

    identity = state
"""


def test_a_new_reader_is_one_file_and_one_line(tmp_path, monkeypatch, run_script):
    """It pretrains, finetunes and evaluates, and is in the help."""
    (tmp_path / "colour_reader.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(readers.READERS, "colours", ("colour_reader.Colours", "colours:N images of three colours"))
    words = ["--data_path", "colours:18", "--batch_size", 6, "--epochs", 1, "--warmup_epochs", 0, "--output_dir"]
    run_script(main_pretrain, *TINY_PRETRAIN, *words, tmp_path / "pretrain")
    run_script(main_finetune, *TINY_FINETUNE, *words, tmp_path / "finetune", "--mixup", 0, "--cutmix", 0)
    assert len(read_log(tmp_path / "pretrain")) == 1
    assert read_log(tmp_path / "finetune")[0]["test_images"] == 18
    assert "colours:N images of three colours" in " ".join(main_pretrain.get_args_parser().format_help().split())


@pytest.mark.parametrize("kind", ["", "wds:", "hfds:"])
def test_the_state_of_a_source_changes_with_its_content(request, tmp_path, jpeg_folder, kind):
    path = tmp_path / "data"
    shutil.copytree(
        request.getfixturevalue({"wds:": "shards", "hfds:": "hub_folder"}[kind]) if kind else jpeg_folder, path
    )
    first = readers.open_source(f"{kind}{path}", "train").state()
    assert readers.open_source(f"{kind}{path}", "train").state() == first
    assert readers.open_source(f"{kind}{path}", "val").state() != first
    if kind == "hfds:":
        saved = importlib.import_module("datasets").load_from_disk(path)
        saved["train"] = saved["train"].select(range(20))
        saved.save_to_disk(tmp_path / "other")
        path = tmp_path / "other"
    else:
        os.utime(next((path / "train").rglob("*.tar" if kind else "*.jpg")), ns=(0, 0))
    assert readers.open_source(f"{kind}{path}", "train").state() != first


def test_states_of_files_are_hashed_as_in_earlier_versions(tmp_path):
    """Caches of features stay valid; a missing file counts too."""
    paths = [os.fsencode(tmp_path / f"{number:02d}") for number in range(37)]
    digests = []
    for share in np.array_split(np.arange(37), 16):
        digest = sha256()
        for number in share:
            if number == 20:
                digest.update(b"%b\0\0\0" % paths[number])
                continue
            Path(os.fsdecode(paths[number])).write_bytes(b"x" * number)
            os.utime(paths[number], ns=(0, 10**18 + int(number)))
            digest.update(b"%b\0%d\0%d\0" % (paths[number], number, 10**18 + number))
        digests.append(digest.digest())
    assert hash_states(paths) == sha256(b"".join(digests)).hexdigest()


MISTAKES = {
    "wds:/nowhere": "--data_path wds:/nowhere: no such folder",
    "wds:EMPTY": r"no train/\*\.tar, and no tar file with train in its name",
    "wds:UNLABELLED": r"0\.tar: a has no label, in a \.cls or a \.json file",
    "wds:TRUNCATED": r"0\.tar: unexpected end of data",
    "wds:TEXT": r"0\.tar: ",
    "wds:IMAGELESS": "the shards hold no image",
    "wds:HEADER": r"0\.tar is damaged or incomplete: neither a file nor a proper end at byte 3072$",
    "wds:CUT": r"0\.tar is damaged or incomplete: neither a file nor a proper end at byte 3072$",
    "wds:ZEROS": r"0\.tar is damaged or incomplete: neither a file nor a proper end at byte 3072$",
    "wds:TWO": r"0\.tar is damaged or incomplete: neither a file nor a proper end at byte 6144$",
    "wds:LIST": r"0\.tar: a\.json holds no label: ",
    "wds:NUMBER": r"0\.tar: a\.json holds no label: ",
    "hfds:EMPTY": "--data_path hfds:.*EMPTY: ",
}


@pytest.mark.parametrize("path", MISTAKES)
def test_user_mistakes_in_data_paths(tmp_path, run_script, capsys, path):
    if path.startswith("hfds"):
        pytest.importorskip("datasets")
    image = encoded(Image.new("RGB", (300, 300), (1, 2, 3)))
    for name in (path.rpartition(":")[2] for path in MISTAKES):
        for split in ("train", "val"):
            (tmp_path / name.strip("/") / split).mkdir(parents=True, exist_ok=True)
    write_shard(tmp_path / "UNLABELLED/val/0.tar", [("a.jpg", image)])
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
        write_shard(tmp_path / name / "val/0.tar", [("a.jpg", image), ("a.json", content)])
    (tmp_path / "TEXT/train/0.tar").write_text("not a tar file" * 100)
    message = MISTAKES[path]
    script, words = (main_finetune, TINY_FINETUNE) if "label" in message else (main_pretrain, TINY_PRETRAIN)
    path = path.replace(":", f":{tmp_path}/") if ":/" not in path else path
    with pytest.raises(SystemExit) as exit_info:
        run_script(script, *words, "--output_dir", tmp_path / "out", "--data_path", path)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
def test_files_with_any_decoded_suffix_are_read(tmp_path, caplog, change):
    names = [f"{number}.{change(suffix)}" for number, suffix in enumerate(sorted(decode.SUFFIXES))]
    put(tmp_path / "train" / "a", *names)
    (tmp_path / "shards").mkdir()
    members = [(name, b"x") for name in names] + [(f"{number}.cls", b"0") for number in range(len(names))]
    write_shard(tmp_path / "shards" / "train.tar", members)
    for path in (str(tmp_path), f"wds:{tmp_path / 'shards'}"):
        source = readers.open_source(path, "train")
        assert sorted(Path(source.name(index)).name.split(" ")[-1] for index in range(len(names))) == sorted(names)
    assert not caplog.records


def test_names_that_are_not_utf8(tmp_path, run_script, capsys):
    """In folders, shards, packing and a run: messages are printable, and the files are read."""
    for split in ("train", "val"):
        image = encoded(Image.new("RGB", (20, 20)))
        put(tmp_path / split, b"caf\xe9/0\xff.jpg", b"caf\xe9/1.jpg", b"line\nfeed/2.jpg", "é/3.jpg", content=image)
    classes = [r"caf\xe9", r"line\nfeed", "é"]
    folder = folders.Folder(str(tmp_path), "train")
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
        folders.Folder(str(tmp_path), "train")


def test_unreadable_folders(tmp_path, monkeypatch):
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
    # root can read every folder
    monkeypatch.setattr(
        tar_shards.os, "scandir", lambda path: denied(path) if str(path).endswith("deep") else scan(path)
    )
    with pytest.raises(UserError, match=r"^--data_path .*: \[Errno 13\] Permission denied: '.*/train/a/deep'"):
        folders.Folder(str(tmp_path), "train")


def test_files_that_are_not_regular(tmp_path):
    """Pipes and devices among images and shards do not block a worker; a huge file is a broken image."""
    put(tmp_path / "train", "a/1.jpg")
    os.mkfifo(tmp_path / "train" / "a" / "0.jpg")
    (tmp_path / "train" / "a" / "2.jpg").symlink_to("/dev/zero")
    folder = folders.Folder(str(tmp_path), "train")
    for index in (0, 2):
        assert broken(folder, index).startswith(f"{folder.name(index)}: it is no regular file")
    os.mkfifo(tmp_path / "train-0.tar")
    with pytest.raises(UserError, match=r"train-0\.tar is no regular file"):
        tar_shards.TarShards(str(tmp_path), "train")
    with (tmp_path / "train" / "a" / "1.jpg").open("wb") as file:
        file.truncate(10**12)
    assert "an image of 1000000000000 bytes is larger than " in broken(folder, 1)


# ---- image folders


def test_a_folder_has_the_order_of_torchvision(tmp_path):
    """Resuming and caches of features depend on the order, with nested folders, capitals and links."""
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
    want, got = ImageFolder(str(tmp_path / "train")), folders.Folder(str(tmp_path), "train")
    assert len(want.samples) == 20
    assert [(got.path(index), label) for index, label in enumerate(got.labels.tolist())] == want.samples
    assert [got.name(index) for index in range(20)] == [path for path, _ in want.samples]
    assert (got.classes, got.labels.dtype) == (want.classes, np.dtype(np.int64))


def test_files_left_out_of_a_folder_are_counted(tmp_path, caplog):
    train = tmp_path / "train"
    put(train, "a/0.jpg", "a/1.heic", "a/2", "a/deep/jpg", "b/0.jpg", "note.txt", "loose.jpg")
    assert warnings_of(caplog, tmp_path)[1] == [
        f"{train}: 2 files lie beside the class folders and are left out; the first: loose.jpg; "
        "3 files have no suffix of an image format that can be read and are left out; the first: a/1.heic"
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
def test_a_link_to_a_folder_that_contains_it_is_counted(tmp_path, caplog, link):
    """The link is not followed, so every image counts once."""
    put(tmp_path / "train", "a/0.jpg", "a/deep/0.jpg", "b/0.jpg")
    (tmp_path / "train" / link).symlink_to(LOOPS[link])
    assert folders.Folder(str(tmp_path), "train").labels.tolist() == [0, 0, 1]
    (line,) = caplog.messages
    assert line.endswith(f"1 links lead to folders that contain them and are left out; the first: {link}")


def test_a_class_that_links_to_the_data_folder_is_refused(tmp_path):
    put(tmp_path / "train", "a/0.jpg")
    (tmp_path / "train" / "loop").symlink_to(".")
    with pytest.raises(UserError, match=r"no image in 1 of 2 class folders: loop \(1 links lead to folders that"):
        folders.Folder(str(tmp_path), "train")


TWICE = {"a/twice": "deep", "a/via": "../../outside"}  # outside links back to a/


@pytest.mark.parametrize("link", TWICE)
def test_a_link_that_repeats_images_is_refused(tmp_path, link):
    put(tmp_path / "train", "a/0.jpg", "a/deep/0.jpg", "b/0.jpg")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "back").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "train" / link).symlink_to(TWICE[link])
    shown = "a/via/back" if link == "a/via" else "a/(twice|deep)"
    with pytest.raises(UserError, match=f"^{tmp_path}/train/{shown} leads to /.*: its images would count twice"):
        folders.Folder(str(tmp_path), "train")


def test_exponentially_many_links_are_refused(tmp_path):
    """There are 2^40 paths through these folders, without a loop."""
    put(tmp_path / "train", "a/0.jpg")
    for depth in range(40):
        (tmp_path / f"{depth}").mkdir()
        for name in "xy":
            (tmp_path / f"{depth}" / name).symlink_to(tmp_path / f"{depth + 1}")
    (tmp_path / "40").mkdir()
    (tmp_path / "train" / "a" / "0").symlink_to(tmp_path / "0")
    with pytest.raises(UserError, match="its images would count twice"):
        folders.Folder(str(tmp_path), "train")
