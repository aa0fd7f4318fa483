"""Test the report of --eval: numbers against scikit-learn and NumPy, files, pictures."""

import csv
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import TINY_FINETUNE, Batches, torchrun
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

from Evaluation.reports import classifier_report, report_pictures
from Evaluation.reports.metrics import calibration, measure
from Evaluation.tables import escaped, wilson
from Finetuning import main_finetune
from util.tracking.run_log import Log
from util.training.evaluation import Answers, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("classes", [1, 2, 300])
def test_numbers(classes):
    """Of 200 images two are broken and two have logits that are not finite; class 1 of 300 has no images."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 200)
    labels[labels == 1] = 1 if classes == 2 else 0
    logits = rng.normal(0, 2, (200, classes)).astype(np.float32)
    logits[np.arange(200), labels] += 2
    logits[:20] = logits[:20].round()  # equal logits
    logits[[7, 99], 0] = np.nan, np.inf
    seen = torch.from_numpy(labels.copy())
    seen[[3, 150]] = -1
    loader = Batches(*zip(torch.from_numpy(logits).split(64), seen.split(64), strict=True))
    loader.sampler.distributed, loader.names = False, lambda places: [str(place) for place in places]
    answers = Answers()
    result = evaluate(torch.nn.Identity(), loader, torch.device("cpu"), Log(), score=answers)
    found = measure(answers.gathered(False), labels, classes)
    assert result == evaluate(torch.nn.Identity(), loader, torch.device("cpu"), Log())

    answered = np.setdiff1d(np.arange(200), [3, 7, 99, 150])
    z = logits[answered].astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    own, best = labels[answered], p.argmax(1)
    assert found["nll"] == pytest.approx(-np.log(p[np.arange(196), own]).mean())
    assert found["nll"] == pytest.approx(result["loss"], abs=1e-5)
    assert found["brier"] == pytest.approx(((p - np.eye(classes)[own]) ** 2).sum(1).mean(), abs=1e-12)
    assert found["confidence"] == pytest.approx(100 * p.max(1).mean())
    matrix = np.diag(found["classes"]["correct"])
    for label, predicted, times in found["confusions"]:
        matrix[label, predicted] += times
    if classes > 2:
        ties = (p[:20] == p[:20].max(1, keepdims=True)).sum(1) > 1
        best[:20][ties] = answers.gathered(False)[answered, 0][:20][ties]
    assert (p[np.arange(196), best] == p.max(1)).all()
    assert (matrix == confusion_matrix(own, best, labels=range(classes))).all()
    times = [row[2] for row in found["confusions"]]
    assert times == sorted(times, reverse=True)
    predicted, shown = np.full(200, classes), np.unique(labels)  # without an answer: no class
    predicted[answered] = best
    assert result["acc1"] == pytest.approx(100 * (predicted == labels).mean())
    recalls = [(predicted == labels)[labels == label].mean() for label in shown]
    assert found["balanced_accuracy"] == pytest.approx(100 * np.mean(recalls))
    if classes == 2:
        assert found["balanced_accuracy"] < 100 * balanced_accuracy_score(own, best)
    f1 = f1_score(labels, predicted, labels=shown, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(100 * f1)
    table = found["classes"]
    assert table["images"] == np.bincount(labels, minlength=classes).tolist()
    assert table["unanswered"] == np.bincount(labels[[3, 7, 99, 150]], minlength=classes).tolist()
    assert table["predictions"] == np.bincount(best, minlength=classes).tolist()
    assert (table["low"][0], table["high"][0]) == wilson(table["correct"][0], table["images"][0])
    if classes == 300:
        assert (table["images"][1], table["accuracy"][1], table["low"][1]) == (0, None, None)


def test_calibration():
    """By hand: bins are closed above, so 1/15 is in the first, 0.5 in the 8th and 1 in the last."""
    confidence = np.array([1 / 15, 0.5, 0.5, 0.9, 0.9, 0.9, 1])
    found = calibration(confidence, np.array([0, 1, 0, 1, 1, 1, 0], dtype=bool))
    assert [row["images"] for row in found["bins"]] == [1, 2, 3, 1]
    assert [row["low"] for row in found["bins"]] == pytest.approx([0, 700 / 15, 1300 / 15, 1400 / 15])
    assert found["ece"] == pytest.approx(100 * (1 / 15 + 2 * 0 + 3 * 0.1 + 1) / 7)
    assert found["bins"][2]["interval"] == wilson(3, 3)
    assert found["ece_equal_mass"] == pytest.approx(100 * (1 / 15 + 1 + 2.7 + 1 - 4) / 7)  # few images: one bin


def test_calibration_over_bins_of_equal_numbers():
    """By hand, and in any order of the images: those of one confidence are not divided."""
    confidence, right = np.linspace(0.3, 0.7, 330), np.arange(330) % 2 == 0
    gaps = [abs(confidence[start : start + 22].mean() - 0.5) for start in range(0, 330, 22)]  # 15 bins
    assert calibration(confidence, right)["ece_equal_mass"] == pytest.approx(100 * np.mean(gaps))
    confidence, right = np.repeat([0.25, 0.5, 0.75], [4, 50, 6]), np.arange(60) < 27
    for order in (np.arange(60), np.arange(60)[::-1], np.random.default_rng(0).permutation(60)):
        found = calibration(confidence[order], right[order])  # of three bins the one in the middle has 50 images
        assert found["ece_equal_mass"] == pytest.approx(100 * (4 * 0.75 + abs(50 * 0.5 - 23) + 6 * 0.75) / 60)


NAMES = ["a|b *c*", "new\nline", 'q"uo,te', "\udce9t\udce9"]
SHOWN = ["a|b *c*", r"new\nline", 'q"uo,te', r"\xe9t\xe9"]
QUIET = ["--device", "cpu", "--num_workers", 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, photographs):
    """A checkpoint with an EMA of four classes with odd names, without images of the last one in val; and its data."""
    root = tmp_path_factory.mktemp("report")
    for split, count in (("train", 4), ("val", 3)):
        for label, name in enumerate(NAMES[: 4 if split == "train" else 3]):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                photographs[label % 2].crop((60 * i, 90 * label, 60 * i + 200, 90 * label + 150)).save(
                    folder / f"{i}.png"
                )
    words = [*TINY_FINETUNE, "--nb_classes", 4, "--data_path", root / "data", "--output_dir", root, "--ema_decay", 0.5]
    words += ["--epochs", 1, "--batch_size", 4, "--lr", 0.01, "--warmup_epochs", 0]
    main_finetune.main(main_finetune.get_args_parser().parse_args([str(word) for word in words]))
    return root / "checkpoint-last.pth", root / "data"


@pytest.fixture(scope="module")
def written(run):
    """The folder of a report."""
    checkpoint, data = run
    words = ["--eval", "--resume", checkpoint, "--data_path", data, *QUIET, "--batch_size", 1]
    main_finetune.main(main_finetune.get_args_parser().parse_args([str(word) for word in words]))
    return checkpoint.with_suffix(".eval")


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_files(written):
    """JSON, CSV and page agree; names are escaped for each."""
    content = json.loads((written / "report.json").read_text())
    assert content["class_names"] == SHOWN
    assert list(content["results"]) == ["model", "model_ema"]
    assert content["args"]["output"] is None
    classes, confusions = rows_of(written / "classes.csv"), rows_of(written / "confusions.csv")
    assert [row["class"] for row in classes] == SHOWN * 2
    page = (written / "report.md").read_text()
    for key, row in content["results"].items():
        own = [line for line in classes if line["weights"] == key]
        assert [int(line["images"]) for line in own] == [3, 3, 3, 0]
        assert own[3]["accuracy"] == ""
        right = sum(int(line["correct"]) for line in own)
        assert row["acc1"] == pytest.approx(100 * right / 9)
        assert row["interval"] == list(wilson(right, 9))
        own = [line for line in confusions if line["weights"] == key]
        assert sum(int(line["images"]) for line in own) == 9
        assert {line["class"] for line in own} == set(SHOWN[:3])
        wrong = {(SHOWN[a], SHOWN[b], n) for a, b, n in row["confusions"]}
        off = {(line["class"], line["predicted"], int(line["images"])) for line in own}
        assert wrong == {line for line in off if line[0] != line[1]}
    assert rf"Without images, and so without accuracy, are 1 of 4 classes: {escaped(SHOWN[3])}." in page
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert r"| a\|b \*c\* |" in page
    links = re.findall(r"\]\((\S+?)\)", page)
    assert len(links) == 9
    assert {path.name for path in written.iterdir()} == {*links, "report.md"}
    for link in links[3:]:
        with Image.open(written / link) as picture:
            assert picture.text["Title"] == classifier_report.TITLE
            assert min(picture.size) > 200


def test_two_processes_equal_one(run, written, tmp_path):
    words = [
        "--eval",
        "--resume",
        run[0],
        "--data_path",
        run[1],
        *QUIET,
        "--batch_size",
        1,
        "--output",
        tmp_path / "two",
    ]
    output = torchrun("Finetuning/main_finetune.py", *words, "--dist_eval")
    assert output.count("report: ") == 1
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (written, tmp_path / "two"))
    for key, row in one["results"].items():
        assert two["results"][key].pop("loss") == pytest.approx(row.pop("loss"), rel=1e-6)
        assert two["results"][key] == row
    for name in ("classes.csv", "confusions.csv"):
        assert (written / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_broken_images_and_fewer_weights(run, written, tmp_path, run_script, capsys):
    """A broken image counts in its class; pictures of weights that are not in the report go, other files stay."""
    folder = tmp_path / "data"
    shutil.copytree(run[1], folder)
    (folder / "val" / NAMES[2] / "x.png").write_bytes(b"")
    shutil.copytree(written, tmp_path / "eval")
    Image.new("RGB", (9, 9)).save(tmp_path / "eval" / "classes-own.png")
    words = ["--eval", "--resume", run[0], "--data_path", folder, *QUIET, "--output", tmp_path / "eval"]
    run_script(main_finetune, *words, "--eval_bad", "wrong", "--model_key", "model")
    assert "on 10 images, 1 of them broken" in capsys.readouterr().out
    line = rows_of(tmp_path / "eval" / "classes.csv")[2]
    assert (line["images"], line["unanswered"]) == ("4", "1")
    (row,) = json.loads((tmp_path / "eval" / "report.json").read_text())["results"].values()
    assert sum(own["images"] for own in row["bins"]) == 9
    assert {"weights": "model", "class": SHOWN[2], "predicted": "", "images": "1"} in rows_of(
        tmp_path / "eval" / "confusions.csv"
    )
    assert "| broken | 1 |" in (tmp_path / "eval" / "report.md").read_text()
    pictures = {path.name for path in (tmp_path / "eval").glob("*.png")}
    assert pictures == {"calibration-model.png", "classes-model.png", "classes-own.png", "confusions-model.png"}


@pytest.mark.parametrize("name", ["report.md", "report.json", "classes.csv", "confusions.csv", "classes-model.png"])
def test_other_files_are_not_replaced(run, tmp_path, run_script, capsys, name):
    (tmp_path / name).write_text("# Evaluation of my own\nweights,class\n{}")
    words = ["--eval", "--resume", run[0], "--data_path", run[1], *QUIET, "--output", tmp_path]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *words)
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert f"--output {tmp_path / name} is there and is no earlier result of this kind" in err
    assert "top-1" not in out
    assert os.listdir(tmp_path) == [name]


def row_of(classes, pairs, each=10):
    """The numbers of a classifier that takes `times` of `each` images of a class for another one."""
    labels = np.repeat(np.arange(classes), each)
    predicted = labels.copy()
    for label, other, times in pairs:
        predicted[np.flatnonzero((labels == label) & (predicted == label))[:times]] = other
    ones = np.ones(len(labels))
    return measure(np.stack([predicted, ones, ones * 0.9, ones, ones], axis=1), labels, classes)


@pytest.mark.parametrize("classes", [1, 2, 50])
def test_pictures_of_all_classes(classes):
    names = [f"${n}$" for n in range(classes)]
    row = row_of(classes, [(0, 1, 4)] if classes > 1 else [])
    axis, _ = report_pictures.draw_confusions(row, names).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == names
    shares = axis.images[0].get_array()
    assert shares.shape == (classes, classes)
    assert shares[0, 0] == (60 if classes > 1 else 100)
    numbers = [text.get_text() for text in axis.texts]
    assert numbers == {1: ["10"], 2: ["6", "4", "10"], 50: []}[classes]
    (axis,) = report_pictures.draw_classes(row, names).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [f"{name}  (10)" for name in names]


def test_pictures_of_the_most_confused_classes():
    """Confused classes stand side by side; the others share a column."""
    names = list(map(str, range(300)))
    pairs = [(5, 200, 6), (200, 7, 3), *((label, label + 20, 1) for label in range(20, 40))]
    row = row_of(300, pairs)
    assert report_pictures.chosen_classes(row)[:3] == [5, 200, 7]
    axis, _ = report_pictures.draw_confusions(row, names).axes
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert len(labels) == 41
    assert labels[-1] == "other classes"
    shares = axis.images[0].get_array()
    assert shares.sum(axis=1).tolist() == [100] * 40
    assert shares[0].tolist() == [40, 60, *[0] * 39]
    assert len(set(report_pictures.chosen_classes(row_of(60, [])))) == 40  # without any confusion
    (axis,) = report_pictures.draw_classes(row, names).axes
    assert len(axis.lines[0].get_xdata()) == 300


def test_names_in_pictures():
    names = ["cat", "猫", "a very long name of a class of animals"]
    shown = [report_pictures.label_of(names, label) for label in range(3)]
    assert shown == ["cat", "class 1", "a very long name o…f animals"]
