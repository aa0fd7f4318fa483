"""Where images are: tar shards and Hugging Face datasets beside folders, and packing one into the other."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
from conftest import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN, encoded, read_log
from test_data import finetune_args, loader_args
from util import datasets, decode, pack_images, sources
from util.errors import RunError, UserError

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
    folder = sources.open_source(str(jpeg_folder), split)
    source = sources.open_source(f"{kind}:{path}", split)
    assert source.classes == folder.classes == ["class_0", "class_1", "class_2"]
    assert len(source.labels) == (24 if split == "train" else 7)
    assert contents(source) == contents(folder)
    assert {type(source.read(0)), source.labels.dtype} == {bytes, np.dtype(np.int64)}


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_epochs_of_every_source(request, monkeypatch, kind):
    """Every image once over all processes, the same whatever the number of workers, and from the middle on."""
    path = f"{kind}:{request.getfixturevalue({'wds': 'shards', 'hfds': 'hub_folder'}[kind])}"
    transform = datasets.finetune_transform((32, 32), finetune_args())

    def epoch(number, start=0, **changes):
        dataset = datasets.image_dataset(path, "train", transform, "fast")
        loader = datasets.train_loader(dataset, loader_args(**changes), CPU)
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
    transform = datasets.finetune_transform((32, 32), finetune_args(aa=aa))
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
    want = contents(sources.TarShards(str(shards), "train"))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_images_of", None)  # not needed: they are kept beside the shards
        assert contents(sources.TarShards(str(shards), "train")) == want
    first = sorted((shards / "train").glob("*.tar"))[0]
    write_shard(first, [("class_0/new.jpg", b"new"), ("class_0/new.cls", b"0")])
    assert ("class_0", b"new") in contents(sources.TarShards(str(shards), "train"))


def test_shards_of_other_tools(tmp_path):
    """Names as the hub's ImageNet has them: splits in file names, keys without a folder, labels in .cls or .json."""
    image = encoded(Image.new("RGB", (20, 20)))
    write_shard(tmp_path / "in1k-train-0000.tar", [("a.jpg", image), ("a.json", b'{"label": 2}'), ("a.txt", b"note")])
    write_shard(tmp_path / "in1k-train-0001.tar", [("b.cls", b"1\n"), ("b.JPEG", image)])
    write_shard(tmp_path / "in1k-validation-0.tar", [("x/c.png", image), ("x/c.cls", b"0")])
    train = sources.open_source(f"wds:{tmp_path}", "train")
    assert (train.labels.tolist(), train.classes) == ([2, 1], ["0", "1", "2"])
    assert train.read(1) == image
    assert train.name(1) == f"{tmp_path}/in1k-train-0001.tar: b.JPEG"
    assert sources.open_source(f"wds:{tmp_path}", "val").classes == ["x"]


def test_a_broken_image_in_a_shard_is_named(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    write_shard(folder / "0.tar", [("a/b.jpg", b"nothing"), ("a/b.cls", b"0")])
    with pytest.raises(decode.BrokenImage, match=r"0\.tar: a/b\.jpg: "):
        datasets.image_dataset(
            f"wds:{tmp_path}", "train", datasets.finetune_transform((32, 32), finetune_args()), "fast"
        )[0]


MISTAKES = {
    "wds:/nowhere": "--data_path wds:/nowhere: no such folder",
    "wds:EMPTY": r"no train/\*\.tar and no \*train\*\.tar in it",
    "wds:UNLABELLED": r"0\.tar: a has no label, in a \.cls or a \.json file",
    "wds:TRUNCATED": r"0\.tar: unexpected end of data",
    "wds:TEXT": r"0\.tar: ",
    "wds:IMAGELESS": "the shards hold no image",
    "hfds:EMPTY": "--data_path hfds:.*EMPTY: ",
}


@pytest.mark.parametrize("path", MISTAKES)
def test_mistakes(tmp_path, run_script, capsys, path):
    if path.startswith("hfds"):
        pytest.importorskip("datasets")
    image = encoded(Image.new("RGB", (300, 300), (1, 2, 3)))
    for name in ("EMPTY", "UNLABELLED", "TRUNCATED", "TEXT", "IMAGELESS"):
        (tmp_path / name / "train").mkdir(parents=True)
    write_shard(tmp_path / "UNLABELLED/train/0.tar", [("a.jpg", image)])
    write_shard(tmp_path / "IMAGELESS/train/0.tar", [("a.txt", image)])
    write_shard(tmp_path / "TRUNCATED/train/0.tar", [("a.cls", b"0"), ("a.jpg", image)])
    os.truncate(tmp_path / "TRUNCATED/train/0.tar", 3000)
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
        sources.open_source("hfds:name", "train")


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
    source = sources.open_source(f"hfds:{tmp_path / 'two'}", "val")
    assert (source.labels.tolist(), source.classes, "(test)" in source.root) == ([1, 0], ["a", "b"], True)
    assert decode.crop_of(source.read(1), lambda h, w: (0, 0, h, w)).shape == (9, 9, 3)
    hub.DatasetDict({"train": train.rename_column("label", "fine")}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="one ClassLabel column or one called 'label'; found: coarse, fine"):
        sources.open_source(f"hfds:{tmp_path / 'other'}", "train")
    with pytest.raises(UserError, match="it has the splits train, and no validation"):
        sources.open_source(f"hfds:{tmp_path / 'other'}", "val")


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
    packed, folder = (sources.open_source(path, "train") for path in (f"wds:{tmp_path}/shards", str(tmp_path / "data")))
    assert packed.classes == ["a.class"]
    found = {packed.name(i).rpartition("/")[2]: packed.read(i) for i in range(3)}
    assert set(found) == {"0_large_image.jpg", "1_large.jpg", "2_small.png"}
    for name, photo in (("0_large_image.jpg", photographs[0]), ("1_large.jpg", photographs[1])):
        with Image.open(io.BytesIO(found[name])) as image:
            assert (image.format, image.size) == ("JPEG", (149, 100))
            want = np.array(photo.resize(image.size, Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(np.array(image.convert("RGB")) - want).mean() < 5
    assert found["2_small.png"] == folder.read(2)
    val, folder = (sources.open_source(path, "val") for path in (f"wds:{tmp_path}/shards", str(tmp_path / "data")))
    assert contents(val) == contents(folder)


def test_packing_goes_on_where_it_was(jpeg_folder, tmp_path):
    """Killed in the middle, it writes what is missing; the shards are those of an uninterrupted run."""
    words = ["--short_side", "64", "--shard_images", "2"]
    run_pack(jpeg_folder, tmp_path / "whole", *words)
    command = [sys.executable, "-m", "util.pack_images", jpeg_folder, tmp_path / "shards", *words]
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


def test_plan_of_a_packed_folder_is_readable(shards):
    plan = json.loads((shards / "train" / "packed.json").read_text())
    assert (plan["images"], plan["short_side"], plan["shard_images"]) == (24, None, 5)
