"""Test predict.py: answers and features equal those of the model called directly, and no image is lost."""

import argparse
import csv
import errno
import json
import os
import shutil

import numpy as np
import pandas
import pytest
import torch
from data_helpers import write_shard
from helpers import torchrun
from PIL import Image

import models_arm
from Evaluation import features, prediction_files, probe
from tools import predict
from util.data.sources.image_files import FileList
from util.data.sources.mixture import Mixture
from util.data.transforms import eval_transform
from util.errors import RunError, UserError

SIZES = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 32, "depth": 4}
NAMES = ['a "b", c', "Käse", ""]  # the third output has no name
QUIET = ["--device", "cpu", "--num_workers", 0, "--batch_size", 5]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    found = {
        "three": models_arm.ARMClassifier(**SIZES, num_classes=3),
        "one": models_arm.ARMClassifier(**SIZES, num_classes=1),
        "synsets": models_arm.ARMClassifier(**SIZES, num_classes=1000),
        "pretrain": models_arm.ARMPretrain(**SIZES, cluster_size=2, dec_embed_dim=64, dec_depth=2),
    }
    for name in ("three", "one", "synsets"):
        torch.nn.init.normal_(found[name].head.weight)
    return {name: model.eval() for name, model in found.items()}


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        saved = argparse.Namespace(input_size=[48, 32], cluster_size=2, global_pool=True)
        content = {"model": model.state_dict(), "args": saved}
        torch.save(content | ({"class_names": NAMES} if name == "three" else {}), folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory, photographs):
    """A folder of nine images at several depths without labels, with names that CSV must quote."""
    root = tmp_path_factory.mktemp("photos")
    names = ["1.jpg", "2.png", "trip/a, b.jpg", 'trip/"q".jpg', "trip/far/日本.png", "trip/far/away/x.jpg"]
    names += [os.fsdecode(b"trip/caf\xe9.jpg"), "z/1.jpg", "z/2\n.jpg"]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photographs[i % 2].crop((40 * i, 10 * i, 40 * i + 200, 10 * i + 160)).save(root / name)
    return root


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the script and returns the path of its output."""

    def run(checkpoint, *words, output="answers.csv"):
        words = [checkpoint, *words, *QUIET, "--output", tmp_path / "out" / output]
        predict.main(predict.get_args_parser().parse_args([str(word) for word in words]))
        return tmp_path / "out" / output

    return run


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read(paths):
    """Return the images of files as the model sees them."""
    transform = eval_transform((48, 32), "square")
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


@torch.inference_mode()
def wanted(model, paths):
    """Return the probabilities (n, classes) of files, computed directly."""
    return model(read(paths)).softmax(dim=1)


def files_of(folder):
    return predict.open_images([str(folder)])


def test_answers_are_the_models(models, checkpoints, photos, run):
    """Of a folder at any depth and single files, in their order; `csv` and pandas read the same."""
    more = [photos / "z" / "1.jpg", photos / "1.jpg"]
    path = run(checkpoints / "three.pth", more[0], photos, more[1])
    source, found = files_of(photos), rows(path)
    paths = [str(more[0]), *(source.path(i) for i in range(9)), str(more[1])]
    assert [row["file"] for row in found] == [str(more[0]), *(source.name(i) for i in range(9)), str(more[1])]
    assert list(found[0]) == ["file", *(f"{c}_{n}" for n in (1, 2, 3) for c in ("class", "probability")), "error"]
    names = [NAMES[0], NAMES[1], "2"]
    for row, probabilities in zip(found, wanted(models["three"], paths), strict=True):
        best = probabilities.argsort(descending=True).tolist()
        assert [row[f"class_{n}"] for n in (1, 2, 3)] == [names[i] for i in best]
        assert np.allclose([float(row[f"probability_{n}"]) for n in (1, 2, 3)], probabilities[best], atol=1e-5)
    table = pandas.read_csv(path)
    assert table["file"].tolist() == [row["file"] for row in found]
    assert table["class_1"].tolist() == [row["class_1"] for row in found]
    assert np.allclose(table[[f"probability_{n}" for n in (1, 2, 3)]].sum(axis=1), 1, atol=1e-5)
    assert table["error"].isna().all()


def test_json_lines(models, checkpoints, photos, run):
    path = run(checkpoints / "three.pth", photos, "--topk", 2, output="answers.jsonl")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    probabilities = wanted(models["three"], [files_of(photos).path(i) for i in range(9)])
    assert np.allclose([row["probabilities"] for row in found], probabilities.topk(2).values, atol=1e-5)
    assert {tuple(row) for row in found} == {("file", "classes", "probabilities")}
    assert pandas.read_json(path, lines=True)["file"].tolist() == [row["file"] for row in found]


def test_shards_and_tables(models, checkpoints, photos, run, tmp_path):
    """An image of a shard is named by the shard and the member."""
    data = (photos / "1.jpg").read_bytes()
    (tmp_path / "tars").mkdir()
    write_shard(tmp_path / "tars" / "a.tar", [("x/1.jpg", data), ("x/2.jpg", data)])
    (tmp_path / "table.csv").write_text(f"path\n{photos / '2.png'}\n")
    found = rows(run(checkpoints / "three.pth", f"wds:{tmp_path}/tars", f"csv:{tmp_path}/table.csv"))
    tar = tmp_path / "tars" / "a.tar"
    assert [row["file"] for row in found] == [f"{tar}: x/1.jpg", f"{tar}: x/2.jpg", str(photos / "2.png")]
    best = wanted(models["three"], [photos / "1.jpg", photos / "1.jpg", photos / "2.png"]).amax(dim=1)
    assert np.allclose([float(row["probability_1"]) for row in found], best, atol=1e-5)


def test_one_class(checkpoints, photos, run):
    found = rows(run(checkpoints / "one.pth", photos / "1.jpg"))
    want = {"file": str(photos / "1.jpg"), "class_1": "0", "probability_1": "1.0", "error": ""}
    assert found == [want]


def test_a_thousand_outputs_without_names_are_synsets(checkpoints, photos, run, capsys):
    """As of the released classifiers, whatever the folders are called."""
    found = {row["class_5"][:1] for row in rows(run(checkpoints / "synsets.pth", photos)) if not row["error"]}
    assert found == {"n"}
    assert "ImageNet's in the order of their synsets are assumed" in capsys.readouterr().out


def test_broken_images_are_named(models, checkpoints, photos, run, tmp_path, capsys):
    """In their place in both forms and in one line; the others are answered."""
    shutil.copytree(photos / "trip", tmp_path / "trip")
    (tmp_path / "trip" / "b.jpg").write_bytes((photos / "1.jpg").read_bytes()[:500])
    found = rows(run(checkpoints / "three.pth", tmp_path / "trip"))
    (bad,) = (row for row in found if row["error"])
    assert len(found) == 6
    assert bad["file"] == str(tmp_path / "trip" / "b.jpg")
    assert not bad["error"].startswith(bad["file"])
    assert {value for key, value in bad.items() if key not in ("file", "error")} == {""}
    assert all(row["class_3"] for row in found if row is not bad)
    assert f"1 of 6 images have no result, the column error says why: {bad['file']}\n" in capsys.readouterr().out
    lines = run(checkpoints / "three.pth", tmp_path / "trip", output="x.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines if "error" in line] == [{"file": bad["file"], "error": bad["error"]}]
    with pytest.raises(RunError, match=r"none of the 1 images has a result: .+"):
        run(checkpoints / "three.pth", bad["file"], output="none.csv")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"answers.csv", "x.jsonl"}


def test_logits_that_are_not_finite_are_no_answer(checkpoints, photos, run, monkeypatch):
    model = models_arm.ARMClassifier
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda self, x: forward(self, x) / (torch.arange(len(x)) != 1)[:, None])
    found = rows(run(checkpoints / "three.pth", photos))
    assert [row["error"] for row in found] == ["", "logits are not finite", *[""] * 4, "logits are not finite", "", ""]
    assert found[1]["class_1"] == ""


@pytest.mark.parametrize(("kind", "more"), [("pretrain", ["--block", 2]), ("three", ["--average_last", 2])])
def test_features_equal_those_of_the_probes(checkpoints, image_folder, run, tmp_path, kind, more):
    words = ["--data_path", image_folder, "--probe", "knn", "attentive", "--k", 1, "--seeds", 1, "--probe_epochs", 1]
    words = [checkpoints / f"{kind}.pth", *words, *QUIET, *more, "--cache", tmp_path / "cache"]
    probe.main(probe.get_args_parser().parse_args([str(w) for w in (*words, "--output", tmp_path / "probe.json")]))
    for name, dtype in (("pooled", np.float32), ("tokens", np.float16)):
        where = ["--features", name, *more]
        path = run(checkpoints / f"{kind}.pth", image_folder / "val", *where, output=f"{name}.npy")
        (cached,) = (tmp_path / "cache").glob(f"val-{name}-*.npy")
        array = np.load(path, mmap_mode="r")
        assert array.dtype == dtype
        assert np.array_equal(array, np.load(cached)["feature"])
        listed = rows(path.with_suffix(".csv"))
        assert [row["index"] for row in listed] == [str(i) for i in range(7)]
        assert [row["file"] for row in listed] == [files_of(image_folder / "val").name(i) for i in range(7)]


def test_features_of_broken_images_are_nan(checkpoints, photos, run, tmp_path, monkeypatch):
    """Those beyond float16 too."""
    (tmp_path / "bad.png").write_text("no image")
    encode = features.encode
    huge = lambda model, imgs, blocks: encode(model, imgs, blocks) * torch.tensor([1, 1, 1e9])[:, None, None]  # noqa: E731
    monkeypatch.setattr(features, "encode", huge)
    images = [photos / "1.jpg", tmp_path / "bad.png", photos / "2.png"]
    path = run(checkpoints / "pretrain.pth", *images, "--features", "tokens", output="f.npy")
    assert np.isnan(np.load(path)).reshape(3, -1).all(axis=1).tolist() == [False, True, True]
    errors = [row["error"] for row in rows(path.with_suffix(".csv"))]
    assert errors == ["", "no image of a known format", "features in float16 are not finite"]


def test_two_processes_equal_one(checkpoints, photos, run, tmp_path):
    """Their parts are merged in the order of the images, and then removed."""
    (tmp_path / "bad.png").write_text("no image")
    words = [checkpoints / "three.pth", photos, tmp_path / "bad.png", photos / "1.jpg"]
    torchrun("tools/predict.py", *words, *QUIET, "--output", tmp_path / "two" / "a.csv")
    one, two = (pandas.read_csv(path) for path in (run(*words), tmp_path / "two" / "a.csv"))
    numbers = [column for column in one if column.startswith("probability")]
    assert np.allclose(one[numbers], two[numbers], atol=1e-5, equal_nan=True)
    assert one.drop(columns=numbers).equals(two.drop(columns=numbers))
    assert os.listdir(tmp_path / "two") == ["a.csv"]


def test_three_processes_for_two_images(checkpoints, photos, run, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    words = [checkpoints / "pretrain.pth", photos / "1.jpg", tmp_path / "bad.png", "--features", "pooled"]
    one = run(*words, output="f.npy")
    torchrun("tools/predict.py", *words, *QUIET, "--output", tmp_path / "many" / "f.npy", processes=3)
    many = tmp_path / "many" / "f.npy"
    assert np.allclose(np.load(one), np.load(many), atol=1e-5, equal_nan=True)
    assert one.with_suffix(".csv").read_text() == many.with_suffix(".csv").read_text()
    assert {path.name for path in many.parent.iterdir()} == {"f.npy", "f.csv"}


def test_parts_are_merged_in_turn(tmp_path):
    """As `ShareSampler` deals the images; a process without images has an empty part."""
    parts = [tmp_path / name for name in ("0", "1", "2")]
    for part, text in zip(parts, ("a\nd\n", "b\n", "c\n"), strict=True):
        prediction_files.append(tmp_path, part, text)
    prediction_files.merge(tmp_path, parts, tmp_path / "all", lambda lines: [b"head\n", *lines])
    assert (tmp_path / "all").read_text() == "head\na\nb\nc\nd\n"
    prediction_files.append(tmp_path, tmp_path / "none", "")
    prediction_files.merge(tmp_path, [parts[1], tmp_path / "none"], tmp_path / "one", lambda lines: lines)
    assert (tmp_path / "one").read_text() == "b\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("three.pth {photos} --output x.txt", "x.txt: answers are written as .csv or .jsonl"),
        ("three.pth {photos} --output x", "x: answers are written as"),
        ("three.pth {photos} --features pooled --output x.csv", "x.csv: features are written as .npy"),
        ("pretrain.pth {photos} --output x.csv", "comes from pretraining and has no classes: add --features pooled"),
        ("three.pth {photos} --output x.csv --topk 4", "--topk 4: the checkpoint has 3 classes"),
        ("three.pth {photos} --output x.npy --features pooled --topk 2", "--topk is not for --features"),
        ("three.pth {photos} --output x.csv --block 2", "--block is only for --features"),
        ("three.pth {photos} --output x.npy --features pooled --block 5", "--block 5: the encoder has 4 blocks"),
        ("three.pth none.jpg {photos} --output x.csv", "error: none.jpg: No such file or directory"),
        ("three.pth /dev/null --output x.csv", "/dev/null: it is neither a file nor a folder"),
        ("three.pth wds:none --output x.csv", "error: wds:none: no such folder"),
        ("three.pth {photos}/empty --output x.csv", "empty: no image in it"),
        ("three.pth {photos} --output x.csv --model_key model_ema", "the checkpoint has no model_ema"),
        ("none.pth {photos} --output x.csv", "no checkpoint file"),
        ("three.pth {photos} --output /dev/null/x.csv", "--output /dev/null/x.csv cannot be written"),
        ("three.pth {photos} --output {photos}/1.csv", "1.csv is there and is no earlier result of this kind"),
        ("three.pth {photos}/1.csv --output {photos}/1.csv", "another file that is read"),
        ("three.pth {photos} --features pooled --output {photos}/1.npy", "1.csv is there and is no earlier result"),
        ("three.pth {photos} --features pooled --output {photos}/2.npy", "2.npy is there and is no earlier result"),
    ],
)
def test_mistakes(checkpoints, photos, tmp_path, run_script, capsys, monkeypatch, words, message):
    root = tmp_path / "photos"
    shutil.copytree(photos / "z", root)
    (root / "empty").mkdir()
    (root / "1.csv").write_text("name,grade\n")
    np.save(root / "2.npy", np.zeros(3))
    before = {path: path.stat().st_size for path in root.iterdir()}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    name, *rest = words.format(photos=root).split()
    with pytest.raises(SystemExit) as exit_info:
        run_script(predict, checkpoints / name, *rest, *QUIET)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("predict.py: error: ")
    assert message in line
    assert {path: path.stat().st_size for path in root.iterdir()} == before
    assert not list((tmp_path / "here").iterdir())


def test_results_of_the_same_kind_are_replaced(checkpoints, photos, run, tmp_path):
    for output, more in (("a.csv", []), ("a.jsonl", []), ("f.npy", ["--features", "pooled"])):
        for _ in range(2):
            run(checkpoints / "three.pth", photos / "1.jpg", *more, output=output)
    with pytest.raises(UserError, match=r"a\.csv is there"):  # answers, and no list of images
        run(checkpoints / "three.pth", photos, "--features", "pooled", output="a.npy")


@pytest.mark.parametrize(("output", "more"), [("a.csv", []), ("f.npy", ["--features", "pooled"])])
def test_a_run_that_ends_early_leaves_the_former_result(checkpoints, photos, run, monkeypatch, output, more):
    path = run(checkpoints / "three.pth", photos / "1.jpg", *more, output=output)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    (path.parent / f".{output}.0123.tmp").touch()  # of a process that was killed
    (path.parent / f".{output}.0123.tmp1").touch()
    batches = []

    def stop(*_, **__):
        batches.append(1)
        if len(batches) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("util.tracking.run_log.Progress.update", stop)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints / "three.pth", photos, *more, output=output)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("output", "more", "kind", "call"),
    [("a.csv", [], RunError, "fsync"), ("f.npy", ["--features", "pooled"], UserError, "posix_fallocate")],
)
def test_a_full_disk(checkpoints, photos, run, tmp_path, monkeypatch, output, more, kind, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(kind, match=rf"--output {tmp_path}/out/{output} cannot be written: No space left on device"):
        run(checkpoints / "three.pth", photos, *more, output=output)
    assert not list((tmp_path / "out").iterdir())


def test_places_of_several_kinds_are_one_source(photos, tmp_path):
    """Single files in a row are one source; the order is that of the command line."""
    one, two = str(photos / "1.jpg"), str(photos / "2.png")
    source = predict.open_images([one, two, str(photos / "z"), one])
    assert isinstance(source, Mixture)
    assert [len(part.labels) for part in source.sources] == [2, 2, 1]
    assert [source.name(i) for i in (0, 1, 4)] == [one, two, one]
    assert isinstance(predict.open_images([one]), FileList)
