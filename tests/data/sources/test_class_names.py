"""Labels are matched by class name in evaluation, finetuning and resuming; messages where names are unknown."""

import logging
import re
import shutil
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fork_server import run_forked
from helpers import REPOSITORY, TINY_FINETUNE
from timm.data import ImageNetInfo

import models_arm
from Finetuning import main_finetune
from util.checkpoints import checkpoint_file, inspection
from util.checkpoints.checkpoint_file import say_once
from util.data.class_names import differing, known_names, match_classes, names_by_output
from util.errors import UserError
from util.training.run_state import fingerprint

RENUMBERED = "val numbers its classes differently from train: they are matched by name"
SYNSETS = ImageNetInfo().label_names()


def source(classes, labels):
    return SimpleNamespace(root="val", classes=list(classes), labels=np.array(labels))


@pytest.mark.parametrize(
    ("classes", "labels", "names", "want", "lines"),
    [
        ("abc", [0, 1, 2], "abc", [0, 1, 2], []),
        ("bc", [0, 1, 1], "abc", [1, 2, 2], [RENUMBERED,
                                            "val has images of 2 of 3 classes, none of a"]),
        ("cab", [0, 1, 2], "abc", [2, 0, 1], [RENUMBERED]),
        (["a", "", "b"], [2, 0], ["a", "b", "", ""], [1, 0],
         [RENUMBERED]),
        (["", "", ""], [1, 2, 0], "abc", [1, 2, 0], ["val does not name its classes: labels are taken as positions"]),
        (["a", ""], [0, 1], ["a", "b"], [0, 1], ["val does not name its classes: labels are taken as positions"]),
        ("abc", [1, 2, 0], ["", "", ""], [1, 2, 0], ["train does not name its classes: labels are taken as positions"]),
        (["", ""], [1], [""] * 8, [1], ["val does not name its classes: labels are taken as positions",
                                        "val has images of 1 of 8 classes, none of 0, 2, 3, 4, 5 and 2 more"]),
        (["caf\udce9"], [0], ["a", "caf\\xe9"], [1],
         [RENUMBERED,
          "val has images of 1 of 2 classes, none of a"]),
    ],
)  # fmt: skip
def test_labels_are_matched_by_class_name(classes, labels, names, want, lines):
    val = source(classes, labels)
    assert match_classes(val, list(names), "train") == lines
    assert val.labels.tolist() == want


@pytest.mark.parametrize(
    ("classes", "labels", "names", "message"),
    [
        ("abx", [0, 1, 2], "abc", "val has images of 1 classes that train does not have: x"),
        ("uvwxyz", range(6), "abc", "images of 6 classes that train does not have: u, v, w, x, y and 1 more"),
        ([""] * 4, [0, 3], "abc", "images of 1 classes that train does not have: 3"),
        ("ab", [0, 1], [""] * 3, "val has 2 classes; train has 3 and does not name them"),
        (["x", ""], [0, 1], "ab", "images of 1 classes that train does not have: x"),  # one name is unknown
    ],
)
def test_unknown_classes_are_refused(classes, labels, names, message):
    val = source(classes, list(labels))
    with pytest.raises(UserError, match=message):
        match_classes(val, list(names), "train")
    assert (val.classes, val.labels.tolist()) == (list(classes), list(labels))


def test_a_class_without_images_is_ignored():
    """A dataset may list classes of which it has no images."""
    val = source("abx", [1, 0])
    assert match_classes(val, list("ab"), "train") == []


def test_1000_outputs_without_names_are_those_of_imagenet():
    names, line = known_names([], 1000, SYNSETS[5:8], "released.pth")
    assert (names, "ImageNet's in the order of their synsets are assumed" in line) == (SYNSETS, True)
    val = source(SYNSETS[5:8], [0, 1, 2])
    match_classes(val, names, "released.pth")
    assert val.labels.tolist() == [5, 6, 7]
    for classes in ([], ["", ""]):  # without labels, or with numbers
        assert known_names([], 1000, classes, "released.pth")[0] == SYNSETS
    for outputs, classes in ((1000, ["a", "b"]), (1000, [SYNSETS[0], "a"]), (999, SYNSETS[5:8])):
        assert known_names([], outputs, classes, "released.pth") == ([""] * outputs, "")
    assert known_names(["a", "b"], 2, ["a", "b"], "own.pth") == (["a", "b"], "")


def test_difference_of_two_lists_of_names():
    assert differing(["a", "b"], ["a", "b"]) == differing([], ["a"]) == differing(["", ""], ["a", "b"]) == []
    assert differing(["a", "b", ""], ["a", "c", "d"]) == ["b", "c", "d"]
    assert differing(["a", "b"], ["b", "a"]) == ["the same names in another order"]


def test_class_names_that_are_not_utf8():
    latin = source(["caf\udce9"], [0])
    assert names_by_output(latin, 2) == ["caf\\xe9", ""]
    assert len(fingerprint(latin)) == 16
    # checkpoints store it, so it must not change
    assert fingerprint(source("ab", [0, 1])) == sha256(b"a\0b" + np.array([0, 1]).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("abc", "class_names are no list"),
        ([1, 2, 3], "class_names are no list"),
        (["a"], "it has 1 class_names"),
    ],
)
def test_damaged_class_names_in_a_checkpoint(names, message):
    model = models_arm.create_classifier(
        "arm_tiny_pz16", img_size=16, patch_size=8, embed_dim=32, depth=1, num_classes=3
    )
    with pytest.raises(UserError, match=message):
        inspection.class_names({"model": model.state_dict(), "class_names": names})
    assert inspection.class_names({"model": model.state_dict(), "class_names": ["a", "", "c"]}) == ["a", "", "c"]
    assert inspection.class_names(model.state_dict()) == []


# ---- runs

WORDS = [*TINY_FINETUNE, *"--epochs 1 --batch_size 8 --lr 0.01 --warmup_epochs 0 --reprob 0".split()]


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """A classifier of three classes."""
    folder = tmp_path_factory.mktemp("run")
    words = [*WORDS, "--data_path", image_folder, "--output_dir", folder]
    main_finetune.main(main_finetune.get_args_parser().parse_args([str(word) for word in words]))
    return folder / "checkpoint-last.pth"


def part(image_folder, folder, *classes, **renamed):
    """Return a folder with these classes in val, some of them renamed, and all classes in train."""
    for name in classes:
        shutil.copytree(image_folder / "val" / name, folder / "val" / renamed.get(name, name))
    (folder / "train").symlink_to(image_folder / "train")
    return folder


@pytest.fixture
def evaluated(run_script, capsys):
    """Evaluate a checkpoint; return the numbers of images and of correct ones, the sum of losses, and the output."""

    def evaluate(path, data, *more):
        capsys.readouterr()
        words = ["--eval", "--resume", path, "--data_path", data, "--device", "cpu", "--num_workers", 0, *more]
        run_script(main_finetune, *words)
        out = capsys.readouterr().out
        top1, loss, images = re.search(r"^\w+: top-1 ([\d.]+) %.* loss ([\d.]+) on (\d+) images$", out, re.M).groups()
        return int(images), round(float(top1) * int(images) / 100), float(loss) * int(images), out

    return evaluate


def test_val_without_some_classes(run, image_folder, tmp_path, evaluated):
    """Evaluations of the parts add up to that of the whole."""
    assert checkpoint_file.read(run)["class_names"] == ["class_0", "class_1", "class_2"]
    whole = evaluated(run, image_folder)
    assert "7 images of 3 classes" in whole[3]
    assert "none of" not in whole[3]
    first = evaluated(run, part(image_folder, tmp_path / "first", "class_0"))
    others = evaluated(run, part(image_folder, tmp_path / "others", "class_1", "class_2"))
    assert "val has images of 2 of 3 classes, none of class_0" in others[3]
    assert whole[:2] == (first[0] + others[0], first[1] + others[1])
    assert whole[2] == pytest.approx(first[2] + others[2], abs=1e-3)
    assert "4 images of 2 classes" in others[3]


def test_a_class_missing_in_the_checkpoint(run, image_folder, tmp_path, evaluated, capsys):
    data = part(image_folder, tmp_path, "class_0", "class_1", "class_2", class_1="dog")
    with pytest.raises(SystemExit) as exit_info:
        evaluated(run, data)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"val has images of 1 classes that {run} does not have: dog")


def test_a_checkpoint_without_class_names(run, image_folder, tmp_path, evaluated, capsys):
    """Positions are valid labels only if all classes are there."""
    content = checkpoint_file.read(run)
    whole = evaluated(run, image_folder)
    del content["class_names"]
    torch.save(content, tmp_path / "older.pth")
    older = evaluated(tmp_path / "older.pth", image_folder)
    assert f"{tmp_path / 'older.pth'} does not name its classes: labels are taken as positions" in older[3]
    assert older[:3] == whole[:3]
    with pytest.raises(SystemExit) as exit_info:
        evaluated(tmp_path / "older.pth", part(image_folder, tmp_path / "part", "class_1", "class_2"))
    assert exit_info.value.code == 2
    assert "val has 2 classes; " in capsys.readouterr().err


def test_options_assumed_for_a_bare_state_dict(run, image_folder, tmp_path, evaluated, caplog):
    state = checkpoint_file.read(run)["model"]
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(SystemExit):  # 24 patches do not form a square
        evaluated(tmp_path / "bare.pth", image_folder)
    for more, guessed in (([], "guessed: global_pool (mean of the patches)"), (["--cls_token"], None)):
        say_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            evaluated(tmp_path / "bare.pth", image_folder, "--input_size", 48, 32, *more)
        said = [r.getMessage() for r in caplog.records if "guessed" in r.getMessage()]
        assert said == ([f"{tmp_path}/bare.pth does not say how it was trained; {guessed}"] if guessed else [])


def test_finetuning_matches_val_by_name(run_script, image_folder, tmp_path, evaluated, capsys):
    data = part(image_folder, tmp_path / "data", "class_1", "class_2")
    run_script(main_finetune, *WORDS, "--data_path", data, "--output_dir", tmp_path / "out")
    out = capsys.readouterr().out
    assert "val has images of 2 of 3 classes, none of class_0" in out
    found = re.search(r"^epoch 0: .*(top-1 .* on 4 images)", out, re.M)[1]
    assert f"model: {found}\n" in evaluated(tmp_path / "out" / "checkpoint-last.pth", data)[3]


@pytest.mark.parametrize("kind", ["the same", "others", "number", "unnamed", "order"])
def test_the_head_is_kept_only_for_the_same_classes(run, run_script, image_folder, tmp_path, capsys, kind):
    words = [*WORDS, "--lr", 0, "--min_lr", 0, "--finetune", tmp_path / "from.pth", "--output_dir", tmp_path / "out"]
    content = checkpoint_file.read(run)
    content["model"]["head.bias"] += 1
    data, message = image_folder, f"the head is that of {tmp_path / 'from.pth'}, which has the same classes"
    if kind == "others":
        content["class_names"][1] = "dog"
        message = f"the head is new: the classes of {tmp_path / 'from.pth'} are others: class_1, dog"
    elif kind == "order":
        content["class_names"].reverse()
        message = "are others: the same names in another order"
    elif kind == "unnamed":
        del content["class_names"]
        message = f"output by output: {tmp_path / 'from.pth'} does not name its classes"
    elif kind == "number":
        words += ["--nb_classes", 4]
        message = f"the head is new: that of {tmp_path / 'from.pth'} has another number of outputs"
    torch.save(content, tmp_path / "from.pth")
    run_script(main_finetune, *words, "--data_path", data)
    assert message in capsys.readouterr().out
    after = checkpoint_file.read(tmp_path / "out" / "checkpoint-last.pth")
    kept = kind in ("the same", "unnamed")
    assert torch.equal(after["model"]["head.bias"], content["model"]["head.bias"]) == kept
    if not kept:
        assert (after["model"]["head.bias"] == 0).all()
        assert after["model"]["head.weight"].std().item() == pytest.approx(2e-5, rel=0.3)
    assert after["class_names"] == ["class_0", "class_1", "class_2", *[""] * (kind == "number")]


def test_a_run_is_not_resumed_with_other_classes(run, run_script, image_folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        shutil.copytree(image_folder / split, tmp_path / "data" / split)
        (tmp_path / "data" / split / "class_1").rename(tmp_path / "data" / split / "dog")
    words = [*WORDS, "--epochs", 2, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out"]
    for more, message in (
        ([], "--data_path .other ones, names"),
        (["--allow_changed_args"], "class_1, dog;"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_script(main_finetune, *words, "--resume", run, *more)
        assert exit_info.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_a_class_name_of_two_outputs_is_refused():
    model = models_arm.create_classifier(
        "arm_tiny_pz16", img_size=16, patch_size=8, embed_dim=32, depth=1, num_classes=3
    )
    with pytest.raises(UserError, match="its class_names hold a more than once"):
        inspection.class_names({"model": model.state_dict(), "class_names": ["a", "b", "a"]})
    assert inspection.class_names({"model": model.state_dict(), "class_names": ["", "b", ""]}) == ["", "b", ""]


def test_an_accuracy_that_cannot_be_printed_is_an_error(run, image_folder):
    """The printed accuracy is the only result of an evaluation, so a full disk behind stdout is an error."""
    words = ["--eval", "--resume", run, "--data_path", image_folder, "--device", "cpu", "--num_workers", 0]
    with open("/dev/full", "w") as full:
        done = run_forked([REPOSITORY / "Finetuning" / "main_finetune.py", *words], stdout=full)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


def test_a_position_beyond_the_epoch_is_refused(run, image_folder, run_script, tmp_path, capsys):
    """Otherwise training would end at once and report success."""
    content = torch.load(run, weights_only=False)
    torch.save(content | {"samples": 10**12 * 8}, tmp_path / "far.pth")
    words = [*WORDS, "--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as ended:
        run_script(main_finetune, *words, "--resume", tmp_path / "far.pth", "--allow_changed_args")
    assert ended.value.code == 2
    assert "was written after 8000000000000 images of its epoch, but --data_path has only 24" in capsys.readouterr().err
