"""Objectives: whose a parameter is, and a third objective in one file, through all scripts."""

import argparse
import importlib
import re
import sys

import pytest
import torch
from helpers import TINY_FINETUNE, TINY_PRETRAIN

import main_pretrain
import models_arm
import objectives
import pretrained
from Evaluation import probe
from Finetuning import main_finetune
from tools import export, visualize
from util.checkpoints import checkpoint_file
from util.errors import UserError

SIZES = {"embed_dim": 32, "depth": 2, "img_size": 16, "patch_size": 4, "cluster_size": 2, "dec_embed_dim": 64}
RUN = "--batch_size 8 --epochs 1 --warmup_epochs 0 --save_freq 1 --vis_freq 1".split()

# Predicts all patches from a blurred image; `gain` and `bias.weight` are parameters of its own.
THIRD = """
import torch
from torch import nn
from models_pretrain import PretrainModel


class Sharpen(PretrainModel):
    own_parameters = r"gain|bias\\..+"

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.gain = nn.Parameter(torch.ones(3 * self.patch_size**2))
        self.bias = nn.Linear(1, 3 * self.patch_size**2, bias=False)

    def predict(self, imgs):
        blurred = nn.functional.avg_pool2d(imgs, 3, stride=1, padding=1)
        queries = self.ar_token + self.dec_pos_embed
        pred = self.decode(queries, self.latents(self.embed(blurred)))
        index = torch.arange(self.num_patches, device=imgs.device)[None]
        return pred * self.gain + self.bias.weight[:, 0], index, None

    def forward(self, imgs):
        return (self.predict(imgs)[0] - self.as_target(self.patchify(imgs))).square().mean(dim=(1, 2))
"""


@pytest.fixture
def third(tmp_path, monkeypatch):
    """Register the objective "sharpen", of a file outside the repository."""
    folder = tmp_path / "objective"
    folder.mkdir()
    (folder / "sharpen.py").write_text(THIRD)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(models_arm.OBJECTIVES, "sharpen", "sharpen.Sharpen")
    yield importlib.import_module("sharpen").Sharpen
    del sys.modules["sharpen"]


def test_a_third_objective(third, image_folder, tmp_path, run_script, capsys):
    """It is pretrained, resumed, finetuned from, probed, drawn and exported, and recognised by its own parameters."""
    data, last = ["--data_path", image_folder], tmp_path / "checkpoint-last.pth"
    args = [*TINY_PRETRAIN, *RUN, *data, "--output_dir", tmp_path, "--objective", "sharpen", "--input_size", 32]
    run_script(main_pretrain, *args)
    run_script(main_pretrain, *args, "--resume", "auto", "--epochs", 2, "--allow_changed_args")
    shown = capsys.readouterr().out
    assert "objective sharpen" in shown
    assert "epoch 1: loss" in shown
    content = checkpoint_file.read(last)
    assert not torch.equal(content["model"]["gain"], torch.ones(192))

    torch.save(content["model"], tmp_path / "bare.pth")
    for file in ("checkpoint-last.pth", "bare.pth"):
        model, found = pretrained.load(tmp_path / file, cluster_size=2)
        assert type(model) is third
        assert found.options["objective"] == "sharpen"
        assert torch.equal(model.gain, content["model"]["gain"])

    run_script(main_finetune, *TINY_FINETUNE, *RUN[:-2], *data, "--finetune", last, "--output_dir", tmp_path / "tuned")
    assert (tmp_path / "tuned" / "checkpoint-best.pth").is_file()
    run_script(probe, last, *data, "--probe", "knn", "--k", 3, "--num_workers", 0, "--output", tmp_path / "probe.json",
               "--cache", tmp_path / "cache")  # fmt: skip
    picture = next((image_folder / "val").rglob("*.png"))
    run_script(visualize, last, picture, "--output", tmp_path / "sheets")
    assert len([*(tmp_path / "sheets").iterdir()]) == 1
    run_script(
        export, "--no_measure", last, "--to", "safetensors", "--encoder", "--output", tmp_path / "encoder.safetensors"
    )
    encoder, found = pretrained.load(tmp_path / "encoder.safetensors", encoder=True)
    assert found.options["objective"] == "sharpen"
    imgs = torch.randn(2, 3, 32, 32)
    model = pretrained.load(last)[0]
    assert torch.allclose(encoder.forward_features(imgs), model.forward_features(imgs), atol=1e-5)


def test_a_third_objective_is_compiled(third):
    """Without a forward_loss to compile."""
    model = models_arm.create_pretrain_model("arm_tiny_pz16", "sharpen", **SIZES, dec_depth=1)
    imgs = torch.randn(2, 3, 16, 16)
    want = model(imgs)
    model.compile(backend="aot_eager", fullgraph=True)
    assert torch.allclose(model(imgs), want, rtol=1e-5)


def test_parameters_of_an_objective_that_is_not_registered(third, tmp_path, monkeypatch):
    """They are refused by name."""
    model = models_arm.create_pretrain_model("arm_tiny_pz16", "sharpen", **SIZES, dec_depth=1)
    torch.save({"model": model.state_dict()}, tmp_path / "c.pth")
    monkeypatch.delitem(models_arm.OBJECTIVES, "sharpen")
    with pytest.raises(UserError, match=r"unexpected gain, bias\.weight \(--ignore_keys leaves keys out\)"):
        pretrained.load(tmp_path / "c.pth", cluster_size=2)
    told = {"model": model.state_dict(), "args": argparse.Namespace(objective="sharpen")}
    with pytest.raises(UserError, match=r"^c\.pth: unknown objective 'sharpen'; choose from arm, mae$"):
        pretrained.Checkpoint("c.pth", told).build()


@pytest.mark.parametrize("objective", models_arm.OBJECTIVES)
@pytest.mark.parametrize("order", ["row", "random"])
def test_every_name_has_one_owner(objective, order):
    """The encoder, the decoder, or the objective."""
    model = models_arm.create_pretrain_model("arm_tiny_pz16", objective, **SIZES, dec_depth=1, order=order)
    state_dict = model.state_dict()
    patterns = (objectives.ENCODER, objectives.DECODER, model.own_parameters)
    for name in state_dict:
        assert sum(re.fullmatch(pattern, name) is not None for pattern in patterns) == 1, name
    objectives.check_names(state_dict)
    assert ("cluster_order" in objectives.encoder_part(state_dict)) == (order == "random")
    others = [name for name in models_arm.OBJECTIVES if name != objective]
    for saved in (objective, *others, "unknown"):
        assert objectives.objective_of(state_dict, saved) == objective


@pytest.mark.parametrize("name", ["gain", "pos_embed_2", "layers", "mask_token.weight", "norm_x.weight", "ar_tokens"])
def test_foreign_names_are_refused(name):
    state_dict = models_arm.create_pretrain_model("arm_tiny_pz16", **SIZES, dec_depth=1).state_dict()
    with pytest.raises(UserError, match=rf"unexpected {re.escape(name)} \("):
        objectives.check_names(state_dict | {name: torch.zeros(1)})


def test_the_saved_objective_decides_between_equals():
    """As where the file holds the encoder only."""
    for saved in ("arm", "mae", "unknown"):
        assert objectives.objective_of({"pos_embed": torch.zeros(1)}, saved) == saved
