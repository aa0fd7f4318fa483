"""Label maps and pictures of a segmenter's checkpoint: those of the model itself, for images of any size and turn."""

import argparse
import csv
import shutil

import numpy as np
import pytest
import torch
from helpers import torchrun
from PIL import Image

from Segmentation import segment_predict, segmentation_data, segmentation_pictures
from Segmentation.models_segment import create_segmenter
from Segmentation.segment_inference import Inference
from Segmentation.segment_predict import INVERSE, map_names, values_of
from Segmentation.segmentation_pictures import OPACITY, draw_overlays, overlay, palette
from tools import predict, visualize
from util.data import decode
from util.errors import RunError, UserError
from util.files import figure_of

SIZES = {"embed_dim": 16, "depth": 2, "patch_size": 8, "img_size": 32}
NAMES = ["sky", "grass", "house"]
QUIET = ["--device", "cpu", "--num_workers", 0, "--batch_size", 2]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_segmenter("arm_tiny_pz16", 3, "linear", **SIZES).eval()
    torch.nn.init.normal_(model.head.classifier[1].weight)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """Of a run whose masks had the values 0, 2 and 300, with images turned as EXIF says."""
    args = argparse.Namespace(input_size=[32, 32], mask_values=[0, 2, 300], exif=True)
    file = tmp_path_factory.mktemp("checkpoint") / "segmenter.pth"
    torch.save({"model": model.state_dict(), "args": args, "class_names": NAMES}, file)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory, photographs):
    """Four images of several sizes, one stored on its side, and two of one name."""
    root = tmp_path_factory.mktemp("photos")
    (root / "b").mkdir()
    sizes = {"a.jpg": (40, 33), "b/a.jpg": (32, 32), "c d.png": (90, 50), "e.jpg": (61, 40)}
    for number, (name, size) in enumerate(sizes.items()):
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "e.jpg" else 1
        photographs[number % 2].resize(size).save(root / name, exif=exif)
    return root


def run(checkpoint, *words):
    predict.main(predict.get_args_parser().parse_args([str(word) for word in (checkpoint, *words, *QUIET)]))


def wanted(model, path):
    """The class of each pixel, from Pillow's upright image and the model called directly, turned back."""
    with Image.open(path) as opened:
        turn = opened.getexif().get(0x0112, 1)
    transform = segment_predict.WholeImage((32, 32), segment_predict.Pixels(exif=True))
    sample, mask = segment_predict.whole(path.read_bytes(), transform)
    image = segment_predict.normalized(sample, transform.pixels, torch.device("cpu"))[None]
    with torch.no_grad():
        answer = Inference((32, 32))(model, image, tuple(mask.shape))[0][0].numpy()
    return np.rot90(answer) if turn == 6 else answer


def test_label_maps(model, checkpoint, photos, tmp_path, capsys):
    """They have the values of the masks in training, and the size of the stored image; a list says whose they are."""
    run(checkpoint, photos, "--output", tmp_path)
    with (tmp_path / "maps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["map"] for row in rows] == ["a.png", "c d.png", "e.png", "a-2.png"]
    assert [row["file"] for row in rows] == [str(photos / name) for name in ("a.jpg", "c d.png", "e.jpg", "b/a.jpg")]
    for row in rows:
        with Image.open(tmp_path / row["map"]) as found, Image.open(row["file"]) as image:
            assert found.mode in ("I;16", "I")  # the latter before Pillow 11.3
            assert found.size == image.size
            want = np.array([0, 2, 300])[wanted(model, photos / row["file"])]
            assert np.array_equal(np.asarray(found), want)
            assert len(np.unique(want)) > 1
    assert (tmp_path / "classes.txt").read_text() == "sky\ngrass\nhouse\n"
    assert "4 images" in capsys.readouterr().out
    (tmp_path / "e.png").unlink()
    run(checkpoint, photos / "b", photos / "e.jpg", "--output", tmp_path)  # replaces the earlier result, all of it
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "e.png", "maps.csv", "classes.txt"}


def test_two_processes_equal_one(checkpoint, photos, tmp_path):
    run(checkpoint, photos, "--output", tmp_path / "one")
    torchrun("tools/predict.py", checkpoint, photos, *QUIET, "--output", tmp_path / "two")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_images_without_a_result_are_listed(checkpoint, photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no image")
    normalized = segmentation_data.normalized

    def spoilt(image, *more):
        return normalized(image, *more) * (np.nan if image.shape[-1] == 58 else 1)

    monkeypatch.setattr(segmentation_data, "normalized", spoilt)
    run(checkpoint, tmp_path / "photos", "--output", tmp_path / "out")
    with (tmp_path / "out" / "maps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["error"]) for row in rows] == [True, True, False, False]
    assert [row["map"] for row in rows] == ["", "", "e.png", "a-2.png"]
    assert rows[0]["error"] == "no image of a known format"
    assert rows[1]["error"] == "logits are not finite"
    assert "2 of 4 images have no result, the column error says why" in capsys.readouterr().out
    with pytest.raises(RunError, match="none of the 1 images has a result"):
        run(checkpoint, tmp_path / "photos" / "a.jpg", "--output", tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output {out} --topk 2", "--topk is only for classification, not for segmentation"),
        ("--output {out} --eval_resize shorter", "--eval_resize shorter is not for segmentation"),
        ("--output {out} --eval_loader fast", "--eval_loader fast is not for segmentation"),
        ("--output {out} --block 1", "--block is only for --features, not for segmentation"),
        ("--output {photos}/a.jpg", "a.jpg cannot be written: File exists"),
        ("--output {full}", "holds files that are no earlier result: a.png; give another folder"),
        ("--output {other}", "holds maps.csv, which is no list of label maps"),
    ],
)
def test_mistakes(checkpoint, photos, tmp_path, words, message):
    for name, file in (("full", "a.png"), ("other", "maps.csv")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("mine")
    places = {name: tmp_path / name for name in ("out", "full", "other")}
    with pytest.raises(UserError, match=message):
        run(checkpoint, photos, *words.format(photos=photos, **places).split())
    assert (tmp_path / "full" / "a.png").read_text() == (tmp_path / "other" / "maps.csv").read_text() == "mine"


def test_features_of_a_segmenter_are_those_of_its_encoder(model, checkpoint, photos, tmp_path):
    run(checkpoint, photos / "b", "--features", "pooled", "--output", tmp_path / "f.npy")
    assert np.load(tmp_path / "f.npy").shape == (1, 16)


def test_names_and_values():
    source = argparse.Namespace(
        labels=np.zeros(5), name=["x/a.jpg", "y/a.png", "a-2.jpg", "z/a.tif", "é" * 300].__getitem__
    )
    names = map_names(source)
    assert names[:4] == ["a.png", "a-2.png", "a-2-2.png", "a-3.png"]
    assert len(names[4].encode()) == 204
    found = argparse.Namespace(name="c", arguments={})
    head = argparse.Namespace(num_classes=3)
    assert values_of(found, head).dtype == np.uint8
    assert values_of(found, head).tolist() == [0, 1, 2]
    for damaged in (["x", 1, 2], [-1, 0, 1], [0, 1, 2**16]):
        found.arguments = {"mask_values": damaged}
        with pytest.raises(UserError, match="c is damaged"):
            values_of(found, head)


@pytest.mark.parametrize("turn", range(1, 9))
def test_maps_are_turned_back(turn):
    labels = np.arange(6).reshape(2, 3)
    assert np.array_equal(decode.turned(decode.turned(labels, turn), INVERSE.get(turn, turn)), labels)


def test_visualize_draws_a_segmenter(checkpoint, photos, tmp_path, monkeypatch):
    """The whole image and the model's classes; nothing is written if an image is broken."""
    drawn = []

    def draw(image, predicted, names, *more):
        drawn.append((image.shape, predicted.shape, names))
        return draw_overlays(image, predicted, names, *more)

    monkeypatch.setattr(segment_predict, "draw_overlays", draw)
    words = [checkpoint, photos / "c d.png", photos / "a.jpg", "--device", "cpu", "--output", tmp_path]
    visualize.main(visualize.get_args_parser().parse_args([str(word) for word in words]))
    assert drawn == [((32, 58, 3), (32, 58), NAMES), ((32, 39, 3), (32, 39), NAMES)]
    assert figure_of(visualize.TITLE)(tmp_path / "c d-sheet.png")
    assert (tmp_path / "a-sheet.png").exists()


def test_colours_of_classes():
    """They differ, do not depend on the number of classes, and leave ignored pixels as they are."""
    colours = palette(150)
    assert np.array_equal(palette(20), colours[:20])
    distances = np.abs(colours[:20, None] - colours[None, :20]).sum(axis=2) + 9 * np.eye(20)
    assert distances.min() > 0.2
    assert len(np.unique((255 * colours).round(), axis=0)) == 150
    image, mask = np.full((1, 2, 3), 0.5), np.array([[-1, 7]])
    assert np.allclose(overlay(image, mask, colours), [[[0.5] * 3, 0.5 * (1 - OPACITY) + OPACITY * colours[7]]])


def test_the_legend_names_what_occurs():
    """The most frequent classes come first; of many, the number of the rest is told."""
    image, names = np.zeros((40, 60, 3)), [f"class {i} with a name that is long" for i in range(40)]
    truth = np.zeros((40, 60), np.int64)
    truth[:4] = -1
    truth[30:] = 3
    figure = draw_overlays(image, np.where(truth < 0, 3, truth), names, truth)
    assert [text.get_text()[:9] for text in figure.legends[0].get_texts()] == ["class 0 w", "class 3 w"]
    assert [axis.get_title() for axis in figure.axes] == ["input", "true classes", "predicted classes"]
    many = np.arange(40).repeat(60).reshape(40, 60)
    texts = [text.get_text() for text in draw_overlays(image, many, names).legends[0].get_texts()]
    assert len(texts) == segmentation_pictures.NAMED
    assert texts[-1] == "and 17 more"
    assert all(len(text) <= segmentation_pictures.LETTERS for text in texts)
