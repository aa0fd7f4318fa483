"""Parts of the demo; `make demo` runs all of it."""

import argparse
import csv
import json
import re
import sys

import numpy as np
import pytest
import torch
from fork_server import run_forked
from helpers import REPOSITORY, TINY_PRETRAIN
from PIL import Image, ImageDraw
from torchvision.datasets import ImageFolder

import main_pretrain
from demo import cutouts, demo, photographs, trees
from demo.digits import unpack_digits
from demo.pictures import draw_curves, draw_predictions
from Evaluation import probe
from Finetuning import main_finetune
from tools import plot_log, predict, visualize
from util import cli
from util.checkpoints import checkpoint_file
from util.data.sources.coco import open_coco
from util.data.sources.mask_folder import IGNORED, open_masks
from util.errors import RunError


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (REPOSITORY / "demo").glob("*.py") if "get_args_parser" in path.read_text())
)
def test_it_starts_as_a_script(name):
    """Python searches the script's own folder, too, whose demo.py must not hide the package."""
    assert run_forked([REPOSITORY / "demo" / name, "--help"]).returncode == 0


def test_unpacked_digits(tmp_path):
    """They are 5,000 real digits in an image folder."""
    unpack_digits(tmp_path / "digits")
    train, val = (ImageFolder(str(tmp_path / "digits" / split)) for split in ("train", "val"))
    assert train.classes == val.classes == [str(d) for d in range(10)]
    for dataset, count in ((train, 400), (val, 100)):
        assert np.bincount(dataset.targets).tolist() == [count] * 10
    pixels = {np.asarray(image).tobytes() for dataset in (train, val) for image, _ in dataset}
    assert len(pixels) == 5000  # no image is in both splits
    image = np.asarray(train[0][0])
    assert image.shape == (28, 28, 3)
    assert image.max() > 200
    assert image[0].max() == 0


def test_pictures_are_drawn(image_folder, tmp_path, run_script):
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--batch_size", 8, "--epochs", 1, "--norm_pix_loss"]
    run_script(main_pretrain, *TINY_PRETRAIN, *words)
    draw_predictions(tmp_path / "checkpoint-0.pth", image_folder / "val", tmp_path / "predictions.png")
    rows = [{"epoch": epoch, "train_loss": 1.0 / (epoch + 1), "test_acc1": 90.0 + epoch} for epoch in range(3)]
    table = {title: {"pretrained": 90.0, "random": 60.0} for title in ("neighbours", "linear")}
    logs = {"pretrain": rows, "finetune_pretrained": rows, "finetune_random": rows}
    draw_curves(logs, table, tmp_path / "curves.png")
    for name in ("predictions.png", "curves.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert pixels.shape[1] > 300
        assert pixels.std() > 10


def test_random_encoder(image_folder, tmp_path, run_script):
    """It has the initial weights of a run, which a learning rate of 0 does not change."""
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--batch_size", 8, "--epochs", 1, "--lr", 0]
    run_script(main_pretrain, *TINY_PRETRAIN, *words, "--weight_decay", 0, "--seed", 3)
    demo.write_random_encoder(tmp_path / "checkpoint-0.pth", tmp_path / "random.pth")
    want, got = (checkpoint_file.read(tmp_path / name)["model"] for name in ("checkpoint-0.pth", "random.pth"))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_mistakes_start_nothing(monkeypatch, capsys, tmp_path):
    """A mistake starts nothing; a folder that cannot be created is named."""
    monkeypatch.setattr(demo, "OUT", tmp_path / "file")
    (tmp_path / "target").mkdir()
    (tmp_path / "file").symlink_to(tmp_path / "target")  # is not removed
    for words, message in ((["--epochs", "5"], "unrecognized arguments: --epochs 5"), ([], "File exists")):
        monkeypatch.setattr(sys, "argv", ["demo.py", *words])
        with pytest.raises(SystemExit) as exit_info:
            cli.run_main(demo.main, demo.get_args_parser())
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_the_whole_demo(monkeypatch, tmp_path, capsys):
    """All steps with few digits and one epoch: the table has what the runs wrote, and a small gain is an error."""

    def few_digits(folder):
        unpack_digits(tmp_path / "all")
        for number, path in enumerate(sorted((tmp_path / "all").rglob("*.png"))):
            if number % 50 == 0:
                target = folder / path.relative_to(tmp_path / "all")
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)

    monkeypatch.chdir(REPOSITORY)  # and back to where pytest was
    monkeypatch.setattr(demo, "OUT", tmp_path / "out")
    monkeypatch.setattr(demo, "DATA", tmp_path / "out" / "digits")
    monkeypatch.setattr(demo, "FEW", tmp_path / "out" / "few")
    monkeypatch.setattr(demo, "unpack_digits", few_digits)
    for name in ("PRETRAIN", "FINETUNE"):
        monkeypatch.setattr(demo, name, f"{getattr(demo, name)} --epochs 1")
    monkeypatch.setattr(demo, "LEAST", (-100, -100, 100.5))
    with pytest.raises(RunError, match=r"finetuned .*: pretraining adds -?[\d.]+ points, not at least 100\.5"):
        demo.main(argparse.Namespace(seed=1))
    printed = capsys.readouterr().out
    steps = re.findall(r"^\[(\d)/5, \d:[0-5]\d left\] (\w+)", printed, re.MULTILINE)
    assert list(dict.fromkeys(number for number, _ in steps)) == list("12345")
    top1 = json.loads((tmp_path / "out" / "results.json").read_text())["top1"]
    assert len(top1) == 3
    for title, row in top1.items():
        assert f"| {title} | {row['pretrained']:.1f} % | {row['random']:.1f} % |" in printed
    (evaluated,) = re.findall(r"^model: top-1 ([\d.]+) %.* on 20 images$", printed, re.MULTILINE)
    assert float(evaluated) == top1["finetuned with 50 labels a class"]["pretrained"]
    for name in ("curves.png", "predictions.png", "table.md"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def as_package(folder, name, images, boxes=()):
    """Write a package that holds images, by path and size, and the boxes of the two aerial photographs."""
    for path, (width, height) in images.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name / path)
    for path, corners in boxes:
        fields = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        (folder / name / path).write_text(f"<annotation><object><bndbox>{fields}</bndbox></object></annotation>")


def test_tiles_of_photographs(tmp_path, monkeypatch, run_script, capsys):
    """The upper two thirds of the aerial photographs are to train on, and labels follow from the boxes."""
    first, second = (f"data/{name}" for name in photographs.AERIAL)
    others = {package: dict.fromkeys(names, (64, 64)) for package, names in photographs.OTHERS.items()}
    aerial = {f"{first}.png": (130, 200), f"{second}.png": (64, 130)}
    boxes = [(f"{first}.xml", (-3, 0, 64, 30)), (f"{second}.xml", (0, 0, 64, 6))]
    as_package(tmp_path, "skimage", others["skimage"])
    as_package(tmp_path, "deepforest", others["deepforest"] | aerial, boxes)
    monkeypatch.syspath_prepend(tmp_path)
    for package in ("deepforest", "skimage"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    run_script(photographs, tmp_path / "own")
    flat, held_out = ([*(tmp_path / "own" / kind).iterdir()] for kind in ("tiles", "held_out"))
    assert f"{len(flat)} tiles without labels, {len(held_out)} held out" in capsys.readouterr().out
    assert len(flat) == 11 + 2 * 10 * 6 + 4 + 2  # scikit-learn's are real, of 640 x 427 pixels
    with (tmp_path / "own" / "cover.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["path"]: (row["label"], row["split"]) for row in csv.DictReader(file)}
    name = photographs.AERIAL[0]
    assert rows[f"tiles/{name}_00_00.png"] == ("forest", "train")
    assert rows[f"tiles/{name}_00_01.png"] == ("open", "train")
    assert rows[f"held_out/{name}_02_01.png"] == ("open", "val")
    assert rows[f"tiles/{photographs.AERIAL[1]}_00_00.png"] == ("scattered", "train")
    assert len(rows) == 8
    assert all((tmp_path / "own" / path).is_file() for path in rows)


# What makes the commands of the page short: a smaller model, fewer epochs, no processes.
SHORTER = {
    main_pretrain: "--embed_dim 32 --depth 2 --dec_depth 1 --epochs 2 --warmup_epochs 0 --num_workers 0",
    main_finetune: "--embed_dim 32 --depth 2 --epochs 1 --warmup_epochs 0 --num_workers 0",
    probe: "--num_workers 0 --probe_epochs 2 --seeds 1",
    predict: "--num_workers 0",
}


def test_the_walk_through(tmp_path, monkeypatch, run_script, capsys):
    """The commands of docs/own_images.md run in their order, each on the files that those before it have written."""
    first, second = (f"data/{name}" for name in photographs.AERIAL)
    others = {package: dict.fromkeys(names, (64, 64)) for package, names in photographs.OTHERS.items()}
    aerial = {f"{first}.png": (384, 640), f"{second}.png": (704, 832)}  # the page names a tile of its last row
    boxes = [(f"{name}.xml", (0, 0, 200, 832)) for name in (first, second)]
    as_package(tmp_path, "skimage", others["skimage"])
    as_package(tmp_path, "deepforest", others["deepforest"] | aerial, boxes)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "own_images.md").read_text()
    commands = re.findall(r"^(?:python|torchrun --standalone --nproc_per_node 2) (\w+/)?(\w+)\.py (.+)$", page, re.M)
    scripts = (photographs, main_pretrain, plot_log, visualize, probe, main_finetune, predict)
    by_name = {script.__name__.rpartition(".")[2]: script for script in scripts}
    assert set(by_name) == {name for _, name, _ in commands}
    for _, name, words in commands:
        script = by_name[name]
        shorter = "--num_workers 0" if "--eval" in words else SHORTER.get(script, "")
        run_script(script, *words.split(), *shorter.split())
    said = capsys.readouterr().out
    assert "RankMe" in said
    own = tmp_path / "own_photos"
    report = own / "finetune" / "checkpoint-best.eval"
    assert f"report: {report.relative_to(tmp_path)}" in said
    for picture in (own / "curves.png", *own.glob("*-sheet.png"), *report.glob("*.png")):
        assert np.asarray(Image.open(picture).convert("L")).std() > 10
    with (own / "answers.csv").open(encoding="utf-8", newline="") as file:
        answers = {row["file"]: float(row["probability_1"]) for row in csv.DictReader(file)}
    assert set(answers) == {f"own_photos/held_out/{path.name}" for path in (own / "held_out").iterdir()}
    assert min(answers.values()) > 1 / 3


def test_photographs_that_are_missing(tmp_path, monkeypatch, run_script, capsys):
    """A package of the same name without its photographs; nothing is written then."""
    as_package(tmp_path, "deepforest", {"data/other.png": (8, 8)})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        run_script(photographs, tmp_path / "own")
    assert "deepforest with data/SOAP_031.png is not installed" in capsys.readouterr().err
    assert not (tmp_path / "own").exists()


def test_trees(tmp_path, monkeypatch, run_script, capsys):
    """Boxes are clipped to their tile, in its pixels; a sliver is dropped; tiles cover a photograph once."""
    places = {name: split for split, names in trees.PHOTOGRAPHS.items() for name in names}
    sizes = {f"data/{name}.png": (500, 300) for name in places}
    boxes = [(f"data/{name}.xml", (200, 10, 300, 40)) for name in places]
    boxes[0] = (boxes[0][0], (230, 10, 330, 40))  # a fifth of it lies in the first tile
    as_package(tmp_path, "deepforest", sizes, boxes)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepforest", raising=False)
    run_script(trees, tmp_path / "trees")
    printed = capsys.readouterr().out
    assert f"{tmp_path}/trees/train: 4 tiles with 3 boxes, of 2 trees in 2 photographs" in printed
    assert f"{tmp_path}/trees/val: 4 tiles with 4 boxes, of 2 trees in 2 photographs" in printed
    for split, names in trees.PHOTOGRAPHS.items():
        found = json.loads((tmp_path / "trees" / "annotations" / f"instances_{split}.json").read_text())
        assert [image["id"] for image in found["images"]] == [1, 2, 3, 4]
        for number, name in enumerate(names):
            tiles = [Image.open(tmp_path / "trees" / split / f"{name}_00_0{column}.png") for column in (0, 1)]
            with Image.open(tmp_path / "deepforest" / "data" / f"{name}.png") as photograph:
                assert np.array_equal(np.hstack([np.asarray(tile) for tile in tiles]), np.asarray(photograph))
            images = found["images"][2 * number :][:2]
            assert [(image["width"], image["height"]) for image in images] == [(250, 300)] * 2
            got = [row["bbox"] for row in found["annotations"] if row["image_id"] in (images[0]["id"], images[1]["id"])]
            assert got == ([[0, 10, 80, 30]] if name == next(iter(places)) else [[200, 10, 50, 30], [0, 10, 50, 30]])
        assert all(row["area"] == row["bbox"][2] * row["bbox"][3] for row in found["annotations"])
    source = open_coco(f"coco:{tmp_path}/trees", "val")
    assert (source.classes, [len(source.objects(i).boxes) for i in range(4)]) == (["tree"], [1, 1, 1, 1])


def test_cut_outs(tmp_path, monkeypatch, run_script, capsys):
    """Masks name what an image shows, and training and evaluation show other cut-outs; the same in every run."""
    for label, folder in enumerate(cutouts.CLASSES.values()):
        (tmp_path / "clipart" / folder).mkdir(parents=True)
        for i in range(6):  # discs whose red tells the class; every fourth is blue, too, and held out
            for name in (f"{i}", f"{i}_again"):
                picture = Image.new("RGBA", (100 + 30 * i, 100))
                draw, box = ImageDraw.Draw(picture), (5, 5, 90 + 30 * i, 95)
                draw.ellipse(box, (30 * label + 40, 255, 255 * (i % 4 == 0), 255))
                draw.pieslice(box, 30 * i - 90, 30 * i - 40, (0, 0, 0, 0))
                picture.save(tmp_path / "clipart" / folder / f"{name}.png")
        Image.new("RGBA", (99, 99), (9, 200, 9, 255)).save(tmp_path / "clipart" / folder / "background.png")
        lines = Image.new("RGBA", (99, 99))
        ImageDraw.Draw(lines).line((5, 5, 90, 90), (200, 9, 9, 255), 3)
        lines.save(tmp_path / "clipart" / folder / "lines.png")
    as_package(tmp_path, "skimage", dict.fromkeys((f"data/{name}" for name in cutouts.PHOTOGRAPHS), (400, 200)))
    for name in cutouts.PHOTOGRAPHS:  # black at the left, grey at the right
        photograph = Image.new("L", (400, 200))
        photograph.paste(90, (200, 0, 400, 200))
        photograph.save(tmp_path / "skimage" / "data" / name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "skimage", raising=False)
    monkeypatch.setattr(cutouts, "COUNTS", {"train": 12, "val": 8})
    for folder in ("first", "second"):
        run_script(cutouts, tmp_path / folder, "--clipart", tmp_path / "clipart")
    printed = capsys.readouterr().out
    assert printed.count("4 of mammal, 4 of bird") == printed.count("2 of mammal, 2 of bird") == 2
    shown = set()
    for split, held_out in (("train", False), ("val", True)):
        files = sorted((tmp_path / "first" / "images" / split).iterdir())
        assert len(files) == cutouts.COUNTS[split]
        for file in files:
            again = tmp_path / "second" / file.relative_to(tmp_path / "first")
            assert file.read_bytes() == again.read_bytes()
            image = np.asarray(Image.open(file)).astype(int)
            mask = np.asarray(Image.open(tmp_path / "first" / "annotations" / split / f"{file.stem}.png"))
            assert image.shape == (cutouts.SIDE, cutouts.SIDE, 3)
            assert abs(np.median(image[mask == 0]) - 90 * held_out) < 5
            for label in {*mask.flat} - {0, cutouts.IGNORED}:
                red, green, blue = image[mask == label].T
                assert np.median(green) > 230
                assert abs(np.median(red) - 30 * (label - 1) - 40) < 12
                assert (np.median(blue) > 128) == held_out
                shown.add(int(label))
    assert shown == {*range(1, 8)}
    for split, count in cutouts.COUNTS.items():
        source = open_masks(str(tmp_path / "first"), split)
        assert (source.classes, len(source.paths)) == (["photograph", *cutouts.CLASSES], count)
        assert {*source.read_mask(0).flat} <= {IGNORED, *range(8)}


def test_cut_outs_without_clip_art(tmp_path, monkeypatch, run_script, capsys):
    as_package(tmp_path, "skimage", {f"data/{name}": (8, 8) for name in cutouts.PHOTOGRAPHS})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "skimage", raising=False)
    with pytest.raises(SystemExit, match=r"^2$"):
        run_script(cutouts, tmp_path / "out", "--clipart", tmp_path)
    assert f"--clipart {tmp_path} has no pictures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
