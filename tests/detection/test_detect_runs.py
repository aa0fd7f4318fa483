"""Runs of main_detect.py: two processes equal one, resuming is exact, evaluation, and what users get wrong."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import read_log, torchrun
from PIL import Image
from small_detector import IDS, WORDS, detector

import pretrained
from Detection import main_detect, models_detect
from Detection.detection_predict import joined_lists
from tools import predict, replay_nonfinite, visualize
from util.checkpoints import checkpoint_file
from util.errors import UserError
from util.training.run_state import Run

SCRIPT = "tests/detection/small_detector.py"
RUN = [*WORDS, "--epochs", 2, "--save_freq", 1, "--vis_freq", 0, "--scale", 0.7, 1.4, "--ema_decay", 0.5]
QUIET = "--device", "cpu", "--num_workers", 0

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(rectangles, tmp_path_factory):
    """A detector that has learned nothing, with the arguments of a run."""
    path = tmp_path_factory.mktemp("detector") / "c.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_detect, "BOX_CONVS", 1)
        patch.setattr(models_detect, "MASK_CONVS", 2)
        content = {"model": detector().eval().state_dict()}
    saved = {"input_size": [64], "mean": [0.5] * 3, "std": [0.25] * 3, "category_ids": [*IDS.values()]}
    args = main_detect.get_args_parser().parse_args(["--data_path", "x"])
    vars(args).update(saved)
    torch.save(content | {"args": args, "class_names": [*IDS]}, path)
    return path


@pytest.fixture(scope="module")
def reference(rectangles, tmp_path_factory):
    """One process, two images at a time."""
    folder = tmp_path_factory.mktemp("reference")
    torchrun(
        SCRIPT,
        "Detection.main_detect",
        *RUN,
        "--batch_size",
        2,
        "--data_path",
        f"coco:{rectangles}",
        "--output_dir",
        folder,
        processes=1,
    )
    return folder


def test_two_processes_equal_one(rectangles, reference, tmp_path):
    """The losses, gradients and weights of all updates, and the evaluation of unequal shares."""
    words = [*RUN, "--batch_size", 1, "--data_path", f"coco:{rectangles}", "--output_dir", tmp_path]
    torchrun(SCRIPT, "Detection.main_detect", *words)
    for name in ("checkpoint-0.pth", "checkpoint-1.pth"):
        one, two = (checkpoint_file.read(folder / name) for folder in (reference, tmp_path))
        assert one["loss"] == pytest.approx(two["loss"])
        for key in ("model", "model_ema"):
            for tensor, want in one[key].items():
                assert torch.allclose(two[key][tensor], want, atol=2e-4), (name, tensor)
    for row, want in zip(read_log(tmp_path), read_log(reference), strict=True):
        assert row.keys() == want.keys()
        assert row["train_loss"] == pytest.approx(want["train_loss"], rel=1e-4)
        assert row["test_box_ap"] == pytest.approx(want["test_box_ap"], abs=0.5)


def test_a_resumed_run_equals_the_uninterrupted_one(rectangles, reference, tmp_path, run_script, monkeypatch):
    """After a signal inside an epoch: bitwise."""
    words = [*RUN, "--batch_size", 2, "--data_path", f"coco:{rectangles}", "--output_dir", tmp_path, "--resume", "auto"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    saved, save = [], Run.save

    def signalled(run, *names):
        save(run, *names)
        saved.append(names)
        if len(saved) == 1:  # after one of the two updates
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "save", signalled)
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_detect, *words, "--save_every_steps", 1)
    assert exit_info.value.code == 75
    monkeypatch.setattr(Run, "save", save)
    run_script(main_detect, *words)
    for key in ("model", "model_ema"):
        one, two = (checkpoint_file.read(folder / "checkpoint-last.pth")[key] for folder in (reference, tmp_path))
        for name, tensor in one.items():
            assert torch.equal(two[name], tensor), (key, name)
    assert read_log(tmp_path) == read_log(reference)


def test_a_run_says_and_keeps_what_it_measures(reference):
    first, last = read_log(reference)
    for kind in ("test", "ema_test"):
        names = {name for name in last if name.startswith(f"{kind}_")}
        for task in ("box", "mask"):
            assert {
                f"{kind}_{task}_ap",
                f"{kind}_{task}_ap50",
                f"{kind}_{task}_ap_small",
                f"{kind}_{task}_ap/blue",
            } <= names
    content = checkpoint_file.read(reference / "checkpoint-best.pth")
    assert content["max_accuracy"] == max(first["test_box_ap"], last["test_box_ap"])
    assert (content["class_names"], content["args"].category_ids) == (["red", "blue"], [3, 90])


def test_evaluation_of_a_checkpoint(rectangles, checkpoint, tmp_path, run_script, capsys):
    report = tmp_path / "report"
    words = ["--eval", "--resume", checkpoint, "--data_path", f"coco:{rectangles}", *QUIET, "--output", report]
    for _ in range(2):  # the second replaces the first
        run_script(main_detect, *words)
    out = capsys.readouterr().out
    assert "3 images with 3 objects of 2 classes, fitted into 64 x 64 pixels" in out
    content = json.loads((report / "report.json").read_text())
    (row,) = content["results"].values()
    assert f"model: box AP {row['box_ap']:.2f} % (50 {row['box_ap50']:.2f}" in out
    assert f"mask AP {row['mask_ap']:.2f} %" in out
    found = json.loads((report / "detections-model.json").read_text())
    assert {one["image_id"] for one in found} <= {10, 11, 12}
    assert {one["category_id"] for one in found} <= {3, 90}
    assert all(one["segmentation"]["size"] in ([64, 56], [60, 62], [56, 56]) for one in found)
    lines = (report / "classes.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in lines] == [
        ["weights", "class", "objects"], ["model", "red", "2"], ["model", "blue", "1"],
    ]  # fmt: skip
    page = (report / "report.md").read_text()
    assert f"| AP | {row['box_ap']:.2f} % | {row['mask_ap']:.2f} % |" in page


def test_predictions_are_those_of_the_evaluation(rectangles, checkpoint, tmp_path, run_script):
    """Of new images in their order, with a broken one, on one process and on two; --score leaves out the rest."""
    report, root = tmp_path / "report", tmp_path / "val"
    run_script(
        main_detect, "--eval", "--resume", checkpoint, "--data_path", f"coco:{rectangles}", *QUIET, "--output", report
    )
    shutil.copytree(rectangles / "val", root)
    (root / "broken.png").write_text("no image")
    run_script(predict, checkpoint, root, *QUIET, "--output", tmp_path / "one.json")
    want = json.loads((report / "detections-model.json").read_text())
    found = json.loads((tmp_path / "one.json").read_text())
    assert len(found) == len(want) > 10
    for one, other in zip(found, want, strict=True):
        assert (one["image_id"], one["file_name"]) == (other["image_id"] - 10, str(root / f"{one['image_id']}.png"))
        assert one["category_name"] == {3: "red", 90: "blue"}[one["category_id"]]
        assert all(one[name] == value for name, value in other.items() if name not in ("image_id", "id"))
    lines = (tmp_path / "one.csv").read_text().splitlines()
    assert lines[1:4] == [f"{i},{root}/{i}.png," for i in range(3)]
    assert lines[4] == f"3,{root}/broken.png,no image of a known format"
    torchrun(SCRIPT, "tools.predict", checkpoint, root, *QUIET, "--batch_size", 1, "--output", tmp_path / "two.json")
    again = json.loads((tmp_path / "two.json").read_text())
    assert [one["image_id"] for one in again] == [one["image_id"] for one in found]
    assert np.allclose([one["bbox"] for one in again], [one["bbox"] for one in found], atol=1e-3)
    limit = float(np.median([one["score"] for one in found]))
    run_script(predict, checkpoint, root, *QUIET, "--output", tmp_path / "some.json", "--score", limit)
    some = json.loads((tmp_path / "some.json").read_text())
    assert 0 < len(some) < len(found)
    assert min(one["score"] for one in some) >= limit


def test_lists_are_joined():
    for lines, want in (([b"[1]\n", b"[]\n", b"[2, 3]\n"], [1, 2, 3]), ([b"[]\n"], []), ([], [])):
        assert json.loads(b"".join(joined_lists(lines))) == want


def test_pictures(rectangles, checkpoint, tmp_path, run_script, capsys):
    """Of files the detections alone, of a place with annotations the true objects beside them."""
    words = [checkpoint, rectangles / "train" / "0.png", f"coco:{rectangles}", "--count", 2, "--device", "cpu"]
    run_script(visualize, *words, "--score", 0.2, "--output", tmp_path)
    sheets = sorted(path.name for path in tmp_path.iterdir())
    assert sheets == ["0-sheet-2.png", "0-sheet.png", "2-sheet.png"]
    widths = {name: Image.open(tmp_path / name).width for name in sheets}
    assert widths["2-sheet.png"] > 1.5 * widths["0-sheet.png"]
    capsys.readouterr()


MISTAKES = {
    "--data_path /nowhere": "--data_path coco:/nowhere: no such folder",
    "--scale 2 0.5": "--scale: the smaller value comes first",
    "--scale 0.1 11": "11 is not at least 0 and at most 10",
    "--input_size 60": "image size 60 does not divide into patches of 8 pixels",
    "--patch_size 6": "patches of 6 pixels: the finest stride is a quarter, choose a multiple of 4",
    "--eval": "--eval needs a checkpoint",
    "--freeze 1": "--freeze 1 keeps weights as they are: --finetune says which",
    "--resume {checkpoint} --boxes_only": "detects masks: leave --boxes_only out",
    "--resume {checkpoint} --directions 1": "has weights for 4 directions, which --directions 1 cannot take",
    "--batch_size 9": "4 training images do not fill one update: batch size 9",
    "--output x": "--output is the folder for the report of --eval",
    "--loader pil": "unrecognized arguments: --loader pil",
    "--eval_bad skip": "argument --eval_bad: invalid choice",
    "--vis_freq -1": "-1 is not at least 0",
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.items())
def test_mistakes(rectangles, checkpoint, tmp_path, run_script, capsys, words, message):
    words = words.format(checkpoint=checkpoint).split()
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_detect, *RUN, "--data_path", f"coco:{rectangles}", "--output_dir", tmp_path / "out", *words)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("main_detect.py: error: ")
    assert message in line


def test_classes_that_differ(rectangles, checkpoint, tmp_path, run_script, capsys):
    """Of --finetune: the outputs are new, the rest is loaded; of --eval: refused where the detector lacks one."""
    other = shutil.copytree(rectangles, tmp_path / "other")
    for file in (other / "annotations").iterdir():
        file.write_text(file.read_text().replace('"blue"', '"green"'))
    words = [*RUN, "--epochs", 1, "--batch_size", 4, "--data_path", f"coco:{other}", "--finetune", checkpoint]
    run_script(main_detect, *words, "--output_dir", tmp_path / "out", "--lr", 0)
    out = capsys.readouterr().out
    assert "the outputs are new: the classes of" in out
    new, old = (checkpoint_file.read(path)["model"] for path in (tmp_path / "out" / "checkpoint-0.pth", checkpoint))
    outputs = "roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits."
    weights = {name for name in new if name.startswith(outputs) and name.endswith("weight")}
    assert {name for name in new if new[name].shape != old[name].shape} == set()
    assert {name for name in new if not torch.equal(new[name], old[name]) and name.endswith("weight")} == weights
    with pytest.raises(SystemExit):
        run_script(main_detect, "--eval", "--resume", checkpoint, "--data_path", f"coco:{other}", *QUIET)
    assert "objects of 1 classes that" in capsys.readouterr().err


def test_an_update_with_nonfinite_gradients_is_replayed(rectangles, checkpoint, tmp_path, run_script, capsys):
    """The run ends and keeps weights and batches, of which the tool names the first module that breaks."""
    content = checkpoint_file.read(checkpoint)
    content["model"]["backbone.layers.1.mixer.out_proj.weight"].fill_(3e38)
    torch.save(content, tmp_path / "c.pth")
    words = [*RUN, "--batch_size", 2, "--data_path", f"coco:{rectangles}", "--finetune", tmp_path / "c.pth"]
    with pytest.raises(SystemExit):
        run_script(main_detect, *words, "--output_dir", tmp_path / "out", "--max_nonfinite", 1)
    assert "the gradient was not finite in 1 updates in a row" in capsys.readouterr().err
    (folder,) = (tmp_path / "out").glob("nonfinite-*")
    with pytest.raises(SystemExit) as exit_info:
        run_script(replay_nonfinite, folder, "--device", "cpu")
    assert exit_info.value.code == 1
    assert "outputs of modules are not finite, first: backbone.layers.1" in capsys.readouterr().out


def test_a_broken_image_stops_an_evaluation_or_counts_as_without_detections(
    rectangles, checkpoint, tmp_path, run_script, capsys
):
    root = shutil.copytree(rectangles, tmp_path / "data")
    (root / "val" / "1.png").write_text("no image")
    words = ["--eval", "--resume", checkpoint, "--data_path", f"coco:{root}", *QUIET, "--output", tmp_path / "report"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_detect, *words)
    assert exit_info.value.code == 1
    assert "1.png: no image of a known format" in capsys.readouterr().err
    run_script(main_detect, *words, "--eval_bad", "wrong")
    assert "1 images broken, and so without detections" in capsys.readouterr().out
    found = json.loads((tmp_path / "report" / "detections-model.json").read_text())
    assert {one["image_id"] for one in found} == {10, 12}


def test_objects_of_val_without_masks_end_a_run_before_it_trains(rectangles, tmp_path, run_script, capsys):
    root = shutil.copytree(rectangles, tmp_path / "data")
    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_detect, *RUN, "--data_path", f"coco:{root}", "--output_dir", tmp_path / "out")
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert "masks cannot be learned; --boxes_only learns boxes" in err
    assert "epoch 0" not in out


def test_a_detector_takes_images_of_another_size(checkpoint, rectangles, tmp_path, run_script):
    """The position embedding is interpolated, as a classifier's is; everything else is as in the file."""
    model, found = pretrained.load(checkpoint, img_size=96)
    assert model.backbone.image_size == (96, 96)
    for name, value in found.state_dict.items():
        assert torch.equal(model.state_dict()[name], value) == (name != "backbone.pos_embed"), name
    words = ["--eval", "--resume", checkpoint, "--data_path", f"coco:{rectangles}", "--input_size", 96, *QUIET]
    run_script(main_detect, *words, "--output", tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["args"]["input_size"] == [96, 96]


def test_names_of_another_number_of_classes(checkpoint, tmp_path):
    content = checkpoint_file.read(checkpoint)
    torch.save(content | {"class_names": ["a", "b", "c"]}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="it has 3 class_names and another number of outputs"):
        _ = pretrained.read(tmp_path / "c.pth").class_names


@pytest.mark.filterwarnings("ignore")
def test_bfloat16(rectangles, tmp_path, run_script):
    """Boxes are decoded in float32 under autocast, and losses stay near those of float32."""
    words = [*RUN, "--epochs", 1, "--batch_size", 2, "--data_path", f"coco:{rectangles}"]
    losses = []
    for dtype in ("fp32", "bf16"):
        run_script(main_detect, *words, "--dtype", dtype, "--output_dir", tmp_path / dtype)
        losses.append(read_log(tmp_path / dtype)[0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
