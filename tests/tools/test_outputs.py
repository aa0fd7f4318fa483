"""Test that results replace results of their kind only, and that damaged caches of features are refused."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_PRETRAIN
from matplotlib.figure import Figure
from PIL import Image

import main_pretrain
import models_arm
from Evaluation import probe, robustness
from tools import export, plot_log, predict, visualize
from util import hardware
from util.errors import UserError
from util.files import figure_of, json_with, output_file, save_figure, write_json

OURS = json_with(results=list)


def links_and_others(folder: Path) -> dict[str, Path]:
    """Return paths that a result must not be written to, by name."""
    checkpoint, stranger = folder / "c.pth", folder / "notes.json"
    checkpoint.write_bytes(b"weights")
    stranger.write_text('{"results": "of someone else"}')
    (folder / "text.json").write_text("not JSON")
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "fifo.json")
    (folder / "link.json").symlink_to(folder / "none.json")
    os.link(checkpoint, folder / "hard.json")
    (folder / "soft.json").symlink_to(checkpoint)
    names = "c.pth hard.json soft.json notes.json text.json folder.json fifo.json link.json".split()
    return {name: folder / name for name in names} | {"/dev/full": Path("/dev/full"), "long": folder / ("x" * 300)}


def test_only_results_of_the_same_kind_are_replaced(tmp_path):
    for name, path in links_and_others(tmp_path).items():
        with pytest.raises(UserError) as refused:
            output_file(path, OURS, tmp_path / "c.pth")
        assert str(refused.value).startswith("--output "), name
        assert "\n" not in str(refused.value)
    assert (tmp_path / "c.pth").read_bytes() == b"weights"
    write_json(tmp_path / "mine.json", {"results": []})
    for path in (tmp_path / "mine.json", tmp_path / "new" / "folder" / "x.json"):
        assert output_file(path, OURS, tmp_path / "c.pth") == path
    assert (tmp_path / "new" / "folder").is_dir()


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_figures_are_known_by_their_title(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    save_figure(Figure(), path, "ARM curves")
    assert figure_of("ARM curves")(path)
    assert not figure_of("ARM predictions")(path)
    Figure().savefig(tmp_path / f"other.{kind}")
    assert not figure_of("ARM curves")(tmp_path / f"other.{kind}")
    assert len(list(tmp_path.iterdir())) == 2


# ---- the scripts


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Return a folder with a pretraining model (pre.pth) and a classifier of 1000 classes (fine.pth)."""
    folder = tmp_path_factory.mktemp("weights")
    args = main_pretrain.get_args_parser().parse_args([*TINY_PRETRAIN, "--data_path", "x"])
    torch.manual_seed(0)
    torch.save({"model": main_pretrain.build_model(args).state_dict(), "args": args}, folder / "pre.pth")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1}
    model = models_arm.create_classifier("arm_tiny_pz16", **sizes, num_classes=1000)
    torch.save(model.state_dict(), folder / "fine.pth")
    return folder


@pytest.fixture
def commands(pretrained, image_folder, tmp_path):
    """Return each script that has --output, with its other arguments."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(photo)
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 1}\n')
    data = ["--data_path", image_folder, "--device", "cpu", "--num_workers", 0]
    return {
        "probe": (probe, [pretrained / "pre.pth", *data, "--probe", "knn", "--k", 1, "--cache", tmp_path / "cache"]),
        "robustness": (robustness, [pretrained / "fine.pth", "--data", f"v2={image_folder}", "--device", "cpu"]),
        "export": (export, [pretrained / "fine.pth", "--to", "safetensors", "--no_measure"]),
        "plot_log": (plot_log, [tmp_path]),
        "predict": (predict, [pretrained / "fine.pth", photo, "--device", "cpu", "--num_workers", 0]),
    }


@pytest.mark.parametrize("script", ["probe", "robustness", "export", "plot_log", "predict"])
def test_scripts_refuse_an_output_that_is_not_theirs(script, commands, tmp_path, run_script, capsys):
    module, words = commands[script]
    suffix = {"export": ".safetensors", "plot_log": ".png", "predict": ".csv"}.get(script, ".json")
    stranger, link = tmp_path / f"mine{suffix}", tmp_path / f"checkpoint{suffix}"
    stranger.write_bytes(b"of someone else")
    os.link(tmp_path / "log.txt" if script == "plot_log" else words[0], link)
    before = link.read_bytes()
    for path in (stranger, link):
        with pytest.raises(SystemExit) as ended:
            run_script(module, *words, "--output", path)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "error: --output " in line
        assert str(path) in line
    assert stranger.read_bytes() == b"of someone else"
    assert link.read_bytes() == before


def test_a_result_of_the_same_kind_is_replaced(commands, tmp_path, run_script):
    for script, name in (("probe", "x.json"), ("plot_log", "x.png"), ("export", "y.safetensors"), ("predict", "z.csv")):
        module, words = commands[script]
        for _ in range(2):
            run_script(module, *words, "--output", tmp_path / name)
        assert (tmp_path / name).is_file()
    result = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert result["class_names"] == ["class_0", "class_1", "class_2"]


def test_sheets_replace_sheets_alone(pretrained, tmp_path, run_script, capsys):
    photo, words = tmp_path / "photo.png", ["--output", tmp_path, "--device", "cpu"]
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(photo)
    (tmp_path / "photo-sheet.png").write_bytes(photo.read_bytes())
    with pytest.raises(SystemExit):
        run_script(visualize, pretrained / "pre.pth", photo, *words)
    assert "photo-sheet.png is there and is no earlier result of this kind" in capsys.readouterr().err
    (tmp_path / "photo-sheet.png").unlink()
    for _ in range(2):
        run_script(visualize, pretrained / "pre.pth", photo, *words)


@pytest.mark.parametrize("odd", ["fifo.png", "folder.png", "text.png", "eps.png", "none.png"])
def test_odd_images_are_told_before_the_model_is_read(odd, tmp_path, run_script, capsys):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(SystemExit) as ended:
        run_script(visualize, tmp_path / "no-model.pth", tmp_path / odd, "--output", tmp_path)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / odd}" in line


def test_an_image_too_long_for_the_model(pretrained, tmp_path, run_script, capsys):
    """If its shorter side is resized to the input, it is too large; no sheet is written then."""
    photo, line = tmp_path / "photo.png", tmp_path / "line.png"
    Image.new("RGB", (40, 40)).save(photo)
    Image.new("L", (60_000, 1)).save(line)
    with pytest.raises(SystemExit) as ended:
        run_script(visualize, pretrained / "pre.pth", photo, line, "--output", tmp_path / "sheets", "--device", "cpu")
    assert ended.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert f"{line}: 60000 x 1 pixels" in message
    assert not list((tmp_path / "sheets").iterdir())


LONG = "x" * 300


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (export, [".", "--to", "onnx"], r"\. names no file"),
        (export, ["http://", "--to", "pt2"], "http:// names no file"),
        (export, ["{root}/fine.pth", "--to", "pt2", "--output", f"{LONG}/x.pt2"], "File name too long"),
        (probe, [".", "--data_path", "x"], r"\. names no file"),
        (probe, ["{root}/pre.pth", "--data_path", "x", "--cache", ""], "argument --cache: it is empty"),
        (robustness, ["{root}/fine.pth", "--device", "cpu", "--data", f"sketch={LONG}"], "File name too long"),
        (robustness, ["{root}/fine.pth", "--data", "sketch="], "'sketch=' is not SET=FOLDER"),
        (plot_log, [LONG], "File name too long"),
        (plot_log, ["{root}", "--output", ""], "--output: .* has an empty name"),
        (predict, ["{root}/fine.pth", LONG, "--output", "x.csv", "--device", "cpu"], "File name too long"),
        (
            predict,
            ["{root}/fine.pth", "{root}/pre.pth", "--output", f"{LONG}.csv", "--device", "cpu"],
            "File name too long",
        ),
        (visualize, ["{root}/pre.pth", LONG, "--device", "cpu"], "File name too long"),
    ],
)
def test_odd_names_give_one_line(script, words, message, pretrained, tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_script(script, *(word.format(root=pretrained) for word in words))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


def test_reports_of_benchmarks_replace_reports_alone(tmp_path):
    path = tmp_path / "report.json"
    hardware.write(path, {**hardware.describe(torch.device("cpu")), "results": [float("nan")]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["results"] == [None]
    assert hardware.result_file("scan", {"date": "x"}, path) == path
    path.write_text("{}")
    with pytest.raises(UserError, match="no earlier result"):
        hardware.result_file("scan", {"date": "x"}, path)


# ---- caches of features


@pytest.fixture
def probed(pretrained, image_folder, tmp_path, run_script):
    """Return a function that probes a copy of the images and returns the files of the cache, and the copy."""
    data = shutil.copytree(image_folder, tmp_path / "images")
    words = [pretrained / "pre.pth", "--data_path", data, "--device", "cpu", "--num_workers", 0, "--probe", "knn"]
    words += ["--k", 1, "--cache", tmp_path / "cache", "--output", tmp_path / "x.json"]

    def run() -> set[Path]:
        run_script(probe, *words)
        return set((tmp_path / "cache").iterdir())

    return run, data


def test_a_changed_image_has_new_features(probed):
    run, data = probed
    first = run()
    assert run() == first
    image = data / "val" / "class_1" / "0.png"
    Image.fromarray(np.full((37, 53, 3), 200, np.uint8)).save(image)
    second = run()
    (new,) = second - first
    assert new.name.startswith("val-")
    content = image.read_bytes()
    image.write_bytes(content)  # the same bytes with another time
    os.utime(image, ns=(0, 0))
    assert len(run() - second) == 1


@pytest.mark.parametrize("damage", ["bit", "truncated", "longer", "empty", "header"])
def test_a_damaged_cache_is_refused_by_name(probed, damage, capsys):
    run, _ = probed
    path = next(file for file in run() if file.name.startswith("val-"))
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 4
    elif damage == "header":
        content[60:64] = b"9999"
    path.write_bytes({"truncated": content[:-100], "longer": content + b"\0" * 8, "empty": b""}.get(damage, content))
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} is damaged, delete it: " in line
    path.unlink()
    run()
