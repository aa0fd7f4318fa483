"""verdict.py: what it says of files, whole runs on a local hub and on folders, killed and continued."""

import argparse
import csv
import json
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch
from checkpoint_helpers import classifier, write
from fork_server import run_forked
from helpers import REPOSITORY, golden_json
from hub_server import Server
from PIL import Image
from timm.data import ImageNetInfo

import models_arm
from Evaluation import verdict
from Evaluation.reports import verdict_files, verdict_page
from Evaluation.reports.verdict_page import judge, sentence
from Evaluation.tables import accuracy
from util.checkpoints import checkpoint_file

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"base": (768, 12), "large": (1024, 24), "huge": (1536, 24)}
QUIET = ["--device", "cpu", "--num_workers", 0]
SMALL = {"patch_size": 8, "embed_dim": 32, "img_size": 32}
ARGS = argparse.Namespace(input_size=32, global_pool=True)


def small(size):
    """The state dict of a small classifier with the names of a published size's."""
    torch.manual_seed(3)
    state = models_arm.create_classifier("arm_tiny_pz16", num_classes=3, depth=SIZES[size][1], **SMALL).state_dict()
    assert [*state] == [*golden_json("manifest_finetune")[f"arm_{size}_pz16"]["state"]]
    return state


def small_pretrained(size):
    torch.manual_seed(4)
    sizes = {**SMALL, "depth": SIZES[size][1], "cluster_size": 2, "dec_embed_dim": 64, "dec_depth": 4}
    state = models_arm.create_pretrain_model("arm_tiny_pz16", **sizes).state_dict()
    assert [*state] == [*golden_json("manifest_pretrain")[f"arm_{size}_pz16"]["state"]]
    return state


# ---- what is said


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_published_sizes(kind, size, tmp_path, monkeypatch):
    """Every name and shape of the released code is recognised, of the tensors' whole size."""
    manifest = golden_json(f"manifest_{kind}")[f"arm_{size}_pz16"]["state"]
    state = {name: torch.zeros(()).expand(shape) for name, shape in manifest.items()}
    monkeypatch.setattr(checkpoint_file, "read", lambda *_: {"model": state, "max_accuracy": 83.2})
    path = write(tmp_path / "x.pth", {})
    file, found = verdict_files.describe("x.pth", str(path))
    (width, depth), classes = SIZES[size], kind == "finetune"
    side = 224 if classes else 192
    assert (file["problem"], file["kind"]) == ("", "classification" if classes else "pretraining")
    assert (file["embed_dim"], file["depth"], file["input_size"]) == (width, depth, [side, side])
    assert f"{width} channels, {depth} blocks, {side} x {side} pixels" in file["what"]
    assert ("1000 classes" in file["what"]) == classes
    assert "max_accuracy 83.20 saved" in file["what"]
    with torch.device("meta"):
        model = found["model"].build(encoder=not classes)
    own = model.state_dict()
    kept = {name: value.shape for name, value in found["model"].state_dict.items() if name in own}
    assert classes <= (kept == {name: value.shape for name, value in own.items()})
    row = {"measure": "accuracy", "size": [side, side], "result": {"imagenet": True}}
    paper = {"base": 83.2, "large": None, "huge": 85.0}[size]
    assert verdict_page.paper_figure(file, row) == (paper if classes else None)
    assert verdict_page.paper_figure(file, {**row, "size": [384, 384]}) is None
    assert verdict_page.paper_figure(file, {**row, "result": {"imagenet": False}}) is None


@pytest.mark.parametrize(
    ("correct", "words"),
    [
        (41_600, "agrees: 83.2 % is within the interval (+0.00 points)"),
        (41_450, "agrees: 83.2 % is within the interval (-0.30 points)"),
        (41_780, "agrees: 83.2 % is within the interval (+0.36 points)"),  # 83.24 %, which rounds to it, is
        (41_400, "0.40 points below 83.2 %"),
        (41_850, "0.50 points above 83.2 %"),
    ],
)
def test_comparison_with_the_paper(correct, words):
    assert judge(accuracy(correct, correct, 50_000), 83.2) == words
    assert judge(accuracy(correct, correct, 50_000), None) == "no published figure"


def test_sentences():
    file = {"file": "h.pth", "problem": "", "kind": "classification", "embed_dim": 1536, "depth": 24}
    file["input_size"] = [384, 384]

    def rows(**correct):
        return [
            {"measure": "accuracy", "weights": key, "size": [384, 384], "resize": "square",
             "result": {**accuracy(count, count, 50_000), "imagenet": True}}
            for key, count in correct.items()
        ]  # fmt: skip

    assert sentence(file, rows(model=42_300, model_ema=42_750)) == (
        "**h.pth** gives the paper's 85.5 %: 85.50 % (85.19 to 85.81) with model_ema, 384 x 384 pixels, square. "
        "No other weights or resize at this size do."
    )
    both = sentence(file, rows(model=42_760, model_ema=42_750))
    assert "85.52 % (85.21 to 85.83) with model, " in both
    assert both.endswith(" So do: model_ema, 384 x 384 pixels, square.")
    assert sentence(file, rows(model=42_000, model_ema=41_000)) == (
        "**h.pth** does not give the paper's 85.5 %: the nearest is 1.50 points below 85.5 %, with model, "
        "384 x 384 pixels, square."
    )
    assert sentence(file, []) == "**h.pth** is a classifier whose accuracy is not measured."


# ---- whole runs

# A process that is killed, or stopped, within its second evaluation.
ENDED = """
import os, signal, sys
sys.path.insert(0, {repository!r})
from Evaluation import verdict
from util import cli
evaluations, evaluate = [], verdict.evaluate
def ended(model, loader, *more):
    evaluations.append(1)
    if len(evaluations) == 2:
        next(iter(loader))
        os.kill(os.getpid(), signal.{number})
    return evaluate(model, loader, *more)
verdict.evaluate = ended
cli.run_main(verdict.main, verdict.get_args_parser())
"""


@pytest.fixture
def hub(tmp_path):
    """A server with files of the released form, the names of every size's, of a sibling, and of others."""

    def saved(content):
        return write(tmp_path / "file", content).read_bytes()

    base, names = small("base"), [f"class_{label}" for label in range(3)]
    ema = {name: value * 1.01 for name, value in base.items()}
    best = {"model": base, "model_ema": ema, "optimizer": {}, "epoch": 99, "scaler": {}, "args": ARGS,
        "max_accuracy": 83.1, "ema_max_accuracy": 83.24}  # fmt: skip
    roma = small_pretrained("base") | {"angle_embed": torch.ones(1, 1, 32)}
    vim = {
        "patch_embed.proj.weight": torch.ones(8, 3, 4, 4),
        "pos_embed": torch.ones(1, 5, 8),
        "norm_f.weight": torch.ones(8),
    }
    files = {
        "README.md": b"text",
        "a/base.pth": saved(best),
        "damaged.pth": saved(best)[:9999],
        "huge.pth": saved({"model": small("huge"), "class_names": names, "args": ARGS}),
        "large.pth": saved(small("large")),
        "pretrain/huge.pth": saved({"model": small_pretrained("huge"), "args": argparse.Namespace(input_size=32)}),
        "roma.pth": saved({"model": roma, "args": argparse.Namespace(input_size=32)}),
        "vim.pth": saved({"model": vim}),
    }
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.repositories["arm/released"] = {"main": ("c" * 40, files)}
        yield server
        server.shutdown()


def content_of(folder):
    """The table as JSON, without what differs between runs."""
    content = json.loads((folder / "verdict.json").read_text())
    for row in content["measurements"]:
        del row["machine"]
        row["result"].pop("machine", None)
    return content


def test_a_killed_run_continues(hub, image_folder, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    words = ["hf://arm/released", "--data_path", image_folder, "--sizes", 32, 40, "--probe", "knn", *QUIET]

    def run(output, number=None):
        script = REPOSITORY / "Evaluation" / "verdict.py"
        if number:
            script = tmp_path / "ended.py"
            script.write_text(ENDED.format(repository=str(REPOSITORY), number=number))
        return run_forked([script, *words, "--output_dir", tmp_path / output], env=environment)

    done = run("out", "SIGKILL")
    assert done.returncode == -signal.SIGKILL
    (first,) = (tmp_path / "out/measurements").iterdir()
    before = first.stat().st_mtime_ns
    assert "**This run is not finished**" in (tmp_path / "out/verdict.md").read_text()
    done = run("out", "SIGTERM")  # which measures the second, and is stopped in the third
    assert done.returncode == 75, done.stdout + done.stderr
    assert "stopped; the same command continues" in done.stdout
    again = run("out")
    assert again.returncode == 1
    assert again.stderr.endswith("1 files or measurements failed: " + f"{tmp_path}/out/verdict.md names them\n")
    assert "6 files of weights" not in again.stdout
    assert f"7 files of weights, 1 others; 2 measurements of earlier runs are in {tmp_path}/out" in again.stdout
    assert again.stdout.count("measured before") == 2
    assert first.stat().st_mtime_ns == before
    whole = run("whole")
    assert whole.returncode == 1
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    assert len(hub.bodies("a/base.pth")) == 1

    page, content = (tmp_path / "out/verdict.md").read_text(), content_of(tmp_path / "out")
    kinds = {file["file"]: file["kind"] for file in content["files"]}
    assert kinds == {
        "a/base.pth": "classification", "damaged.pth": "cannot be read", "huge.pth": "classification",
        "large.pth": "classification", "pretrain/huge.pth": "pretraining", "roma.pth": "pretraining",
        "vim.pth": "is not of ARM",
    }  # fmt: skip
    assert content["revision"] == "c" * 40
    counted = {name: sum(row["file"] == name for row in content["measurements"]) for name in kinds}
    assert [*counted.values()] == [8, 0, 4, 4, 1, 1, 0]
    assert "**vim.pth** is not of ARM: the checkpoint is not one of ARM: it has no layers.0.mixer.A\\_log" in page
    assert re.search(r"\*\*damaged.pth\*\* cannot be read: unreadable checkpoint damaged.pth", page)
    assert "roma.pth: 1 tensors that ARM does not have: angle\\_embed" in page
    assert "Not weights, 1: README.md." in page
    assert "a/base.pth: robustness: --robustness names no sets" in page
    rows = [*csv.DictReader((tmp_path / "out/verdict.csv").open())]
    assert [row["input"] for row in rows if row["file"] == "large.pth"] == ["32x32", "32x32", "40x40", "40x40"]
    assert all(float(row["low"]) <= float(row["top1"]) <= float(row["high"]) for row in rows)


def test_the_numbers_of_a_classifier(image_folder, tmp_path, run_script):
    """Both weights; robustness takes the better ones; what is changed, images or files, is measured again."""
    state, names = classifier((32, 32)).state_dict(), [f"class_{label}" for label in range(3)]
    better = {**state, "head.bias": torch.tensor([9.0, 0, 0])}  # always the first class, which has 3 of 7 images
    state = {**state, "head.bias": torch.tensor([0, 9.0, 0])}  # the second one, which has 2
    args = argparse.Namespace(input_size=32)
    (tmp_path / "w").mkdir()
    content = {"model": state, "model_ema": better, "class_names": names, "args": args}
    write(tmp_path / "w/c.pth", content)
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "val").parent.mkdir()
    os.symlink(image_folder / "val", data / "val")
    night = tmp_path / "night/class_1"
    night.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(night / "0.png")
    words = [tmp_path / "w", "--data_path", data, "--sizes", 36, "--output_dir", out, *QUIET]
    words += ["--robustness", f"night={night.parent}"]
    run_script(verdict, *words)
    content = json.loads((out / "verdict.json").read_text())
    rows = {(row["measure"], row["weights"], row["resize"]): row for row in content["measurements"]}
    for weights, share in (("model", 2 / 7), ("model_ema", 3 / 7)):
        assert rows["accuracy", weights, "square"]["result"]["acc1"] == pytest.approx(100 * share)
    night_row = next(row for row in content["measurements"] if row["measure"] == "robustness night")
    assert night_row["weights"] == "model_ema"
    assert (night_row["result"]["acc1"], night_row["result"]["images"]) == (0, 1)
    page = (out / "verdict.md").read_text()
    assert "36 x 36 pixels do not divide into patches of 8" in page
    assert "probes: " in page  # the images have no train
    times = {path: path.stat().st_mtime_ns for path in (out / "measurements").iterdir()}
    assert len(times) == 5
    run_script(verdict, *words)
    assert {path: path.stat().st_mtime_ns for path in (out / "measurements").iterdir()} == times
    Image.new("RGB", (40, 40), "red").save(night / "0.png")
    run_script(verdict, *words)
    assert len([*(out / "measurements").iterdir()]) == 6
    write(tmp_path / "w/c.pth", {"model": better, "class_names": names, "args": args})
    run_script(verdict, *words)
    assert len([*(out / "measurements").iterdir()]) == 6 + 3
    content = json.loads((out / "verdict.json").read_text())
    assert [row["weights"] for row in content["measurements"]] == ["model"] * 3


def test_the_papers_figure(tmp_path, monkeypatch, run_script):
    """On ImageNet's classes, at the file's own size, it stands beside the measured one."""
    for number, synset in enumerate(ImageNetInfo().label_names()):
        folder = tmp_path / "data/val" / synset
        folder.mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), number % 256, np.uint8)).save(folder / "0.png")
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "img_size": 16}
    model = models_arm.create_classifier("arm_tiny_pz16", num_classes=1000, **sizes)
    (tmp_path / "w").mkdir()
    write(tmp_path / "w/c.pth", {"model": model.state_dict(), "args": argparse.Namespace(input_size=16)})
    words = [tmp_path / "w", "--data_path", tmp_path / "data", "--sizes", 24, "--resizes", "square", "--probe", "none"]
    words += ["--batch_size", 500, "--output_dir", tmp_path / "out", *QUIET]
    pages = []
    for paper in (0.1, 83.2):
        monkeypatch.setitem(verdict_page.PAPER, (32, 2, 16), paper)
        run_script(verdict, *words)
        pages.append((tmp_path / "out/verdict.md").read_text())
    assert "**c.pth** gives the paper's 0.1 %: " in pages[0]
    assert re.search(r"the nearest is 83\.\d\d points below 83\.2 %, with model, 16 x 16 pixels, square\.", pages[1])
    assert "The images are 1000, not the 50000 of ImageNet's validation set" in pages[1]
    assert re.search(r"\| 24x24 \|.*\| - \| - \| no published figure \|", pages[1])


def test_measurements_that_fail(image_folder, tmp_path, run_script, capsys):
    """They cost their own row, and are tried again."""
    (tmp_path / "w").mkdir()
    state = {**classifier((32, 32)).state_dict(), "head.bias": torch.full((3,), torch.nan)}
    write(tmp_path / "w/a.pth", {"model": state, "args": ARGS})
    write(tmp_path / "w/b.pth", {"model": classifier((32, 32), 2).state_dict(), "args": ARGS})
    write(tmp_path / "w/c.pth", {"model": classifier((32, 32)).state_dict(), "args": ARGS})
    words = [tmp_path / "w", "--data_path", image_folder, "--sizes", "--resizes", "square", "--probe", "none", *QUIET]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            run_script(verdict, *words, "--output_dir", tmp_path / "out")
        assert end.value.code == 1
        assert "2 files or measurements failed" in capsys.readouterr().err
    page = (tmp_path / "out/verdict.md").read_text()
    assert "a.pth: accuracy with model, 32 x 32 pixels, square: it failed: " in page
    assert "weights that are not finite" in page
    assert "and does not name them, so they cannot be matched" in page
    assert "**c.pth** has no published figure to compare with: at best" in page
    assert len([*(tmp_path / "out/measurements").iterdir()]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is no folder and no hf://OWNER/REPO"),
        (["taken"], "taken has no weights among its 1 files"),
        (["hf://arm"], "hf://arm: the form is hf://OWNER/REPO or hf://OWNER/REPO@REVISION"),
        (["w", "--robustness", "v2=nowhere"], "--robustness v2=nowhere: no such folder"),
        (["w", "--robustness", "v2=w", "v2=w"], "--robustness names a set twice"),
        (["w", "--sizes", 0], "argument --sizes: 0 is not at least 1"),
        (["w", "--output_dir", "taken"], "verdict.md is there and is no earlier result of this kind"),
    ],
)
def test_mistakes(words, message, image_folder, tmp_path, monkeypatch, run_script, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("w", "taken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "taken/verdict.md").write_text("mine")
    with pytest.raises(SystemExit) as end:
        run_script(verdict, *words, "--data_path", image_folder, *QUIET)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert (tmp_path / "taken/verdict.md").read_text() == "mine"
