"""Test probe.py: compare features with the models, run the script from images to the JSON file."""

import argparse
import errno
import json
import os
import re
import shutil
import socket

import numpy as np
import pytest
import torch
from helpers import torchrun
from PIL import Image
from torchvision.datasets import ImageFolder

import models_arm
from Evaluation import features, probe, probes
from util.data.datasets import image_dataset
from util.data.transforms import eval_transform
from util.errors import RunError, UserError
from util.tracking.run_log import Log

SIZES = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 32, "depth": 4}
QUIET = ["--device", "cpu", "--num_workers", 0, "--probe_epochs", 30]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("words", "train", "val", "message"),
    [
        (["linear"], [0, 1], [0], "trains on 2 images and is chosen by one held out: there are 2"),
        (["attentive"], [0, -1, -1, 1], [0], "there are 2"),
        (["knn"], [0, -1, 1], [0], "--k 3: there are 2 training images"),
        (["linear"], [0, 0, 0, 2], [0, 1, 2, -1], "train has no image of 1 classes that val has: b"),
    ],
)
def test_images_that_do_not_suffice(words, train, val, message):
    args = argparse.Namespace(probe=words, k=[3, 9], data_path="images", attn_heads=None, probe_batch_size=2)
    labels = {"train": torch.tensor(train), "val": torch.tensor(val)}
    with pytest.raises(UserError, match=message):
        probe.check_images(args, 8, labels, ["a", "b", "c"])


def test_too_few_images_are_refused_before_features_are_computed(checkpoints, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / split / label / "0.png")
    monkeypatch.setattr(features, "encode", lambda *_: pytest.fail("features were computed"))
    with pytest.raises(UserError, match="there are 2"):
        run(tmp_path, checkpoints / "pretrain.pth", "--data_path", tmp_path, "--probe", "linear")


# ---- features


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    pretrain = models_arm.ARMPretrain(**SIZES, cluster_size=2, dec_embed_dim=64, dec_depth=2).eval()
    torch.nn.init.normal_(pretrain.patch_embed.proj.bias)
    pools = {f"classifier {pool}": models_arm.ARMClassifier(**SIZES, global_pool=pool).eval() for pool in (True, False)}
    return {"pretrain": pretrain, **pools}


def test_features_are_what_the_decoder_reads(models):
    """Up to the last cluster; a cluster changes no earlier features, and the last cluster is encoded too."""
    model, imgs = models["pretrain"], torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        blocks = [features.encode(model, imgs, range(n, n + 1)) for n in model.taps]
        assert blocks[0].shape == (2, 24, 32)
        assert torch.allclose(model.read_taps([b[:, :-4] for b in blocks]), model.forward_encoder(imgs), atol=1e-6)
        changed = imgs.clone()
        changed[:, :, 32:, 16:] += 1  # the last of 3 x 2 clusters
        after = features.encode(model, changed, range(4, 5))
    assert torch.equal(after[:, :-4], blocks[-1][:, :-4])
    assert (after[:, -4:] != blocks[-1][:, -4:]).any(dim=-1).all()
    assert torch.allclose(features.pool(model, after), after.mean(dim=1))


def test_features_beyond_float16_are_named(models, image_folder, tmp_path, monkeypatch):
    """Tokens are stored in float16, which larger values overflow."""
    dataset = image_dataset(str(image_folder), "val", eval_transform((48, 32), "square"), "pil")
    args = cli_args("--batch_size", 2, "--input_size", 48, 32, "--cache", tmp_path)
    seen = []
    large = lambda *_: seen.append(1) or torch.full((2, 24, 32), 1e5 if len(seen) == 2 else 1.0)  # noqa: E731
    monkeypatch.setattr(features, "encode", large)
    with pytest.raises(RunError, match=r"val are not finite in float16; the first: .*class_0/2\.png"):
        features.features(args, models["pretrain"], dataset, "val", range(4, 5), {True}, Log())
    assert not list(tmp_path.iterdir())


def cli_args(*words):
    return probe.get_args_parser().parse_args([str(w) for w in ("c.pth", "--data_path", "x", *QUIET, *words)])


@pytest.mark.parametrize("pool", [True, False])
def test_a_classifier_is_pooled_as_its_head_reads_it(models, pool):
    model, imgs = models[f"classifier {pool}"], torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        pooled = features.pool(model, features.encode(model, imgs, range(4, 5)))
        assert torch.allclose(model.head(pooled), model(imgs), atol=1e-6)


@pytest.mark.parametrize("kind", ["pretrain", "classifier True"])
def test_average_of_blocks(models, kind):
    imgs = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        each = [features.encode(models[kind], imgs, range(n, n + 1)) for n in (2, 3, 4)]
        assert torch.allclose(features.encode(models[kind], imgs, range(2, 5)), sum(each) / 3, atol=1e-6)
    assert not torch.allclose(each[0], each[1], atol=1e-3)


def test_chosen_blocks():
    def chosen(block=None, average_last=None):
        return list(features.chosen_blocks(argparse.Namespace(block=block, average_last=average_last), 4))

    assert (chosen(), chosen(block=2), chosen(average_last=3)) == ([4], [2], [2, 3, 4])


# ---- whole runs


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, kind in (("pretrain", "pretrain"), ("finetune", "classifier False")):
        saved = argparse.Namespace(input_size=[48, 32], cluster_size=2, global_pool=False)
        torch.save({"model": models[kind].state_dict(), "args": saved}, folder / f"{name}.pth")
    return folder


def run(folder, *words):
    parser = probe.get_args_parser()
    probe.main(parser.parse_args([str(w) for w in (*words, *QUIET, "--output", folder / "out.json")]))
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize(("kind", "blocks"), [("pretrain", ["--block", 2]), ("finetune", ["--average_last", 2])])
def test_script_with_every_probe(models, checkpoints, image_folder, tmp_path, capsys, kind, blocks):
    """The three classes differ in brightness, so that random features classify them."""
    words = [checkpoints / f"{kind}.pth", "--data_path", image_folder, "--cache", tmp_path / "cache", *blocks]
    found = run(tmp_path, *words, "--probe", "knn", "linear", "attentive", "--k", 1, 3, 500, "--seeds", 2)
    rows = {row["probe"]: row for row in found["results"]}
    assert list(rows) == ["1-NN", "3-NN", "linear", "attentive"]  # there are no 500 neighbours
    assert {row["images"] for row in rows.values()} == {7}
    assert rows["1-NN"]["acc1"] > 50  # 4 to 6 of the 7 images, by the seed of the weights; the largest class has 3
    assert rows["linear"]["acc1_std"] is not None
    assert re.search(r"^\| linear \| [\d.]+ % \([\d.]+ to [\d.]+\) \| [\d.]+ % of 2 \|", capsys.readouterr().out, re.M)

    model = models[{"pretrain": "pretrain", "finetune": "classifier False"}[kind]]
    transform = eval_transform((48, 32), "square")
    for split in ("train", "val"):
        images, labels = zip(*ImageFolder(str(image_folder / split), transform), strict=True)
        with torch.no_grad():
            tokens = features.encode(model, torch.stack(images), range(2, 3) if kind == "pretrain" else range(3, 5))
        for name, want, tolerance in (("pooled", features.pool(model, tokens), 1e-5), ("tokens", tokens, 2e-3)):
            (path,) = (tmp_path / "cache").glob(f"{split}-{name}-*.npy")
            kept = np.load(path, allow_pickle=False)
            assert kept["label"].tolist() == list(labels)
            assert np.allclose(kept["feature"], want, rtol=tolerance, atol=tolerance)


def test_features_are_computed_once(checkpoints, image_folder, tmp_path, monkeypatch):
    counts = []
    encode = features.encode
    monkeypatch.setattr(features, "encode", lambda *args: counts.append(len(args[1])) or encode(*args))
    words = [checkpoints / "pretrain.pth", "--data_path", image_folder, "--cache", tmp_path / "cache", "--k", 1]
    first = run(tmp_path, *words, "--probe", "knn", "linear", "--seeds", 1)
    assert sum(counts) == 24 + 7
    assert run(tmp_path, *words, "--probe", "knn", "linear", "--seeds", 1)["results"] == first["results"]
    assert sum(counts) == 31
    for more in (["--block", 2], ["--input_size", 64, 32], ["--eval_resize", "shorter"], ["--eval_loader", "fast"]):
        counts.clear()
        run(tmp_path, *words, "--probe", "knn", *more)
        assert sum(counts) == 31, more
    changed = torch.load(checkpoints / "pretrain.pth", weights_only=False)
    changed["model"]["layers.0.mixer.D"] += 1
    torch.save(changed, tmp_path / "changed.pth")
    counts.clear()
    run(tmp_path, tmp_path / "changed.pth", *words[1:], "--probe", "knn")
    assert sum(counts) == 31


def test_both_kinds_of_features_take_one_pass(checkpoints, image_folder, tmp_path, monkeypatch):
    """A kind that is cached is not computed again, and each file is the same as if it had been computed alone."""
    counts = []
    encode = features.encode
    monkeypatch.setattr(features, "encode", lambda *args: counts.append(len(args[1])) or encode(*args))
    words = [checkpoints / "pretrain.pth", "--data_path", image_folder, "--k", 1, "--seeds", 1, "--probe_epochs", 1]
    run(tmp_path, *words, "--cache", tmp_path / "both", "--probe", "knn", "attentive")
    assert sum(counts) == 24 + 7
    for probes_of in (["knn"], ["attentive", "knn"]):  # the second adds the tokens
        counts.clear()
        run(tmp_path, *words, "--cache", tmp_path / "alone", "--probe", *probes_of)
        assert sum(counts) == 24 + 7
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert names == {path.name for path in (tmp_path / "alone").iterdir()}
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


class NearestMean(probes.Probe):
    """The class whose mean is nearest."""

    name = "mean"

    def add_arguments(self, group):
        group.add_argument("--power", type=float, default=2)

    def check(self, args, images, dim):
        return [f"{images} images of {dim} channels have means"]

    def evaluate(self, task):
        (x, y), (queries, labels) = task.train, task.val
        means = torch.stack([x[y == label].mean(dim=0) for label in range(task.classes)])
        hits = torch.cdist(queries, means, p=task.args.power).argmin(dim=1) == labels
        return [{"probe": "nearest mean", **probes.accuracy(int(hits.sum()), len(labels), len(labels))}]


def test_a_new_probe(checkpoints, image_folder, tmp_path, capsys, monkeypatch):
    """An entry in the table of probes is enough for its flags, checks, features and results."""
    monkeypatch.setitem(probes.PROBES, "mean", NearestMean())
    words = ["--data_path", image_folder, "--cache", tmp_path / "cache", "--probe", "mean", "linear", "--power", 1]
    found = run(tmp_path, checkpoints / "pretrain.pth", *words)
    assert [row["probe"] for row in found["results"]] == ["linear", "nearest mean"]
    assert found["results"][1]["acc1"] > 50
    assert found["args"]["power"] == 1
    printed = capsys.readouterr().out
    assert "24 images of 32 channels have means" in printed
    assert "| nearest mean | " in printed
    assert not list((tmp_path / "cache").glob("*-tokens-*"))


def test_two_processes_equal_one(checkpoints, image_folder, tmp_path):
    words = [checkpoints / "pretrain.pth", "--data_path", image_folder, "--batch_size", 3, "--k", 1, 5, "--seeds", 3]
    words += ["--probe", "knn", "linear"]
    alone = run(tmp_path, *words, "--cache", tmp_path / "one")
    torchrun("Evaluation/probe.py", *words, *QUIET, "--cache", tmp_path / "two", "--output", tmp_path / "two.json")
    assert json.loads((tmp_path / "two.json").read_text())["results"] == alone["results"]
    for path in (tmp_path / "one").iterdir():
        one, two = np.load(path), np.load(tmp_path / "two" / path.name)
        assert (one["label"] == two["label"]).all()
        assert np.allclose(one["feature"], two["feature"], atol=1e-5)
    assert len(list((tmp_path / "two").iterdir())) == 2


def test_broken_images(checkpoints, image_folder, tmp_path):
    """Broken images of train are left out, broken images of val count as wrong."""
    shutil.copytree(image_folder, tmp_path / "data")
    for split, label in (("train", 0), ("val", 1)):
        (tmp_path / "data" / split / f"class_{label}" / "x.png").write_bytes(b"")
    words = [checkpoints / "pretrain.pth", "--data_path", tmp_path / "data", "--cache", tmp_path / "cache"]
    with pytest.raises(RunError, match=r"x\.png"):
        run(tmp_path, *words)
    assert not list((tmp_path / "cache").iterdir())
    result = run(tmp_path, *words, "--eval_bad", "wrong", "--k", 24, 25)
    rows = result["results"]
    assert result["broken"] == {"train": 1, "val": 1}
    assert [row["probe"] for row in rows] == ["24-NN", "linear"]
    assert {row["images"] for row in rows} == {8}
    assert all(row["acc5"] <= 100 * 7 / 8 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--block 5", "--block 5: the encoder has 4 blocks"),
        ("--average_last 9", "--average_last 9: the encoder has 4 blocks"),
        ("--block 1 --average_last 2", "not allowed with argument"),
        ("--probe svm", "invalid choice: 'svm'"),
        ("--k 25", "--k 25: there are 24 training images"),
        ("--k 0", "0 is not at least 1"),
        ("--probe_batch_size 1", "1 is not at least 2"),
        ("--temperature 0", "0 is not at least 1e-06"),
        ("--probe attentive --attn_heads 5", "--attn_heads 5 does not divide the 32 channels"),
        ("--probe attentive --max_gb 1e-6", r"the features of train take [\d.e-]+ GB, more than --max_gb 1e-06 allows"),
        ("--output /dev/null/x --cache /dev/null/x", "--output /dev/null/x cannot be written"),
        ("--cache /dev/null/x", "--cache /dev/null/x cannot be written"),
        ("--input_size 50", "image size 50 does not divide"),
        ("--model_key model_ema", "the checkpoint has no model_ema"),
        ("--data_path /nowhere", "--data_path /nowhere: no such folder"),
    ],
)
def test_mistakes(checkpoints, image_folder, tmp_path, run_script, capsys, words, message):
    common = [checkpoints / "pretrain.pth", "--data_path", image_folder, "--cache", tmp_path / "cache", *QUIET]
    with pytest.raises(SystemExit) as exit_info:
        run_script(probe, *common, *words.split())
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"probe\.py: error: .*\n", err)
    assert re.search(message, err), err
    assert not (tmp_path / "cache").exists()


def test_files_of_killed_processes_are_removed(checkpoints, image_folder, tmp_path):
    """Those of this host; another host may still be writing its own."""
    words = [checkpoints / "finetune.pth", "--data_path", image_folder, "--cache", tmp_path / "cache"]
    words += ["--probe", "knn", "--k", 1]
    run(tmp_path, *words)
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    for name in names:
        (tmp_path / "cache" / name).unlink()
        (tmp_path / "cache" / f".{name}.{socket.gethostname()}.999999999").touch()
        (tmp_path / "cache" / f".{name}.other.999999999").touch()
    run(tmp_path, *words)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == names | {f".{name}.other.999999999" for name in names}


def test_too_large_files_are_refused_before_smaller_ones_are_written(checkpoints, image_folder, tmp_path, run_script):
    words = ["--data_path", image_folder, "--cache", tmp_path, "--probe", "knn", "attentive", "--max_gb", 4e-6, *QUIET]
    with pytest.raises(SystemExit):  # 24 pooled features would take 3.3e-6 GB
        run_script(probe, checkpoints / "pretrain.pth", *words)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(checkpoints, image_folder, tmp_path, run_script, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit) as exit_info:
        run_script(probe, checkpoints / "pretrain.pth", "--data_path", image_folder, "--cache", tmp_path, *QUIET)
    assert exit_info.value.code == 2
    assert f"--cache {tmp_path} cannot be written: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_of_the_cache(checkpoints, image_folder, tmp_path, run_script, capsys):
    words = [checkpoints / "finetune.pth", "--data_path", image_folder, "--cache", tmp_path, "--probe", "knn", "--k", 1]
    run_script(probe, *words, *QUIET, "--output", tmp_path / "out.json")
    (path,) = tmp_path.glob("val-*.npy")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SystemExit) as exit_info:
        run_script(probe, *words, *QUIET)
    assert exit_info.value.code == 2
    assert f"{path} is damaged, delete it" in capsys.readouterr().err
