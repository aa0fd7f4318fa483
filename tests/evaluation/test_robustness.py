"""Test robustness.py on small folders with the published layouts, against accuracies computed with NumPy."""

import argparse
import json
import re
import shutil
from functools import cache, partial

import numpy as np
import pytest
import torch
from helpers import Batches, torchrun
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet
from torchvision import transforms

import models_arm
from Evaluation import robustness
from Evaluation.tables import wilson
from util.data.pixels import IMAGENET
from util.data.transforms import BICUBIC
from util.tracking.run_log import Log
from util.training.evaluation import evaluate

SYNSETS = ImageNetInfo().label_names()
REAL = list(RealLabelsImagenet(range(50_000)).real_labels.values())
QUIET = ["--device", "cpu", "--num_workers", 0]
pytestmark = pytest.mark.usefixtures("one_thread")


class World:
    """A classifier with known predictions, and folders of images of which it predicts some right."""

    def __init__(self, root, names=()):
        self.root, self.checkpoint = root, root / "tiny.pth"
        torch.manual_seed(0)
        self.model = models_arm.create_classifier(
            "arm_tiny_pz16", img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=len(names) or 1000
        ).eval()
        torch.nn.init.normal_(self.model.head.weight)
        saved = argparse.Namespace(input_size=[32, 32], global_pool=True)
        named = {"class_names": names} if names else {}
        torch.save({"model": self.model.state_dict(), "args": saved, **named}, self.checkpoint)
        rng = np.random.default_rng(0)
        colours = rng.uniform(0, 255, (24, 3, 3, 3)).astype(np.uint8)
        self.images = [Image.fromarray(c).resize((50, 40), Image.Resampling.BICUBIC) for c in colours]

    def answers(self, i, crop=True, columns=slice(None)):
        """Return the classes of an image from the best to the worst, as positions among the columns."""
        return np.argsort(-self.logits(i, crop)[columns])

    @cache  # noqa: B019
    def logits(self, i, crop):
        size = (36, 36) if crop else (32, 32)  # 32 / 0.875
        steps = [transforms.Resize(size, BICUBIC), transforms.CenterCrop(32), transforms.ToTensor()]
        steps += [transforms.Normalize(IMAGENET.mean, IMAGENET.std)]
        with torch.no_grad():
            return self.model(transforms.Compose(steps)(self.images[i])[None])[0].numpy()

    def fill(self, folder, names, ranks, crop=True, columns=slice(None), chosen=range(24)):
        """Save images in the folders of the classes that the classifier ranks so for them."""
        for i, rank in zip(chosen, ranks, strict=False):
            name = names[self.answers(i, crop, columns)[rank]]
            (folder / name).mkdir(parents=True, exist_ok=True)
            self.images[i].save(folder / name / f"{i}.png")


RANKS = {
    "imagenet": [0, 0, 0, 0, 1, 4, 5, 9, 500],
    "imagenet-a": [0, 0, 0, 2, 7, 50, 60],
    "imagenet-r": [0, 1, 2, 3, 4, 5],
    "sketch": [0, 3, 900],
    "v2": [0, 0, 0, 4, 5, 6, 7, 800],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread):
    world = World(tmp_path_factory.mktemp("robustness"))
    for name, ranks in RANKS.items():
        names, columns = SYNSETS, slice(None)
        if name in ("imagenet-a", "imagenet-r"):
            names = robustness.timm_list(f"{name.replace('-', '_')}_synsets.txt")
            columns = [SYNSETS.index(synset) for synset in names]
        if name == "v2":
            names = [str(number) for number in range(1000)]
        world.fill(world.root / name, names, ranks, columns=columns)
    sensitive = [i for i in range(24) if world.answers(i)[0] != world.answers(i, crop=False)[0]]
    assert len(sensitive) > 1  # to the crop, which c has not
    for corruption in robustness.ALEXNET:
        for severity in range(1, 6):
            right = {"snow": 2, "fog": 1}.get(corruption, 0) if severity < 3 else 0
            ranks = [0] * right + [3] * (2 - right)
            world.fill(world.root / "c" / corruption / str(severity), SYNSETS, ranks, crop=False, chosen=sensitive)
    return world


@pytest.fixture(scope="module")
def results(world):
    """Return the results of all sets from one run of the script."""
    words = [world.checkpoint, *QUIET, "--data", *(f"{name}={world.root / name}" for name in (*RANKS, "c"))]
    robustness.main(robustness.get_args_parser().parse_args([str(word) for word in words]))
    return json.loads((world.root / "tiny.robustness.json").read_text())["results"]


@pytest.mark.parametrize("name", RANKS)
def test_accuracies(results, name):
    """They follow from the ranks of the images, also among a part of the classes; folders are sorted by number."""
    ranks = np.array(RANKS[name])
    row = results[name]
    assert row["images"] == len(ranks)
    assert row["acc1"] == pytest.approx(100 * (ranks == 0).mean())
    assert row["acc5"] == pytest.approx(100 * (ranks < 5).mean())
    assert row["interval"] == pytest.approx(wilson((ranks == 0).sum(), len(ranks)))


def test_corruption_error(results):
    """AlexNet's errors on fog and snow are 81.9324 and 86.6816 %; each severity has two of ten images."""
    row = results["c"]
    assert row["images"] == 150
    assert row["acc1"] == pytest.approx(100 * (4 + 2) / 150)
    assert row["acc5"] == 100
    relative = {c: 100 / robustness.ALEXNET[c] for c in robustness.ALEXNET}
    relative |= {"snow": (100 - 40) / 86.6816, "fog": (100 - 20) / 81.9324}
    assert row["mce"] == pytest.approx(100 * np.mean(list(relative.values())))
    assert row["parts"]["fog 1"]["acc1"] == 50


def test_alexnet_errors():
    """Hendrycks & Dietterich list them rounded: noise 88.6 89.4 92.3, and so on."""
    rounded = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7]
    assert list(robustness.ALEXNET.values()) == pytest.approx(rounded, abs=0.051)


def test_wilson():
    """Newcombe 1998, table 1: 81 of 263, and 0 of 20."""
    assert wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.005)
    assert wilson(0, 20) == pytest.approx((0, 16.11), abs=0.005)


def test_real_labels(world, tmp_path, run_script):
    """Several labels are right, images without one are left out, names of folders are ignored."""
    hits, number = [], {n for n, classes in enumerate(REAL) if classes}
    for i, image in enumerate(world.images[:8]):
        answers = world.answers(i)
        rank = [0, 0, 3, 20][i % 4]
        chosen = min(n for n in number if answers[rank] in REAL[n] and not set(REAL[n]) & set(answers[:rank]))
        number.remove(chosen)
        hits.append(rank)
        path = tmp_path / "val" / "any" / f"ILSVRC2012_val_{chosen + 1:08}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    world.images[9].save(tmp_path / "val" / "any" / "ILSVRC2012_val_00000001.png")  # has no label
    assert not REAL[0]
    words = [world.checkpoint, *QUIET, "--data", f"real={tmp_path / 'val'}", "--output", tmp_path / "out.json"]
    run_script(robustness, *words)
    row = json.loads((tmp_path / "out.json").read_text())["results"]["real"]
    hits = np.array(hits)
    assert (row["images"], row["acc1"], row["acc5"]) == (8, 100 * (hits == 0).mean(), 100 * (hits < 5).mean())


def test_two_images_of_one_number(world, tmp_path, run_script, capsys):
    for name in ("a/ILSVRC2012_val_00000002.png", "b/ILSVRC2012_val_00000002.png"):
        (tmp_path / "val" / name).parent.mkdir(parents=True)
        world.images[0].save(tmp_path / "val" / name)
    message = r"b/ILSVRC2012_val_00000002\.png: 1 images have the number of another one"
    assert_mistake(run_script, capsys, message, world.checkpoint, "--data", f"real={tmp_path / 'val'}")


def test_outputs_are_matched_by_name(world, results, tmp_path, run_script, capsys):
    """The order of a classifier's outputs changes no result; a classifier with other classes is refused."""
    content = torch.load(world.checkpoint, weights_only=False)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    for part in ("weight", "bias"):
        content["model"][f"head.{part}"] = content["model"][f"head.{part}"][order]
    content["class_names"] = [SYNSETS[position] for position in order]
    torch.save(content, tmp_path / "named.pth")
    words = [*QUIET, "--data", *(f"{name}={world.root / name}" for name in ("imagenet", "imagenet-a", "v2"))]
    run_script(robustness, tmp_path / "named.pth", *words)
    found = json.loads((tmp_path / "named.robustness.json").read_text())
    assert found["class_names"] == SYNSETS
    assert found["results"].keys() == {"imagenet", "imagenet-a", "v2"}
    for name, row in found["results"].items():
        assert row == {**results[name], "loss": pytest.approx(results[name]["loss"], rel=1e-5)}
    assert "does not name its classes" not in capsys.readouterr().out
    content["class_names"][3] = "cat"
    torch.save(content, tmp_path / "other.pth")
    message = "other.pth has other classes than ImageNet's synsets: "
    assert_mistake(run_script, capsys, message, tmp_path / "other.pth", *words[len(QUIET) :])


def test_what_is_left_out_is_said(world, tmp_path, run_script, capsys):
    shutil.copytree(world.root / "c", tmp_path / "c")
    (tmp_path / "c" / "saturate" / "1").mkdir(parents=True)
    (tmp_path / "c" / "fog" / "6").mkdir()
    words = [world.checkpoint, *QUIET, "--output", tmp_path / "out.json"]
    run_script(robustness, *words, "--data", f"c={tmp_path / 'c'}", f"imagenet-r={world.root / 'imagenet-r'}")
    out = capsys.readouterr().out
    assert "tiny.pth does not name its classes: ImageNet's in the order of their synsets are assumed" in out
    assert "c: 2 files or folders are no part of mCE and left out: fog/6, saturate\n" in out
    folders = len(list((world.root / "imagenet-r").iterdir()))
    assert f"imagenet-r: up to {200 - folders} of its 200 classes have no image\n" in out
    assert re.search(r"c: up to 99[89] of its 1000 classes have no image in 75 of 75 folders\n", out)


def test_loss_of_a_set_of_labels():
    """It is minus the log of their summed probability; a broken image has no loss."""
    logits = torch.randn(3, 7)
    classes = torch.tensor([[1, -1], [2, 5], [0, -1]])
    hits, loss = robustness.score_sets(classes, logits, torch.tensor([1, -1, 0]))
    p = logits.double().softmax(dim=1).numpy()
    assert loss.item() == pytest.approx(-np.log(p[0, 2] + p[0, 5]) - np.log(p[2, 1]), rel=1e-5)
    best = np.argsort(-p, axis=1)[:, :5]
    want = [[c in (2, 5) for c in best[0]], [False] * 5, [c == 1 for c in best[2]]]
    assert hits.tolist() == want


def test_an_image_counts_once_among_five():
    """Even if several of its labels are among them."""
    loader = Batches([torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]]), torch.tensor([0, 1])])
    loader.sampler.distributed = False
    score = partial(robustness.score_sets, torch.tensor([[1, 2, 4], [0, -1, -1]]))
    result = evaluate(torch.nn.Identity(), loader, torch.device("cpu"), Log(), score=score)
    assert (result["acc1"], result["acc5"], result["images"]) == (0, 50, 2)


def test_broken_images(world, tmp_path, run_script, capsys):
    shutil.copytree(world.root / "sketch", tmp_path / "sketch")
    broken = tmp_path / "sketch" / SYNSETS[0] / "broken.png"
    broken.parent.mkdir(exist_ok=True)
    broken.write_bytes(b"")
    words = [world.checkpoint, *QUIET, "--data", f"sketch={tmp_path / 'sketch'}", "--output", tmp_path / "out.json"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(robustness, *words)
    assert exit_info.value.code == 1
    assert str(broken) in capsys.readouterr().err
    run_script(robustness, *words, "--eval_bad", "wrong")
    row = json.loads((tmp_path / "out.json").read_text())["results"]["sketch"]
    assert (row["images"], row["broken"], row["acc1"], row["acc5"]) == (4, 1, 25, 50)
    assert "| sketch | 25.00 % (4.56 to 69.94) | 50.00 % | 4, 1 of them broken |  |" in capsys.readouterr().out


def test_broken_images_of_corruptions():
    part = {"acc1": 50.0, "acc5": 75.0, "images": 8}
    parts = {f"{c} {s}": dict(part) for c in robustness.ALEXNET for s in robustness.SEVERITIES}
    about = {title: robustness.Part(None, corruption=title[:-2], severity=title[-1]) for title in parts}
    assert "broken" not in robustness.result_of(about, parts, True)
    parts["fog 3"]["broken"], parts["snow 1"]["broken"] = 2, 1
    row = robustness.result_of(about, parts, True)
    assert row["broken"] == 3
    assert robustness.cells(row)[2] == "600, 3 of them broken"
    parts["fog 1"]["nonfinite"] = 4
    row = robustness.result_of(about, parts, True)
    assert row["nonfinite"] == 4
    assert robustness.cells(row)[2] == "600, 3 of them broken, 4 of them with logits that are not finite"


def test_the_output_is_checked_first(world, tmp_path, run_script, capsys):
    words = [world.checkpoint, "--data", "sketch=/nowhere", "--output"]
    assert_mistake(run_script, capsys, "--output /dev/null/x cannot be written: ", *words, "/dev/null/x")
    assert_mistake(run_script, capsys, f"--output {tmp_path} cannot be written: Is a directory", *words, tmp_path)


def test_two_processes_equal_one(world, results, tmp_path):
    words = [world.checkpoint, *QUIET, "--output", tmp_path / "two.json", "--batch_size", 2]
    words += ["--data", *(f"{name}={world.root / name}" for name in ("imagenet", "v2"))]
    output = torchrun("Evaluation/robustness.py", *words)
    together = json.loads((tmp_path / "two.json").read_text())["results"]
    for name, row in together.items():
        assert row == {**results[name], "loss": pytest.approx(results[name]["loss"], rel=1e-5)}
    assert output.count("| imagenet |") == 1


OWN = ["zebra", "a|b", "cat, dog", "ape", "bee", "c", "eel"]  # not sorted, as outputs can be


@pytest.fixture(scope="module")
def own(tmp_path_factory, one_thread):
    """A classifier of one's own classes, with a clean set, a set of few classes, and corruptions."""
    own = World(tmp_path_factory.mktemp("own"), OWN)
    own.fill(own.root / "clean", OWN, [0, 0, 0, 0, 0, 0, 1, 6])
    own.fill(own.root / "few", OWN, [0, 5])
    for name, ranks in {"dark/2": [0, 0, 3, 6], "dark/10": [1, 4, 5, 6], "salt, pepper/low": [0, 0]}.items():
        own.fill(own.root / "c" / name, OWN, ranks)
    (own.root / "c" / "readme.txt").touch()
    return own


def test_classes_of_ones_own(own, run_script, capsys):
    """Sets hold any of the classes, matched by name and answered among all; severities and corruptions as they are."""
    sets = [f"{name}={own.root / name}" for name in ("few", "c", "clean")]
    run_script(robustness, own.checkpoint, *QUIET, "--data", *sets)
    out = capsys.readouterr().out
    content = json.loads((own.root / "tiny.robustness.json").read_text())
    assert content["class_names"] == OWN
    few, c, clean = (content["results"][name] for name in ("few", "c", "clean"))
    assert (few["acc1"], few["acc5"], few["images"], few["interval"]) == (50, 50, 2, list(wilson(1, 2)))
    assert (clean["acc1"], clean["acc5"]) == (75, 87.5)
    assert c["corruptions"] == {"dark": 25, "salt, pepper": 100}
    assert (c["acc1"], c["images"], c["below_clean"]) == (62.5, 10, 12.5)
    assert c["acc5"] == (((75 + 50) / 2) + 100) / 2
    assert c["corruptions_below_clean"] == {"dark": 50, "salt, pepper": -25}
    assert "mce" not in c
    assert "c: 1 files or folders are no corruption or severity and left out: readme.txt\n" in out
    assert "few: up to 5 of its 7 classes have no image\n" in out
    assert "| corruption | top-1 | points below clean | severity 2 | severity 10 | severity low |" in out
    assert "| dark | 25.00 % | 50.00 | 50.00 % | 0.00 % |  |" in out
    assert "| salt, pepper | 100.00 % | -25.00 |  |  | 100.00 % |" in out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "sketch={root}/clean",
            "has other classes than ImageNet's synsets: .*; --data sketch is a set of ImageNet: give",
        ),
        ("other={root}/other", "other: 1 folders are no class of this set: lion"),
        ("c={root}/few", "c=.*/few: no folder is in .*; the layout is corruption/severity/class"),
        ("c={root}/none", "c=.*/none: no such folder"),
    ],
)
def test_mistakes_of_classes_of_ones_own(own, run_script, capsys, data, message):
    own.fill(own.root / "other", ["lion"] * 7, [0])
    assert_mistake(run_script, capsys, message, own.checkpoint, "--data", data.format(root=own.root))


def test_a_set_of_ones_own_of_imagenet(world, results, run_script, tmp_path, capsys):
    """It is answered among all classes, and said to be: its name may be a wrong one of a published set."""
    words = [world.checkpoint, *QUIET, "--output", tmp_path / "out.json", "--data"]
    run_script(robustness, *words, f"Sketch={world.root / 'sketch'}")
    assert "Sketch: no published set; its images are classified among all 1000 classes\n" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())["results"]["Sketch"]
    assert found["acc1"] == results["sketch"]["acc1"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("sketch=/nowhere", "--data sketch=/nowhere: no such folder"),
        ("cifar=/nowhere", "--data cifar=/nowhere: no such folder"),
        ("=/tmp", "'=/tmp' is not SET=FOLDER"),
        ("sketch", "'sketch' is not SET=FOLDER"),
        ("sketch={root}/v2", "folders are no class of this set"),
        ("v2={root}/sketch", "folders are no class of this set"),
        ("imagenet-a={root}/imagenet", "folders are no class of this set"),
        ("c={root}/sketch", r"75 folders are missing: .*gaussian_noise/1"),
        ("real={root}/sketch", "no number from 1 to 50000 follows ILSVRC2012_val_"),
        ("v2={root}/v2 v2={root}/v2", "--data names a set twice"),
    ],
)
def test_mistakes(world, run_script, capsys, data, message):
    assert_mistake(run_script, capsys, message, world.checkpoint, "--data", *data.format(root=world.root).split())


@pytest.mark.parametrize("kind", ["pretraining", "classes"])
def test_other_models(world, tmp_path, run_script, capsys, kind):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
    if kind == "pretraining":
        model = models_arm.ARMPretrain(**sizes, cluster_size=2, dec_embed_dim=64, dec_depth=1)
        content = {"model": model.state_dict(), "args": argparse.Namespace(cluster_size=2)}
    else:
        content = models_arm.ARMClassifier(**sizes, num_classes=10).state_dict()
    torch.save(content, tmp_path / "other.pth")
    message = {"pretraining": "has no classifier's head", "classes": "has 10 outputs, not the 1000"}[kind]
    words = [tmp_path / "other.pth", "--data", f"sketch={world.root / 'sketch'}"]
    assert_mistake(run_script, capsys, message, *words)


def assert_mistake(run_script, capsys, message, *words):
    with pytest.raises(SystemExit) as exit_info:
        run_script(robustness, *words, *QUIET)
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("robustness.py: error: ")

    assert re.search(message, err), err
