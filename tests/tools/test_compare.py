"""Test compare.py, the models that it opens, their cost, and the cards of exports."""

import argparse
import csv
import json
import math
import mmap
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from fork_server import run_forked
from helpers import noise_images, relative_error
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

import models_arm
import pretrained
from Evaluation import cost, opened_models
from Evaluation.features import hash_of
from Evaluation.reports import comparison, paired
from Evaluation.tables import wilson
from tools import compare, export, model_card
from util.data.decode import BrokenImage
from util.errors import UserError
from util.files import figure_of
from util.training import precision

CPU = torch.device("cpu")
NAMES = ["class_2", "class_0", "class_1"]  # of the outputs, in another order than the folder's
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two checkpoints, exports of the first one, and a model of timm; all have random weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        sizes = {"embed_dim": 32, "depth": 1, "patch_size": 8, "img_size": (48, 32), "num_classes": 3}
        model = models_arm.create_classifier("arm_tiny_pz16", **sizes)
        model.head.weight.data *= 50
        args = argparse.Namespace(input_size=[48, 32], global_pool=True, epochs=7, data_path="/somewhere/secret/noise")
        content = {"model": model.state_dict(), "args": args, "class_names": NAMES, "epoch": 6}
        torch.save(content, folder / f"{name}.pth")
    for kind in ("onnx", "pt2", "safetensors"):
        words = [folder / "first.pth", "--to", kind, "--no_measure", "--device", "cpu"]
        export.main(export.get_args_parser().parse_args([*map(str, words)]))
    torch.manual_seed(2)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, patch_size=8, depth=1)
    model.head.weight.data *= 50
    more = {"model_args": {"img_size": 32, "patch_size": 8, "depth": 1}, "model_config": {"label_names": NAMES}}
    timm.models.save_for_hf(model, folder / "vit", **more)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven images of three classes, and one that is broken."""
    folder = noise_images(tmp_path_factory.mktemp("data"), train=1, height=37)
    (folder / "val" / "class_1" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def forked(monkeypatch):
    """Start the process that measures memory by a fork, and note its command."""
    started = []

    def run(words, env, **_):
        started.append(json.loads(words[-1]))
        return run_forked(words[1:])

    monkeypatch.setattr(cost, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": run}))
    return started


def by_hand(models, images):
    """Names that the first checkpoint, and timm's model, give to each image, without the code under test."""
    model, found = pretrained.load(models / "first.pth")
    other = timm.create_model(f"local-dir:{models / 'vit'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(other), is_training=False)
    files = sorted(path for path in (images / "val").rglob("*.png") if path.name != "broken.png")
    return [
        (
            path.parent.name,
            NAMES[model(found.read_image(path)[None]).argmax()],
            NAMES[other(transform(Image.open(path).convert("RGB"))[None]).argmax()],
        )
        for path in files
    ]


@pytest.mark.parametrize("counts", [(0, 0), (3, 15), (15, 3), (1, 0), (6, 6), (2500, 2610)])
def test_mcnemar(counts):
    want = binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1
    assert paired.mcnemar(*counts) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("shares", [(0.1, 0.2), (0.05, 0.05), (0.3, 0.02)])
def test_the_interval_of_a_difference_covers_it(shares):
    """Of 40 images; the chance of each pair of counts is that of the multinomial distribution."""
    n, (p, q) = 40, shares
    covered = total = 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            ways = math.comb(n, a) * math.comb(n - a, b)
            chance = ways * p**a * q**b * (1 - p - q) ** (n - a - b)
            low, high = paired.difference_interval(a, b, n)
            total += chance
            covered += chance * (low <= 100 * (q - p) <= high)
    assert total == pytest.approx(1)
    assert 0.94 < covered < 0.985
    assert paired.difference_interval(0, 1, 1)[1] == 100
    assert paired.difference_interval(3, 9, 40) == pytest.approx((-2.632, 31.204), abs=1e-3)  # 6 / 42 +- 1.96 * 0.08632


def test_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 300))
    b[:150] = a[:150]
    a[[3, 9]] = b[9] = -1
    labels = rng.integers(0, 4, 300)
    found = paired.pair((a == labels, b == labels), (a, b))
    kept = (a >= 0) & (b >= 0)
    assert found.answered == kept.sum() == 298
    assert found.kappa == pytest.approx(cohen_kappa_score(a[kept], b[kept]))
    assert found.agreement == pytest.approx(100 * (a == b)[kept].mean())
    assert found.difference == pytest.approx(100 * ((b == labels).mean() - (a == labels).mean()))
    assert found.only_second == ((b == labels) & (a != labels)).sum()
    assert found.interval[0] < found.difference < found.interval[1]
    assert paired.kappa(np.zeros(3, int), np.zeros(3, int)) is None


def test_a_comparison(models, images, run_script, tmp_path, forked, capsys):
    """Exports answer as their checkpoint does, each model with its own preparation and order of classes."""
    names = ["first.pth", "second.pth", "first.onnx", "first.pt2", "first.safetensors"]
    words = [*(models / name for name in names), f"timm:local-dir:{models / 'vit'}", "--data_path", images]
    words += ["--output", tmp_path, "--num_workers", 0, "--batch_size", 3, "--rounds", 2, "--device", "cpu"]
    run_script(compare, *words)
    content = json.loads((tmp_path / "compare.json").read_text())
    rows = dict(zip(["first", "second", "onnx", "pt2", "safetensors", "vit"], content["models"], strict=True))
    truth, first, vit = zip(*by_hand(models, images), strict=True)
    for name, answers in (("first", first), ("vit", vit)):
        correct = sum(map(str.__eq__, truth, answers))
        assert rows[name]["acc1"] == pytest.approx(100 * correct / 8)
        assert rows[name]["interval"] == pytest.approx(wilson(correct, 8))
    assert {row["unanswered"] for row in rows.values()} == {1}
    for name in ("onnx", "pt2", "safetensors"):
        assert rows[name]["pair"]["agreement"] == 100
        assert rows[name]["loss"] == pytest.approx(rows["first"]["loss"], rel=1e-4)
        assert rows[name]["parameters"] == rows["first"]["parameters"]
    assert rows["second"]["loss"] != pytest.approx(rows["first"]["loss"], rel=1e-2)
    assert [row["kind"] for row in rows.values()] == ["checkpoint", "checkpoint", "onnx", "pt2", "safetensors", "timm"]
    assert rows["vit"]["preparation"] != rows["first"]["preparation"] == rows["onnx"]["preparation"]
    assert [own["name"] for own in forked] == [*map(str, words[:6])]
    for row in rows.values():
        assert (
            row["images_per_second"]["least"] <= row["images_per_second"]["median"] <= row["images_per_second"]["most"]
        )
        assert row["latency_ms"]["median"] > 0
        assert {*row["memory_mb"]} == {"1", str(row["batch"])}

    with (tmp_path / "answers.csv").open() as file:
        answers = list(csv.DictReader(file))
    given = [(row["class"], row["first.pth"], row["vit"]) for row in answers if row["first.pth"]]
    assert given == by_hand(models, images)
    (missing,) = (row for row in answers if not row["first.pth"])
    assert missing["image"].endswith("broken.png")
    with (tmp_path / "compare.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["acc1"]) for row in written] == [row["acc1"] for row in rows.values()]
    assert float(written[1]["difference_low"]) == rows["second"]["pair"]["interval"][0]
    assert float(written[1]["memory_mb_batch"]) == rows["second"]["memory_mb"][str(rows["second"]["batch"])]
    page = (tmp_path / "compare.md").read_text()
    assert page.count("broken.png") == 6
    assert "100.00 % (1.000)" in page
    assert figure_of(comparison.TITLE)(tmp_path / "compare.png")

    (tmp_path / "mine.txt").write_text("mine")
    run_script(compare, *words[:2], *words[6:], "--no_measure")
    assert "time and memory were not measured" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    (tmp_path / "compare.csv").write_text("of someone else")
    with pytest.raises(SystemExit):
        run_script(compare, *words[:2], *words[6:], "--no_measure")
    assert "is there and is no earlier result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.pth"], "no checkpoint file none.pth"),
        (["none.onnx"], "no checkpoint file none.onnx"),
        (["timm:resnet_0"], "timm:resnet_0: timm cannot open it: .*resnet_0"),
        (["{models}"], "timm cannot open it: "),
        (["{models}/first.pth", "{models}/first.pth"], "first.pth is given twice"),
        (["{alone}/alone.onnx"], "alone.onnx: export.py writes alone.json beside it, which is missing"),
        (["{alone}/encoder.pt2"], "is no classifier: it has no classes to compare"),
        (["{alone}/empty.onnx"], "empty.onnx: it cannot be read: "),
        (["{alone}/four.pth"], "images of 3 classes that .*four.pth does not have"),
    ],
)
def test_mistakes(models, images, run_script, tmp_path, capsys, words, message):
    shutil.copy(models / "first.onnx", tmp_path / "alone.onnx")
    about = json.loads((models / "first.json").read_text())
    shutil.copy(models / "first.pt2", tmp_path / "encoder.pt2")
    (tmp_path / "encoder.json").write_text(json.dumps(about | {"num_classes": 0}))
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "empty.json").write_text(json.dumps(about))
    content = torch.load(models / "first.pth", weights_only=False)
    torch.save(content | {"class_names": ["a", "b", "c"]}, tmp_path / "four.pth")
    words = [word.format(models=models, alone=tmp_path) for word in words]
    with pytest.raises(SystemExit) as end:
        run_script(compare, *words, "--data_path", images, "--output", tmp_path / "out", "--device", "cpu")
    assert end.value.code == 2
    assert re.search(f"^compare.py: error: .*{message}", capsys.readouterr().err)


def test_several_processes_are_refused(run_script, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run_script(compare, "a.pth", "--data_path", "x")
    assert "start it without torchrun" in capsys.readouterr().err


def test_a_model_without_an_answer(models, images, run_script, tmp_path, capsys):
    content = torch.load(models / "first.pth", weights_only=False)
    content["model"]["head.weight"] = torch.full((3, 32), 3e38) * torch.tensor([1.0, -1.0]).repeat(16)
    torch.save(content, tmp_path / "large.pth")
    words = ["--data_path", images, "--output", tmp_path, "--num_workers", 0, "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        run_script(compare, tmp_path / "large.pth", *words)
    assert end.value.code == 1
    assert "large.pth answers none of 8 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["out_a/best.pth", "out_b/best.pth", "timm:resnet50"], ["out_a/best.pth", "out_b/best.pth", "timm:resnet50"]),
        (["runs/a/best.pth", "runs/a/best.onnx", "x/"], ["best.pth", "best.onnx", "x"]),
        (["a.pth", "b/a.pth"], ["a.pth", "b/a.pth"]),
    ],
)
def test_labels(names, labels):
    assert compare.labels_of(names) == labels


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"crop_mode": "squash", "crop_pct": 0.875}, "squash"),
        ({"crop_mode": "center", "crop_pct": 0.9}, "shorter"),
        ({"crop_mode": "center", "crop_pct": 0.9, "interpolation": "bilinear"}, "shorter"),
        ({"crop_mode": "border", "crop_pct": 0.9}, "border"),
        ({"crop_mode": "center", "crop_pct": 1.0, "input_size": (3, 32, 48)}, "center"),
    ],
)
def test_images_are_prepared_as_timm_does(monkeypatch, photographs, config, mode):
    """Whether `eval_transform` or timm's own transform is taken."""
    size = config.get("input_size", (3, 32, 32))
    model = timm.create_model(
        "test_vit3", num_classes=3, img_size=size[1:], pretrained_cfg_overlay={"input_size": size, **config}
    )
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    opened = opened_models.open_model("timm:x", CPU)
    want = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert opened.preparation.mode == mode
    for photograph in (photographs[0], photographs[1].crop((0, 0, 90, 200))):
        assert torch.allclose(opened.preparation.recipe()(photograph), want(photograph), atol=1e-6)


def test_a_hub_that_does_not_answer(monkeypatch):
    """One request decides, unless the weights are in the cache; timm would try again for a minute."""
    asked, cached = [], [None]

    def files(name):
        asked.append(name)
        raise UserError(f"{name} cannot be listed")

    monkeypatch.setattr(opened_models, "files", files)
    monkeypatch.setattr(opened_models, "try_to_load_from_cache", lambda *_: cached[0])
    for name in ("timm:hf_hub:none/none@main", "timm:resnet18"):
        with pytest.raises(UserError, match=r"^hf://.* cannot be listed"):
            opened_models.open_model(name, CPU)
    assert (asked[0], asked[1][:18]) == ("hf://none/none", "hf://timm/resnet18")
    cached[0] = "model.safetensors"
    opened_models.check_hub("resnet18")
    opened_models.check_hub("local-dir:none")
    assert len(asked) == 2


def test_memory_that_cannot_be_measured(models, monkeypatch):
    reason = cost.measure_memory("none.pth", 2, {"device": "cpu", "dtype": "fp32"}, timeout=1e-3)["memory_reason"]
    assert "takes longer" in reason
    monkeypatch.setattr(cost, "RESET", Path("/nowhere"))
    assert cost.peaks(str(models / "first.pth"), 2, "cpu", "fp32") == {"memory_reason": cost.NO_PEAK}


@pytest.mark.skipif(not cost.RESET.exists(), reason="this system does not tell the peak memory")
def test_memory_of_activations():
    """A model that allocates 80 MB for an image, and as much for each of a batch."""
    gone = SimpleNamespace(only_one=False, kind="x", device=CPU)
    gone.preparation = SimpleNamespace(pixels=SimpleNamespace(channels=1), size=(2, 2))

    def compute(imgs):
        np.frombuffer(mmap.mmap(-1, 80_000_000 * len(imgs)), np.uint8)[:] = (
            1  # not by malloc, which may have it already
        )

    gone.compute = compute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened_models, "open_model", lambda *_, **__: gone)
        patch.setattr(precision, "_chosen", None)
        found = cost.peaks("x", 3, "cpu", "fp32")["memory_mb"]
    assert 79 < found[1] < 100
    assert 239 < found[3] < 260


def code_of(card: Path) -> str:
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]


@pytest.mark.parametrize("kind", ["onnx", "pt2", "safetensors"])
def test_the_code_of_a_card_runs(models, monkeypatch, kind):
    monkeypatch.chdir(models)
    imgs = torch.randn(2, 3, 48, 32)
    names = {"imgs": imgs.numpy() if kind == "onnx" else imgs, "np": np, "onnxruntime": onnxruntime}
    exec(code_of(models / f"first.{kind}.md"), names)
    assert relative_error(torch.as_tensor(names["logits"]), pretrained.load("first.pth")[0](imgs)) < 1e-4


def test_a_card(models, images, run_script, tmp_path, forked, capsys):
    output = tmp_path / "a b.safetensors"
    words = [models / "first.pth", "--to", "safetensors", "--output", output, "--device", "cpu", "--num_workers", 0]
    run_script(export, *words, "--data_path", images)
    text = output.with_name(f"{output.name}.md").read_text()
    correct = sum(truth == own for truth, own, _ in by_hand(models, images))
    low, high = wilson(correct, 8)
    assert f"| top-1 | {100 * correct / 8:.2f} % ({low:.2f} to {high:.2f}) |" in text
    assert "1 of them have no answer and count as wrong" in text
    assert f"8 images of {images.name}/val (fingerprint " in text
    assert f"SHA-256 {hash_of(pretrained.load(models / 'first.pth')[0])}" in text
    assert "| epochs | 7 |\n| data | noise |\n| epochs done | 7 |" in text
    assert "secret" not in text
    assert "with other sizes: 1 blocks of 32 channels" in text
    assert output.stat().st_mode == output.with_suffix(".json").stat().st_mode
    for said in ("| latency of one image | ", "| peak memory of one image | ", "| threads | 1 |", "| commit | "):
        assert said in text
    assert len(forked) == 1

    run_script(export, *words, "--no_measure")
    text = output.with_name(f"{output.name}.md").read_text()
    assert "Accuracy was not measured: no images were given" in text
    assert "Time and memory were not measured: it was switched off" in text
    assert "- Accuracy was not measured: no images" in text
    output.with_name(f"{output.name}.md").write_text(f"{text}\nA remark of mine.\n")
    with pytest.raises(SystemExit):
        run_script(export, *words, "--no_measure")
    assert "a b.safetensors.md is there and is no earlier result" in capsys.readouterr().err
    run_script(export, *words[:3], "--encoder", "--output", tmp_path / "e.safetensors", "--device", "cpu")
    text = (tmp_path / "e.safetensors.md").read_text()
    assert "Accuracy was not measured: the model returns no classes" in text
    assert "the weights of an encoder are computed by whatever loads them" in text


def test_mistakes_of_a_card(models, images, run_script, tmp_path, capsys):
    words = [models / "first.pth", "--to", "safetensors", "--output", tmp_path / "x.safetensors"]
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "val" / "class_0").rename(tmp_path / "data" / "val" / "class_9")
    for more, message in (
        (["--encoder", "--data_path", images], "--data_path is for the accuracy of a classifier"),
        (["--data_path", tmp_path / "data"], "images of 1 classes that .*first.pth does not have: class_9"),
        (["--data_path", tmp_path / "none"], "no such folder"),
    ):
        with pytest.raises(SystemExit) as end:
            run_script(export, *words, *more)
        assert end.value.code == 2
        assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("x*"))


def test_a_card_of_nothing_measured(models):
    """Whoever writes a card without measuring gets one that says so."""
    about = json.loads((models / "first.json").read_text())
    text = model_card.card(about | {"format": "hf", "file": "folder"}, None)
    assert "Accuracy was not measured" in text
    assert "Time and memory were not measured" in text
    assert "local-dir:folder" in text


def test_an_image_of_extreme_shape_is_not_enlarged():
    """It is broken, as in every other evaluation, for the transforms of timm too."""
    pixels = opened_models.Pixels()
    for interpolation in ("bicubic", "bilinear"):
        preparation = opened_models.Preparation((224, 224), pixels, 0.875, "shorter", interpolation)
        with pytest.raises(BrokenImage, match="pixels with 256 on the shorter side"):
            preparation.recipe()(Image.new("RGB", (30000, 1)))
