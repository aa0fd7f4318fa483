"""Pretraining on images as they lie: any folder, tars, hub datasets and tables without labels, and several places."""

import argparse
import re
import shutil
import socket

import pytest
import torch
from checkpoint_helpers import assert_equal_state
from data_helpers import pretrain_words, put, run_pack, write_shard
from helpers import encoded, finetune_args, loader_args, read_log, torchrun

import main_pretrain
from util.data import datasets, loaders, transforms
from util.data.sources import readers
from util.data.sources.source import NoSplit
from util.errors import UserError
from util.training import run_state


@pytest.fixture(scope="module")
def crops(photographs):
    """Twelve crops of two photographs as JPEG."""
    boxes = [(40 * i, 25 * i, 40 * i + 90 + i, 25 * i + 70) for i in range(12)]
    return [encoded(photographs[i % 2].crop(box)) for i, box in enumerate(boxes)]


def lay(root, crops, names):
    """Write one crop under each name; return the folder."""
    for name, crop in zip(names.split(), crops, strict=False):
        put(root, name, content=crop)
    return root


def opened(path, split="train", labels=False):
    return readers.open_source(path if isinstance(path, list) else str(path), split, labels)


def images(source):
    return [source.read(index) for index in range(len(source.labels))]


def save_hub(folder, crops, *labels):
    """Save three crops as a dataset of Hugging Face's library."""
    hub = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": crop, "path": None} for crop in crops[:3]]} | ({"label": labels} if labels else {})
    features = {"image": hub.Image(), "label": hub.ClassLabel(names=["x", "y y", "z"])}
    hub.Dataset.from_dict(rows, features=hub.Features({name: features[name] for name in rows})).save_to_disk(folder)


# {layout: names of crops; the order in which they are trained on, by number; the classes}
LAYOUTS = {
    "flat": ("b.jpg a.jpg c.JPG", [1, 0, 2], []),
    "deep": ("x/deep/1.jpg x/0.jpg x-1/0.jpg loose.jpg", [3, 1, 0, 2], []),
    "class folders": ("b/0.jpg a/0.jpg a/deep/1.jpg", [1, 2, 0], ["a", "b"]),
    "train": ("train/b.jpg train/a.jpg beside.jpg val/x.jpg", [1, 0], []),
    "train with classes": ("train/b/0.jpg train/a/0.jpg test/a/0.jpg", [1, 0], ["a", "b"]),
    "train with a folder": ("train/b/0.jpg train/a.jpg train/b/1.jpg", [1, 0, 2], []),
    "train with a stray": ("train/b/0.jpg train/c.jpg train/a/0.jpg train/a/1.jpg", [2, 3, 0], ["a", "b"]),
    "train with many strays": ("train/b/0.jpg train/c.jpg train/a/0.jpg train/d.jpg", [1, 3, 2, 0], []),
    "classes and a stray": ("b/0.jpg c.jpg a/0.jpg a/1.jpg", [1, 2, 3, 0], []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_folders(tmp_path, crops, run_script, capsys, caplog, layout):
    caplog.set_level("INFO")
    names, order, classes = LAYOUTS[layout]
    lay(tmp_path / "own", crops, names)
    source = opened(tmp_path / "own")
    assert images(source) == [crops[number] for number in order]
    assert source.classes == classes
    assert source.labels.tolist() == ([0, 0, 1][-len(order) :] if classes else [0] * len(order))
    run_script(main_pretrain, *pretrain_words(tmp_path / "own", "--batch_size", 2, "--output_dir", tmp_path / "out"))
    assert len(read_log(tmp_path / "out")) == 1
    assert f"{len(order)} training images" in capsys.readouterr().out
    line = f"{tmp_path}/own has no folder train: all {len(order)} images below it are taken"
    assert (line in caplog.messages) == ("train" not in layout)
    left_out = f"{tmp_path}/own/train: 1 files lie beside the class folders and are left out; the first: c.jpg"
    assert (left_out in caplog.messages) == (layout == "train with a stray")
    loose = {"deep": 1, "train with a folder": 1, "train with many strays": 2, "classes and a stray": 1}.get(layout)
    line = f"{source.root}: {loose} images lie beside the folders in it, so none has a label"
    assert (line in caplog.messages) == bool(loose)


def test_images_to_validate_are_never_trained_on(tmp_path, crops, run_script, capsys):
    lay(tmp_path, crops, "a.jpg validation/b.jpg")
    with pytest.raises(SystemExit):
        run_script(main_pretrain, *pretrain_words(tmp_path, "--output_dir", tmp_path / "out"))
    assert "it has validation and no train, so images to validate with would be trained on" in capsys.readouterr().err
    assert len(opened(tmp_path, "").labels) == 2  # who asks for all gets all


def test_other_names_of_val(tmp_path, crops, caplog):
    caplog.set_level("INFO")
    lay(tmp_path, crops, "train/a/0.jpg valid/a/0.jpg test/a/0.jpg")
    source = opened(tmp_path, "val", labels=True)
    assert images(source) == [crops[1]]
    assert caplog.messages == [f"--data_path {tmp_path}: valid is taken as val; test is left out"]
    lay(tmp_path, crops[3:], "validation/a/0.jpg")
    assert images(opened(tmp_path, "val")) == [crops[3]]
    lay(tmp_path, crops[4:], "val/0.jpg")
    caplog.clear()
    assert images(opened(tmp_path, "val")) == [crops[4]]
    assert caplog.messages == [f"--data_path {tmp_path}: validation and valid and test are left out"]
    with pytest.raises(NoSplit, match="there is no folder 'val' in it"):
        opened(tmp_path / "train", "val")


def test_links_repeat_no_image_of_a_folder_without_labels(tmp_path, crops):
    lay(tmp_path, crops, "a/0.jpg b/1.jpg")
    (tmp_path / "best").symlink_to("b")
    with pytest.raises(UserError, match=f"^{tmp_path}/best leads to {tmp_path}/b, which was already read as .*/b: its"):
        opened(tmp_path)


# ---- tar files


def shard(path, crops, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = iter(crops)
    write_shard(path, [(name, next(contents) if name.endswith("jpg") else b"1") for name in names.split()])


def test_tars_without_labels(tmp_path, crops, run_script, caplog):
    shard(tmp_path / "x.tar", crops, "a/0.jpg a/0.txt 1.5.jpg a/0.mask.jpg")
    shard(tmp_path / "y.tar", crops[3:], "2.jpg")
    path = f"wds:{tmp_path}"
    source = opened(path)
    assert images(source) == [crops[0], crops[1], crops[3]]  # a/0.mask.jpg belongs to a/0.jpg
    assert (source.classes, source.labels.tolist()) == ([], [0, 0, 0])
    line = "1 images with a dot in their key have no label and are left out; the first: x.tar: a/0.mask.jpg"
    assert line in caplog.text
    assert images(opened(path)) == images(source)  # from the index
    assert images(opened(path, "")) == images(source)
    for again in range(2):
        with pytest.raises(NoSplit if again else UserError, match="no train/"):
            readers.open_source(path, "train")
    run_script(main_pretrain, *pretrain_words(path, "--batch_size", 2, "--output_dir", tmp_path / "out"))
    shard(tmp_path / "val-0.tar", crops[4:], "2.jpg")
    with pytest.raises(UserError, match="it has val and no train"):
        opened(path)


@pytest.mark.parametrize("label", ["cls", "json"])
def test_strange_and_missing_labels_do_not_stop_pretraining(tmp_path, crops, caplog, label):
    """Whoever needs them gets the same mistake from an index that was made without."""
    caplog.set_level("INFO")
    content = {"cls": b"cat", "json": b'{"label": "cat"}'}[label]
    members = [("0.jpg", crops[0]), ("0.cls", b"1"), ("1.jpg", crops[1]), (f"1.{label}", content), ("2.jpg", crops[2])]
    write_shard(tmp_path / "train.tar", members)
    for _ in range(2):
        source = opened(f"wds:{tmp_path}")
        assert (images(source), source.classes) == (crops[:3], [])
        assert f"{tmp_path}: 2 of 3 images have no label: the images are read without labels" in caplog.text
        line = f"1 labels are no whole numbers from 0 to 999999 and are left out; the first: train.tar: 1.{label}"
        assert line in caplog.text
        with pytest.raises(UserError, match=rf"train\.tar: 1\.{label} holds no label: 'cat' is not a whole number"):
            opened(f"wds:{tmp_path}", labels=True)
        caplog.clear()


# ---- several places


@pytest.fixture
def places(tmp_path, crops):
    """A flat folder of three, tars with two, and a folder with classes and one image to validate."""
    lay(tmp_path / "flat", crops, "0.jpg 1.jpg 2.jpg")
    shard(tmp_path / "tars" / "x.tar", crops[3:], "3.jpg 4.jpg")
    lay(tmp_path / "sorted", crops[5:], "train/a/5.jpg train/b/6.jpg val/a/7.jpg")
    return [str(tmp_path / "flat"), f"wds:{tmp_path}/tars*2", str(tmp_path / "sorted")]


def test_a_mixture(places, crops, caplog):
    caplog.set_level("INFO")
    source = opened(places)
    assert images(source) == [crops[i] for i in (0, 1, 2, 3, 4, 3, 4, 5, 6)]
    assert source.name(6) == f"{places[1][4:-2]}/x.tar: 4.jpg"
    assert (source.classes, source.labels.tolist()) == ([], [0] * 9)
    flat, tars, folder = places[0], places[1][4:-2], places[2]
    line = f"images of train: 3 of {flat} + 2 x 2 of {tars} + 2 of {folder}/train = 9; they are read without labels, "
    assert line + "since the places have different classes" in caplog.text
    assert images(opened(places, "val")) == [crops[7]]
    assert f"images of val: 1 of {folder}/val = 1; none of {flat}, wds:{tars}" in caplog.text
    with pytest.raises(NoSplit, match="there is no folder 'val' in it"):
        opened(places[:1], "val")
    assert images(opened([flat, folder + "*3"], "val")) == [crops[7]]
    assert opened([folder + "*3"]).classes == ["a", "b"]  # of one place, or places with the same classes
    assert opened([folder + "*3"]).labels.tolist() == [0, 1] * 3


def test_every_kind_pretrains(places, tmp_path, crops, run_script, capsys):
    save_hub(tmp_path / "hub", crops)
    put(tmp_path, "t.csv", content=b"file\nflat/0.jpg\nsorted/val/a/7.jpg\n")
    words = pretrain_words(places[0], "--output_dir", tmp_path / "out", "--vis_freq", 1, "--batch_size", 7)
    run_script(main_pretrain, *words, "--data_path", *places, f"csv:{tmp_path}/t.csv", f"hfds:{tmp_path}/hub")
    assert "14 training images" in capsys.readouterr().out
    assert len(read_log(tmp_path / "out")) == 1


def test_a_name_like_a_weight(tmp_path, crops):
    lay(tmp_path / "a*2", crops, "0.jpg")
    assert len(opened([f"{tmp_path}/a*2"]).labels) == 1
    assert len(opened([f"{tmp_path}/a*2*2"]).labels) == 2


MIXED = {
    "flat flat": "--data_path ROOT/flat comes twice: ROOT/flat*2 takes its images twice",
    "flat flat*2": "--data_path ROOT/flat comes twice",
    "flat link": "--data_path ROOT/flat and ROOT/link hold the same images, which would count twice",
    "flat flat/deep": "--data_path ROOT/flat and ROOT/flat/deep hold the same images",
    "flat*0": "--data_path ROOT/flat*0: a weight is from 1 to 1000",
    "flat*1001": "a weight is from 1 to 1000",
    "flat*99999999999999999999": "a weight is from 1 to 1000",
    "flat*two": "ROOT/flat*two: no such folder",
    "flat none": "--data_path ROOT/none: no such folder",
}


@pytest.mark.parametrize("words", MIXED)
def test_mistakes_in_several_places(tmp_path, crops, words):
    lay(tmp_path / "flat", crops, "0.jpg deep/1.jpg")
    (tmp_path / "link").symlink_to("flat")
    with pytest.raises(UserError) as error:
        opened([f"{tmp_path}/{word}" for word in words.split()])
    assert MIXED[words].replace("ROOT", str(tmp_path)) in str(error.value)


def test_processes_share_a_mixture(places, monkeypatch):
    """Every image as often as its weight says; no process sees the share of another."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        transform = transforms.finetune_transform((32, 32), finetune_args())
        dataset = datasets.ImageDataset(opened(places), datasets.pixels_by("fast", transform))
        loader = loaders.train_loader(dataset, loader_args(batch_size=3), torch.device("cpu"))
        loader.sampler.set_epoch(1)
        shares.append([index for _, index in loader.sampler])
    assert sorted(index for share in shares for index in share) == list(range(9))


def test_a_mixture_resumes_bitwise(places, tmp_path, run_script):
    words = ["--data_path", *places, "--batch_size", 2, "--epochs", 2, "--vis_freq", 0, "--output_dir"]
    for name in ("whole", "halves"):
        run_script(main_pretrain, *pretrain_words(places[0]), *words, tmp_path / name, "--save_freq", 1)
    (tmp_path / "halves" / "checkpoint-last.pth").unlink()
    (tmp_path / "halves" / "checkpoint-1.pth").unlink()
    for path in (tmp_path / "halves").glob("checkpoint-last-*"):
        path.unlink()
    run_script(main_pretrain, *pretrain_words(places[0]), *words, tmp_path / "halves", "--resume", "auto")
    want, got = (torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=False) for name in ("whole", "halves"))
    assert_equal_state(got["model"], want["model"])
    assert read_log(tmp_path / "halves")[1] == read_log(tmp_path / "whole")[1]
    first = torch.load(tmp_path / "whole" / "checkpoint-0.pth", weights_only=False)
    assert any((first["model"][name] != value).any() for name, value in want["model"].items())


# ---- which images a run has seen


def test_fingerprints_without_labels(tmp_path, crops):
    """Moving keeps them; another name, number, order or weight changes them."""
    lay(tmp_path / "a", crops, "0.jpg deep/1.jpg")
    shard(tmp_path / "b" / "x.tar", crops, "0.jpg 1.jpg")

    def prints(*paths):
        return [run_state.fingerprint(opened(path)) for path in paths]

    a, b = str(tmp_path / "a"), f"wds:{tmp_path}/b"
    first = prints(a, b, [a, b], [b, a], [f"{a}*2", b])
    assert len({*first}) == 5
    shutil.move(tmp_path / "a", tmp_path / "moved")
    shutil.move(tmp_path / "b", tmp_path / "tars")
    a, b = str(tmp_path / "moved"), f"wds:{tmp_path}/tars"
    assert prints(a, b, [a, b], [b, a], [f"{a}*2", b]) == first
    (tmp_path / "moved" / "0.jpg").rename(tmp_path / "moved" / "00.jpg")
    shard(tmp_path / "tars" / "x.tar", crops[1:], "0.jpg 1.jpg")
    assert not {*prints(a, b, [a, b])} & {*first}


def test_a_changed_set_of_images_is_not_resumed(tmp_path, crops, run_script, capsys):
    lay(tmp_path / "flat", crops, "0.jpg 1.jpg 2.jpg")
    words = pretrain_words(tmp_path / "flat", "--batch_size", 2, "--vis_freq", 0, "--output_dir", tmp_path / "out")
    run_script(main_pretrain, *words)
    lay(tmp_path / "flat", crops, "3.jpg")
    with pytest.raises(SystemExit):
        run_script(main_pretrain, *words, "--resume", "auto", "--epochs", 2)
    message = "with other arguments: epochs 1 -> 2, images of --data_path (other ones, names or order); "
    assert message in capsys.readouterr().err
    run_script(main_pretrain, *words, "--resume", "auto", "--epochs", 2, "--allow_changed_args")


def changed_images(before, now):
    """Return what a run on one source says of a checkpoint on another, perhaps of an earlier version."""
    both = [argparse.Namespace(batch_size=1, accum_iter=1, world_size=1) for _ in range(2)]
    for args, source in zip(both, (before, now), strict=True):
        run_state.record_images(args, source)
    new = run_state.changed_arguments(both[1], {"samples": 0, "args": both[0]})
    del both[0].images
    return new, run_state.changed_arguments(both[1], {"samples": 0, "args": both[0]})


def test_other_images_with_the_same_labels_are_not_resumed(tmp_path, crops):
    """Earlier versions compared labels only, and still resume; so does another reader of the same labels."""
    for place, start in (("a", 0), ("b", 4)):
        lay(tmp_path / place, crops[start:], f"train/x/{place}0.jpg train/x/{place}1.jpg train/y/{place}2.jpg")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    rows = [f"a/train/{name},{name[0]}\n" for name in ("x/a0.jpg", "x/a1.jpg", "y/a2.jpg")]
    sources = {"a": opened(a), "a b": opened([a, b]), "b a": opened([b, a])}
    for name, order in (("table", rows), ("swapped", [rows[1], rows[0], rows[2]])):
        put(tmp_path, f"{name}.csv", content="".join(["path,label\n", *order]).encode())
        sources[name] = opened(f"csv:{tmp_path}/{name}.csv")
    others = "images of --data_path (other ones, names or order)"
    for before, now in (("a b", "b a"), ("table", "swapped")):
        assert run_state.fingerprint(sources[before]) == run_state.fingerprint(sources[now])
        assert changed_images(sources[before], sources[now]) == ([others], [])
        assert changed_images(sources[now], sources[now]) == ([], [])
    assert changed_images(sources["a"], sources["table"]) == ([], [])
    labels = ["images of --data_path (other ones, classes or labels)"]
    assert changed_images(sources["a"], sources["a b"]) == (labels, labels)
    put(tmp_path, "table.csv", content="".join(["path,label\n", *rows]).replace("a2.jpg,y", "a2.jpg,x").encode())
    assert changed_images(sources["table"], opened(f"csv:{tmp_path}/table.csv")) == (labels, labels)
    shutil.move(a, tmp_path / "moved")
    assert changed_images(sources["a"], opened(tmp_path / "moved")) == ([], [])


def test_processes_that_see_other_images_are_named(tmp_path, crops, monkeypatch):
    lay(tmp_path / "a", crops, "0.jpg 1.jpg")
    lay(tmp_path / "b", crops, "0.jpg")
    a, b = opened(tmp_path / "a"), opened(tmp_path / "b")
    seen = (1, b.identity(), run_state.fingerprint(b))
    monkeypatch.setattr(run_state, "gather", lambda own: [own, own, ([own[0][0], seen], "node7")])
    message = f"rank 2 on node7 sees other images than rank 0 on {socket.gethostname()}: 1 and 2 of {a.root}, or other"
    with pytest.raises(UserError, match=re.escape(message)):
        run_state.check_same_images(b, a)
    run_state.check_same_images(a, b)


def test_two_processes_pretrain_on_a_mixture(places, tmp_path):
    words = pretrain_words(places[0], "--output_dir", tmp_path / "out", "--data_path", *places, "--batch_size", 2)
    out = torchrun("main_pretrain.py", *words, "--vis_freq", 0)
    assert "9 training images, 2 x cpu" in out
    assert out.count("images of train: ") == 1


# ---- packing


@pytest.mark.parametrize("kind", ["flat", "tars", "hub", "table"])
def test_what_is_packed_reads_back_equal(tmp_path, crops, kind, places):
    path = {"flat": places[0], "tars": places[1][:-2], "hub": f"hfds:{tmp_path}/hub", "table": f"csv:{tmp_path}/t.csv"}
    save_hub(tmp_path / "hub", crops, 2, 0, 2)
    put(tmp_path, "t.csv", content=b"path,label\nflat/0.jpg,7\nflat/2.jpg,0\n")
    needed = kind in ("hub", "table")
    words = [path[kind], tmp_path / "packed", *([] if needed else ["--allow_unlabelled"])]
    run_pack(*words)
    want, got = opened(path[kind], labels=needed), opened(f"wds:{tmp_path}/packed", labels=needed)
    pairs = [sorted(zip(images(source), source.labels.tolist(), strict=True)) for source in (want, got)]
    assert pairs[0] == pairs[1]
    assert got.classes == (["x", "", "z"] if kind == "hub" else want.classes)  # y y has no images
    shard = tmp_path / "packed" / "train" / "000000.tar"
    written = shard.stat().st_mtime_ns
    run_pack(*words)
    assert shard.stat().st_mtime_ns == written


def test_what_cannot_be_packed(tmp_path, crops, places):
    put(tmp_path, "t.csv", content=b"path,label\nflat/0.jpg,a/b\nflat/2.jpg,c\n")
    with pytest.raises(UserError, match="the class a/b cannot be a folder in the shards: rename it"):
        run_pack(f"csv:{tmp_path}/t.csv", tmp_path / "packed")
    put(tmp_path, "t.csv", content=b"path,label\nflat/0.jpg,b\nflat/2.jpg,c\n")
    run_pack(f"csv:{tmp_path}/t.csv", tmp_path / "packed")
    put(tmp_path, "t.csv", content=b"path,label\nflat/0.jpg,b\nflat/2.jpg,b\n")
    with pytest.raises(UserError, match="packed/train holds shards of other images or settings"):
        run_pack(f"csv:{tmp_path}/t.csv", tmp_path / "packed")
