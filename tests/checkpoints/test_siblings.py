"""Files of methods that build on ARM: names, shapes and containers as in their public code.

RoMA (github.com/MiliLab/RoMA, RoMA/models_mamba.py, misc.py): the pretraining model and `angle_embed` (1, 1, C).
CXPMRG-Bench (github.com/Event-AHU/Medical_Image_Analysis, CXPMRG_Bench_MambaXray_VL): Pretrain-B and -L are ARM's own
pretraining model; MambaXrayCLIP and later stages save what is trained of a model of images and text (`visual_encoder.`
and others) with Lightning's hyperparameters.
"""

import argparse
import sys
import types

import numpy as np
import pytest
import torch
from checkpoint_helpers import assert_equal_state, classifier, pretrained, write
from helpers import TINY_FINETUNE, read_log

import pretrained as checkpoints
from Evaluation import probe
from Finetuning import main_finetune
from tools import export, predict
from util.checkpoints import checkpoint_file, inspection
from util.errors import UserError

SQUARE = (32, 32)
ARGS = argparse.Namespace(input_size=[32, 32], norm_pix_loss=True)
BESIDE = {"text_encoder.embeddings.weight": torch.ones(4, 2), "vision_proj.weight": torch.ones(8, 32),
    "text_proj.bias": torch.ones(8), "logit_scale": torch.ones([])}  # fmt: skip


@pytest.fixture
def hyperparameters(monkeypatch):
    """Lightning's container, by the name under which it is pickled; its module is gone when the file is read."""
    kind = type("AttributeDict", (dict,), {"__module__": "lightning.fabric.utilities.data"})
    parts = kind.__module__.split(".")
    with monkeypatch.context() as patch:
        for end in range(1, len(parts) + 1):
            patch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        sys.modules[kind.__module__].AttributeDict = kind
        yield kind


def roma():
    return {**pretrained(SQUARE).state_dict(), "angle_embed": torch.ones(1, 1, 32)}


def visual():
    """The encoder of image-text training: a classifier without a head."""
    return {k: v for k, v in classifier(SQUARE).state_dict().items() if not k.startswith("head.")}


@pytest.fixture
def files(tmp_path, hyperparameters):
    model = {f"visual_encoder.{name}": value for name, value in visual().items()} | BESIDE
    config = hyperparameters(input_size=32, learning_rate=1e-4, dataset="mimic_cxr")
    return {
        "roma": write(tmp_path / "roma.pth", {"model": roma(), "epoch": 799, "args": ARGS}),
        "xray": write(tmp_path / "xray.pth", {"model": pretrained(SQUARE).state_dict(), "epoch": 100, "args": ARGS}),
        "clip": write(tmp_path / "clip.pth", {"model": model, "config": config, "epoch": 3, "step": 100}),
    }


@pytest.fixture(autouse=True)
def say_again():
    checkpoint_file.say_once.cache_clear()


def test_what_is_left_out_is_said(files, caplog):
    with caplog.at_level("INFO"):
        content = checkpoint_file.read(files["roma"])
        assert_equal_state(inspection.weights(content), pretrained(SQUARE).state_dict())
        assert "angle_embed of RoMA is left out: it marks rotated windows, which no image here has" in caplog.messages
        content = checkpoint_file.read(files["clip"])
    assert type(content["config"]) is dict
    assert content["config"]["input_size"] == 32
    caplog.clear()
    with caplog.at_level("INFO"):
        assert_equal_state(inspection.weights(content), visual())
    parts = "4 tensors are left out: text_encoder, vision_proj, text_proj, logit_scale"
    assert caplog.messages == [f"visual_encoder of a model of images and text is taken; {parts}"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**roma(), "angle_embed": torch.ones(1, 24, 32)}, "unexpected angle_embed"),
        ({**roma(), "other_embed": torch.ones(1, 1, 32)}, "unexpected other_embed"),
        ({**classifier(SQUARE).state_dict(), "angle_embed": torch.ones(1, 1, 32)}, "unexpected angle_embed"),
        ({f"visual_encoder.{k}": v for k, v in visual().items()} | {"audio.a": torch.ones(1)}, "unexpected audio.a"),
        ({f"visual_encoder.{k}": v for k, v in visual().items()} | {"visual_encoder.a": torch.ones(1)}, "unexpected a"),
        (visual(), "it has no head.weight"),
    ],
)
def test_other_names_are_refused(state, message):
    with pytest.raises(UserError, match=message):
        checkpoints.Checkpoint("c.pth", {"model": state, "args": ARGS}).load_model(img_size=SQUARE)


def test_the_encoder_of_image_text_training(files):
    model, found = checkpoints.load(files["clip"])
    assert (found.task, model.num_classes, found.input_size) == ("image-text training", 0, SQUARE)


@pytest.mark.parametrize("name", ["roma", "xray", "clip"])
def test_scripts(files, name, image_folder, tmp_path, run_script, capsys):
    """They start finetuning, give features and are probed; answers and exports need a head."""
    path, out = files[name], tmp_path / "out"
    common = ["--device", "cpu", "--num_workers", 0, "--input_size", 32]
    words = [*TINY_FINETUNE, "--depth", 2, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 8]
    run_script(main_finetune, *words, "--data_path", image_folder, "--output_dir", out, "--finetune", path)
    assert len(read_log(out)) == 1
    run_script(predict, path, image_folder / "val", "--features", "pooled", "--output", out / "f.npy", *common)
    assert np.isfinite(np.load(out / "f.npy")).all()
    run_script(probe, path, "--data_path", image_folder, "--probe", "knn", "--k", 3, "--cache", out, *common)
    capsys.readouterr()
    for script, words, remedy in (
        (predict, [image_folder / "val", "--output", out / "a.csv", *common], "--features pooled"),
        (export, ["--to", "onnx", "--output", out / "a.onnx"], "export its --encoder"),
        (main_finetune, [], "--finetune it first"),
    ):
        words = words or [*TINY_FINETUNE, "--depth", 2, "--eval", "--data_path", image_folder]
        with pytest.raises(SystemExit) as end:
            run_script(script, *([path] if script is not main_finetune else ["--resume", path]), *words)
        assert end.value.code == 2
        assert remedy in capsys.readouterr().err
