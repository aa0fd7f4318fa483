"""Test segment_knn.py: windows, patches and votes against plain loops; the script on photographs with shapes."""

import argparse
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_helpers import SHAPES, put, write_masked
from helpers import encoded, torchrun
from PIL import Image

import models_arm
from Evaluation import features, segment_knn
from Evaluation.segment_knn import Bank, Window, from_patches, to_patches, vote, windows
from util.data.sources.mask_folder import open_masks
from util.errors import RunError, UserError
from util.tracking.run_log import Log

SIZES = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 32, "depth": 3}
QUIET = ["--device", "cpu", "--num_workers", 0, "--batch_size", 2]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(1)
    pretrain = models_arm.ARMPretrain(**SIZES, cluster_size=2, dec_embed_dim=64, dec_depth=1, order="column")
    pyramid = models_arm.ARMPyramid(**SIZES, out_chans=8)
    return {
        "pretrain": pretrain.eval(),
        "classifier": models_arm.ARMClassifier(**SIZES).eval(),
        "pyramid": pyramid.eval(),
    }


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("pretrain", "classifier"):
        model = models[name]
        saved = argparse.Namespace(input_size=[32, 32], cluster_size=2, order="column", global_pool=True)
        torch.save({"model": model.state_dict(), "args": saved}, folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photographs):
    """Images of 72 x 48 pixels, which become 48 x 32 by --eval_resize shorter."""
    return write_masked(tmp_path_factory.mktemp("masks"), photographs, train=9, val=4, size=(72, 48))


def parsed(*words):
    return segment_knn.get_args_parser().parse_args([str(word) for word in (*words, *QUIET)])


def run(checkpoint, data, output, *more):
    segment_knn.main(parsed(checkpoint, "--data_path", data, "--output", output, *more))
    return json.loads(output.read_text())


# ---- parts


def test_windows():
    assert windows((32, 32), (32, 32)) == [Window(0, 0, 0, 0)]
    assert windows((32, 48), (32, 32)) == [Window(0, 0, 0, 0), Window(0, 16, 0, 8)]
    assert [w.left for w in windows((8, 30), (8, 8))] == [0, 7, 15, 22]
    assert windows((12, 8), (8, 8)) == [Window(0, 0, 0, 0), Window(4, 0, 2, 0)]


@pytest.mark.parametrize(("shape", "size"), [((50, 33), (32, 16)), ((20, 91), (20, 20)), ((64, 64), (64, 64))])
def test_windows_predict_each_pixel_once(shape, size):
    """None reaches beyond the image, and the parts that they predict cover it without overlap if laid on each other."""
    owner = torch.full(shape, -1)
    for number, (top, left, above, before) in enumerate(windows(shape, size)):
        assert 0 <= top <= shape[0] - size[0]
        assert 0 <= left <= shape[1] - size[1]
        owner[top + above : top + size[0], left + before : left + size[1]] = number
    assert owner.min() >= 0
    for number, (top, left, _, _) in enumerate(windows(shape, size)):
        rows, columns = (owner == number).nonzero().T
        assert top <= rows.min() and rows.max() < top + size[0]  # noqa: PT018
        assert left <= columns.min() and columns.max() < left + size[1]  # noqa: PT018


def test_patches_of_a_mask():
    mask = torch.arange(4 * 6).view(4, 6)
    patches = to_patches(mask, 2)
    assert patches.shape == (6, 4)
    assert patches[4].tolist() == [14, 15, 20, 21]  # second row, second column
    assert torch.equal(from_patches(patches, (2, 3)), mask)


@pytest.mark.parametrize("kind", ["pretrain", "classifier", "pyramid"])
def test_tokens_are_in_raster_order(models, kind):
    """They are those of `encode` without class token, in the order in which the pixels lie."""
    model, imgs = models[kind], torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = features.encode_patches(model, imgs, range(2, 4))
        tokens = features.encode(model, imgs, range(2, 4))
    if kind == "pretrain":
        assert torch.equal(model.to_clusters(patches).flatten(1, 2), tokens)  # (B, clusters, 4, C) -> (B, M, C)
    else:
        assert torch.equal(patches, torch.cat([tokens[:, :8], tokens[:, 9:]], dim=1))
    assert patches.dtype == torch.float32


def test_patches_that_a_pyramid_adds_are_left_out(models):
    """It pads 3 x 5 patches to 4 x 6."""
    imgs = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        patches = features.encode_patches(models["pyramid"], imgs, range(3, 4))
        padded = features.encode_patches(models["pyramid"], F.pad(imgs, (0, 8, 0, 8)), range(3, 4))
    assert torch.equal(patches.view(3, 5, 32), padded.view(4, 6, 32)[:3, :5])


def test_votes_equal_a_loop(monkeypatch):
    rng = np.random.default_rng(0)
    known, queries = (F.normalize(torch.from_numpy(rng.normal(size=(n, 6))).float(), dim=1) for n in (30, 11))
    labels = rng.integers(0, 3, (30, 4))
    monkeypatch.setattr(segment_knn, "VOTES", 100)  # several parts
    found = vote(Bank(known, torch.from_numpy(labels).short()), queries, [1, 4, 9], 0.1, 3)
    similarity = (queries.double() @ known.double().T).numpy()
    for k in (1, 4, 9):
        for query in range(11):
            nearest = np.argsort(-similarity[query])[:k]
            weights = np.exp(similarity[query, nearest] / 0.1)
            for pixel in range(4):
                votes = [weights[labels[nearest, pixel] == c].sum() for c in range(3)]
                assert found[k][query, pixel] == np.argmax(votes)
    low = vote(Bank(known, torch.from_numpy(labels).short()), queries, [9], 1e-6, 3)[9]
    np.testing.assert_array_equal(low, labels[similarity.argmax(axis=1)])  # the nearest one alone, without overflow


def collected(model, folder, *more):
    """The bank of train, whose images are RGB."""
    args = parsed("c.pth", "--data_path", folder, "--input_size", 32, *more)
    vars(args).update(mean=None, std=None, in_chans=3, exif=False)
    return segment_knn.collect(args, model, open_masks(str(folder), "train"), range(3, 4), Log())


def test_other_patches_are_kept_of_each_image(models, tmp_path):
    """Of equal images, too; seven patches of two images are three and four."""
    mask = np.arange(16, dtype=np.uint8).repeat(64).reshape(4, 4, 8, 8).transpose(0, 2, 1, 3).reshape(32, 32)
    put(tmp_path, "classes.txt", content="\n".join(map(str, range(16))).encode())
    for name in ("x", "y"):
        put(tmp_path, f"images/train/{name}.png", content=encoded(Image.new("RGB", (32, 32)), "PNG"))
        put(tmp_path, f"annotations/train/{name}.png", content=encoded(Image.fromarray(mask), "PNG"))
    kept = [collected(models["classifier"], tmp_path, "--max_tokens", 7, "--seed", seed)[1][:, 0] for seed in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    first, second = kept[0].split([3, 4])
    assert {*first.tolist()} - {*second.tolist()}


def test_pixels_without_a_class_in_the_bank(models, tmp_path):
    """A patch without classes is left out; in one with some, its most frequent class fills the rest."""
    mask = np.full((32, 32), 255, np.uint8)
    mask[8:16, 8:16] = 1
    mask[8:11, 8:16] = 255
    mask[15, 15] = 0
    mask[24:, 24:] = 2
    mask[24:29, 24:] = 255  # 5 of 8 rows
    put(tmp_path, "classes.txt", content=b"a\nb\nc")
    put(tmp_path, "images/train/x.png", content=encoded(Image.new("RGB", (32, 32), (9, 99, 9)), "PNG"))
    put(tmp_path, "annotations/train/x.png", content=encoded(Image.fromarray(mask), "PNG"))
    bank = collected(models["classifier"], tmp_path)
    want = np.where(mask[8:16, 8:16] == 255, 1, mask[8:16, 8:16])
    assert bank.labels.tolist() == [want.flatten().tolist()]
    torch.testing.assert_close(bank.tokens.norm(dim=1), torch.ones(1))


# ---- the script


@pytest.mark.parametrize("kind", ["pretrain", "classifier"])
@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_tokens_of_random_weights_find_shapes(checkpoints, folder, tmp_path, kind, resize):
    """Colours are enough. The largest class alone would have a mIoU of a third of its share."""
    words = ["--eval_resize", resize, "--k", 3, 1, 10**3, "--average_last", 2]
    found = run(checkpoints / f"{kind}.pth", folder, tmp_path / "out.json", *words)
    assert [row["k"] for row in found["results"]] == [1, 3]  # there are no 1000 patches
    assert found["patches"] == 9 * 16 * (2 if resize == "shorter" else 1)
    assert (found["class_names"], found["blocks"], found["ignored"]) == (SHAPES, [2, 3], [255])
    pixels = sum((open_masks(str(folder), "val").read_mask(i) >= 0).sum() for i in range(4))
    for row in found["results"]:
        assert row["miou"] > 55
        assert row["pixels"] == pixels
        assert [own["name"] for own in row["classes"]] == SHAPES


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_images_that_are_known_are_classified_without_a_mistake(checkpoints, photographs, tmp_path, resize):
    """Each patch finds itself: pixels, masks, windows and predictions lie on each other."""
    size = (32, 32) if resize == "square" else (56, 32)
    data = write_masked(tmp_path / "data", photographs, train=5, val=0, size=size)
    for kind in ("images", "annotations"):
        (data / kind / "train").rename(data / kind / "val")
        (data / kind / "train").symlink_to(data / kind / "val")
    found = run(checkpoints / "classifier.pth", data, tmp_path / "out.json", "--k", 1, "--eval_resize", resize)
    assert [found["results"][0][name] for name in ("miou", "pixel_acc", "mean_acc")] == [100] * 3


def test_two_processes_equal_one(checkpoints, folder, tmp_path):
    words = ["--max_tokens", 100, "--eval_resize", "shorter", "--k", 1, 5, "--seed", 4]
    one = run(checkpoints / "pretrain.pth", folder, tmp_path / "one.json", *words)
    assert one["patches"] == 100
    more = ["--data_path", folder, *words, *QUIET, "--output", tmp_path / "two.json"]
    torchrun("Evaluation/segment_knn.py", checkpoints / "pretrain.pth", *more)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["results"] == one["results"]
    other = run(checkpoints / "pretrain.pth", folder, tmp_path / "other.json", *words[:-1], 5)
    assert other["results"] != one["results"]


def test_a_broken_image_ends_the_evaluation(checkpoints, photographs, tmp_path):
    data = write_masked(tmp_path / "data", photographs, train=2, val=2)
    put(data, "images/val/3.jpg", content=b"no image")
    with pytest.raises(RunError, match=r"val/3\.jpg: no image of a known format.*\nrepair or remove it"):
        run(checkpoints / "classifier.pth", data, tmp_path / "out.json")


def test_mistakes_and_features_without_a_direction(checkpoints, folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--k 1000: there are 5 patches of train"):
        run(checkpoints / "classifier.pth", folder, tmp_path / "out.json", "--k", 1000, "--max_tokens", 5)
    with pytest.raises(UserError, match="--block 4: the encoder has 3 blocks"):
        run(checkpoints / "classifier.pth", folder, tmp_path / "out.json", "--block", 4)
    monkeypatch.setattr(features, "encode_patches", lambda model, imgs, blocks: torch.zeros(len(imgs), 16, 32))
    with pytest.raises(RunError, match=r"features of .*train/0\.jpg are zero or not finite"):
        run(checkpoints / "classifier.pth", folder, tmp_path / "out.json")
