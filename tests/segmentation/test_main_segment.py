"""Whole runs of segmentation on real files: training, resuming, evaluation, linear probing, mistakes."""

import csv
import json
import re

import pytest
import torch
from data_helpers import SHAPES, write_masked
from helpers import TINY_PRETRAIN, assert_one_line, read_log, torchrun
from torch.utils.tensorboard import SummaryWriter
from training_helpers import assert_same_run, final_weights

import main_pretrain
import pretrained
from models_arm import create_classifier
from Segmentation import main_segment, segment_evaluation
from Segmentation.segment_inference import Inference
from tools import export, replay_nonfinite
from util.checkpoints import checkpoint_file
from util.data.sources.mask_folder import IGNORED, open_masks

SCRIPT = "Segmentation/main_segment.py"
MODEL = "--model arm_tiny_pz16 --embed_dim 16 --depth 2 --patch_size 8 --input_size 32 --head_channels 16".split()
QUIET = "--device cpu --num_workers 0".split()
TINY = [*MODEL, *QUIET, *"--epochs 2 --warmup_epochs 0 --lr 1e-3 --save_freq 1 --vis_freq 0".split()]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory, photographs):
    """Eight images to train on and five to validate, 60 x 44."""
    return write_masked(tmp_path_factory.mktemp("masked"), photographs, train=8, val=5, size=(60, 44))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run of two epochs of four images an update, and how to start others like it."""
    folder = tmp_path_factory.mktemp("runs")

    def words(name, *more):
        return [str(w) for w in (*TINY, "--data_path", data, "--output_dir", folder / name, *more)]

    def here(name, *more):
        main_segment.main(main_segment.get_args_parser().parse_args(words(name, *more)))
        return final_weights(folder / name), read_log(folder / name)

    here.folder, here.words = folder, words
    return here


@pytest.fixture(scope="module")
def random_run(runs):
    """Drop path, dropout, EMA and pictures; a function that returns the pictures, and the run's result."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummaryWriter, "add_image", lambda _, name, image, step, **__: drawn.append((name, image, step)))
        more = ["--batch_size", 4, "--drop_path", 0.3, "--ema_decay", 0.9, "--vis_freq", 2]
        return *runs("random", *more), drawn, more


def test_a_run(random_run, runs):
    """Checkpoints, results of weights and EMA in log.txt, and pictures of evenly spaced images."""
    _, log, drawn, _ = random_run
    names = {f"{ema}test_{name}" for ema in ("", "ema_") for name in ("miou", "pixel_acc", "mean_acc", "images")}
    assert set(log[1]) == names | {"train_loss", "train_lr", "epoch", "n_parameters"}
    assert log[1]["test_images"] == 5
    content = checkpoint_file.read(runs.folder / "random" / "checkpoint-best.pth")
    assert content["max_accuracy"] == max(row["test_miou"] for row in log)
    assert (content["class_names"], content["args"].mask_values) == (SHAPES, [0, 1, 2])
    assert [(name, step) for name, _, step in drawn] == [(f"image_{i}", 2000) for i in range(3)]
    assert all(image.ndim == 3 and image.std() > 10 for _, image, _ in drawn)


def test_a_resumed_run_equals_the_uninterrupted_one(random_run, runs):
    """Bitwise, with random views, drop path, dropout and EMA."""
    state, log, _, more = random_run
    first = runs.folder / "random" / "checkpoint-0.pth"
    resumed, rows = runs("resumed", *more, "--vis_freq", 0, "--resume", first)
    assert all(torch.equal(resumed[name], value) for name, value in state.items())
    assert rows == log[1:]
    files = (runs.folder / name / "checkpoint-last.pth" for name in ("random", "resumed"))
    want, got = (checkpoint_file.read(file)["model_ema"] for file in files)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_two_processes_equal_one(runs):
    """The same images, losses and gradients, and counts that are exact."""
    plain = ["--drop_path", 0, "--head_dropout", 0]
    start = runs("start", *plain, "--batch_size", 8, "--lr", 0, "--epochs", 1)[0]
    one = runs("one", *plain, "--batch_size", 4)
    torchrun(SCRIPT, *runs.words("two", *plain, "--batch_size", 2))
    two = final_weights(runs.folder / "two"), read_log(runs.folder / "two")
    assert_same_run(two, one, start)
    assert [row["test_images"] for row in two[1]] == [5, 5]


def test_evaluation(random_run, runs, data, run_script, capsys):
    """Prints and writes what the run has logged, of weights and EMA; the same on two processes."""
    _, log, _, _ = random_run
    last = runs.folder / "random" / "checkpoint-last.pth"
    words = ["--eval", "--resume", last, "--data_path", data, *QUIET]
    capsys.readouterr()
    run_script(main_segment, *words)
    out = capsys.readouterr().out
    assert "5 images, 3 classes; windows of 32 x 32\n" in out
    for key, prefix in (("model", "test"), ("model_ema", "ema_test")):
        found = re.search(
            rf"^{key}: mIoU (\S+) %, pixel accuracy (\S+) %, mean class .* on 5 images$", out, re.MULTILINE
        )
        want = [log[-1][f"{prefix}_{name}"] for name in ("miou", "pixel_acc")]
        assert [float(x) for x in found.groups()] == pytest.approx(want, abs=0.006)
    report = json.loads((last.with_suffix(".eval") / "report.json").read_text())
    row = report["results"]["model"]
    assert (row["miou"], report["class_names"]) == (log[-1]["test_miou"], SHAPES)
    with (last.with_suffix(".eval") / "classes.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["class"] for line in lines] == 2 * SHAPES
    masks = open_masks(str(data), "val")
    counts = [sum(int((masks.read_mask(i) == label).sum()) for i in range(5)) for label in range(3)]
    assert [int(line["pixels"]) for line in lines] == 2 * counts
    torchrun(SCRIPT, *words, "--output", runs.folder / "both")
    assert json.loads((runs.folder / "both" / "report.json").read_text())["results"] == report["results"]


def test_inference_is_a_choice(random_run, runs, data, run_script, capsys):
    last = runs.folder / "random" / "checkpoint-last.pth"
    words = ["--eval", "--resume", last, "--data_path", data, *QUIET, "--model_key", "model"]
    run_script(main_segment, *words, "--inference", "whole", "--multi_scale", "--output", runs.folder / "whole")
    out = capsys.readouterr().out
    assert "whole images, scales 0.5, 0.75, 1, 1.25, 1.5, 1.75, mirrored too" in out
    assert "model_ema" not in out


def test_linear_probing_of_a_pretrained_encoder(image_folder, runs, data, tmp_path, run_script, capsys):
    """Only the head is trained; the segmenter is loaded by name, and its encoder by other scripts."""
    words = [*TINY_PRETRAIN, "--data_path", image_folder, "--output_dir", tmp_path / "pre", "--batch_size", 8]
    run_script(main_pretrain, *words, "--epochs", 1, "--warmup_epochs", 0)
    file = tmp_path / "pre" / "checkpoint-0.pth"
    words = [*QUIET, "--data_path", data, "--finetune", file, "--head", "linear", "--freeze", "all", "--epochs", 1]
    words += ["--warmup_epochs", 0, "--input_size", 48, "--batch_size", 4, "--output_dir", tmp_path / "fine"]
    capsys.readouterr()
    run_script(main_segment, *words)
    assert re.search(
        r"--freeze all: 99 of [\d,]+ parameters are trained; the class token, which is new", capsys.readouterr().out
    )
    state = final_weights(tmp_path / "fine")
    assert not [name for name in state if "pyramid" in name]
    before = checkpoint_file.read(file)["model"]
    assert torch.equal(state["backbone.layers.1.mixer.in_proj.weight"], before["layers.1.mixer.in_proj.weight"])
    model, found = pretrained.load(tmp_path / "fine" / "checkpoint-best.pth")
    assert (found.task, found.class_names, found.input_size) == ("segmentation", SHAPES, (48, 48))
    assert model(torch.zeros(1, 3, 50, 70)).shape == (1, 3, 50, 70)
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_segment, "--eval", "--resume", file, "--data_path", data, *QUIET)
    assert_one_line(capsys, exit_info, "checkpoint-0.pth comes from pretraining: --finetune it first")


def test_finetuning_a_segmenter_for_other_classes(random_run, runs, data, tmp_path, run_script, capsys):
    """All of it is taken but the outputs, which are new; those of the same classes are taken, too."""
    (tmp_path / "names").write_text("ground\ndisc\ntree\n")
    first = runs.folder / "random" / "checkpoint-0.pth"
    still = ["--batch_size", 4, "--lr", 0, "--epochs", 1, "--finetune", first, "--drop_path", 0]
    before, outputs = checkpoint_file.read(first)["model"], ("head.classifier.", "head.auxiliary.2.")
    for name, more in (("same", []), ("other", ["--classes", tmp_path / "names"])):
        after = runs(name, *still, *more)[0]
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert all(key.startswith(outputs) for key in changed)
        assert bool(changed) == (name == "other")
    assert "the outputs are new: the classes of " in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_segment, *runs.words("x", "--eval", "--resume", first, "--classes", tmp_path / "names"))
    assert_one_line(capsys, exit_info, "val has other classes than .*checkpoint-0.pth: box, tree")


class Fixed(torch.nn.Module):
    """A segmenter that answers with the first channel of an image."""

    def forward(self, imgs):
        return torch.stack([-imgs[:, 0], imgs[:, 0]], dim=1)


def batches(*pairs):
    """A loader of images and masks, one a batch."""

    class Loader(list):
        sampler = type("Sampler", (), {"distributed": True})

        def names(self, places):
            return [f"image {place}" for place in places]

    return Loader(([image], [mask]) for image, mask in pairs)


def evaluated(*pairs):
    more = {"inference": Inference((8, 8)), "names": ["a", "b"], "device": torch.device("cpu")}
    return segment_evaluation.evaluate(Fixed(), loader=batches(*pairs), log=segment_evaluation.Log(), **more)


def test_pixels_without_an_answer_are_wrong(caplog):
    """Those of an image whose logits are not finite; ignored pixels count nowhere."""
    torch.manual_seed(0)
    image = torch.randn(3, 8, 8)
    truth = (image[0] > 0).long()
    truth[:2] = IGNORED
    result = evaluated((image, truth), (image / 0 * 0, truth))
    assert (result["images"], result["nonfinite"], result["pixels"]) == (2, 1, 96)
    assert result["pixel_acc"] == result["miou"] == 50
    assert caplog.messages == ["logits that are not finite: image 1"]
    assert "on 2 images, 1 of them with logits that are not finite" in segment_evaluation.describe(result)


def test_evaluations_without_a_result():
    image, empty = torch.zeros(3, 8, 8), torch.full((8, 8), IGNORED)
    with pytest.raises(segment_evaluation.RunError, match="no pixel of the 1 masks has a class"):
        evaluated((image, empty))
    with pytest.raises(segment_evaluation.RunError, match="logits of all 1 images are not finite"):
        evaluated((image / 0, empty + 1))


def test_the_table_of_many_classes_has_both_ends():
    rows = [{"name": f"c{i}", "iou": float(i), "acc": None, "pixels": 1} for i in range(40)]
    lines = segment_evaluation.class_table(rows).splitlines()
    assert len(lines) == 2 + 15 + 1 + 15
    assert [lines[2][:6], lines[-1][:6]] == ["| c39 ", "| c0 |"]


MISTAKES = {
    "--multi_scale": "--multi_scale is for --eval",
    "--head linear": "--head_channels 16 is only for --head upernet",
    "--input_size 30": "image size 30 does not divide into patches of 8 pixels",
    "--patch_size 6 --input_size 36": "patches of 6 pixels: the finest stride is a quarter",
    "--head_channels 0": "argument --head_channels: 0 is not at least 1",
    "--head fcn": "argument --head: invalid choice: 'fcn'",
    "--max_share 0": "argument --max_share: 0 is not above 0",
    "--scale 2 0.5": "--scale: the smaller value comes first",
    "--ignore_label 70000": "argument --ignore_label: 70000 is not at least 0 and at most 65535",
    "--classes none": r"none: \[Errno 2\] No such file",
    "--data_path none": "--data_path none: no such folder",
    "--batch_size 9": "8 training images do not fill one update",
    "--freeze all": "--freeze all keeps weights as they are: --finetune says which",
    "--eval": "--eval needs a checkpoint: --resume FILE",
    "--fused_ops augment": "--fused_ops augment: it is for the images of classification",
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(data, tmp_path, run_script, capsys, words, message):
    with pytest.raises(SystemExit) as exit_info:
        run_script(
            main_segment, *TINY, "--data_path", data, "--output_dir", tmp_path, "--batch_size", 4, *words.split()
        )
    assert_one_line(capsys, exit_info, message)


def test_an_update_with_nonfinite_gradients_is_replayed(random_run, runs, run_script, capsys):
    """The run ends and keeps weights and batches, of which the tool names the first module that breaks."""
    content = checkpoint_file.read(runs.folder / "random" / "checkpoint-last.pth")
    content["model"]["backbone.layers.1.mixer.out_proj.weight"].fill_(3e38)
    torch.save(content, runs.folder / "broken.pth")
    words = runs.words("broken", "--batch_size", 4, "--finetune", runs.folder / "broken.pth", "--max_nonfinite", 1)
    with pytest.raises(SystemExit):
        run_script(main_segment, *words, "--model_key", "model")
    assert "the gradient was not finite in 1 updates in a row" in capsys.readouterr().err
    (folder,) = (runs.folder / "broken").glob("nonfinite-*")
    with pytest.raises(SystemExit) as exit_info:
        run_script(replay_nonfinite, folder, "--device", "cpu")
    assert exit_info.value.code == 1
    assert "outputs of modules are not finite, first: backbone.layers.1" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["onnx", "pt2", "safetensors"])
def test_a_segmenter_is_not_exported_as_something_else(random_run, runs, run_script, tmp_path, capsys, form):
    checkpoint = runs.folder / "random" / "checkpoint-best.pth"
    with pytest.raises(SystemExit) as exit_info:
        run_script(export, "--no_measure", checkpoint, "--to", form, "--output", tmp_path / f"x.{form}")
    assert exit_info.value.code == 2
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "error:" in row]
    assert "is of a segmenter, which is not exported: take its --encoder" in line
    assert not list(tmp_path.iterdir())


def test_the_task_of_a_file_comes_before_its_classes(data, tmp_path, run_script, capsys):
    model = create_classifier("arm_tiny_pz16", embed_dim=16, depth=2, patch_size=8, img_size=32, num_classes=2)
    torch.save({"model": model.state_dict(), "class_names": ["a", "b"]}, tmp_path / "c.pth")
    with pytest.raises(SystemExit):
        run_script(main_segment, "--eval", "--resume", tmp_path / "c.pth", "--data_path", data, *QUIET)
    assert "comes from classification: --finetune it first" in capsys.readouterr().err


def test_a_segmenter_takes_images_of_another_size(random_run, runs, data, tmp_path, run_script):
    checkpoint = runs.folder / "random" / "checkpoint-best.pth"
    model, found = pretrained.load(checkpoint, img_size=48)
    assert model.backbone.image_size == (48, 48)
    for name, value in found.state_dict.items():
        assert torch.equal(model.state_dict()[name], value) == (name != "backbone.pos_embed"), name
    words = ["--eval", "--resume", checkpoint, "--data_path", data, "--input_size", 48, *QUIET]
    run_script(main_segment, *words, "--output", tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["args"]["input_size"] == [48, 48]


def test_bfloat16(runs):
    """The loss stays near that of float32."""
    losses = [runs(dtype, "--batch_size", 4, "--dtype", dtype)[1][0]["train_loss"] for dtype in ("fp32", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
