"""Test export.py: other programs read the files of real checkpoints and compute what the model computes."""

import json
import logging
import sys
from argparse import Namespace

import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from fork_server import run_forked
from helpers import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN, relative_error

import main_pretrain
import models_arm
from Finetuning import main_finetune
from ops import causal_conv1d as convolution
from ops import naive, selective_scan
from tools import export, export_formats
from util import cli
from util.checkpoints import checkpoint_file, inspection
from util.files import sha256_of

FORMATS = ("safetensors", "onnx", "pt2")


@pytest.fixture(scope="session")
def runs(image_folder, tmp_path_factory):
    """Return a checkpoint of pretraining, and one of finetuning (class token, with EMA) from it."""
    folder, small = tmp_path_factory.mktemp("runs"), ("--depth", 2)
    with pytest.MonkeyPatch.context() as patch:
        for script, argv in (
            (
                main_pretrain,
                [*TINY_PRETRAIN, *"--depth 2 --dec_depth 1".split(), "--output_dir", folder / "pretrained"],
            ),
            (
                main_finetune,
                [
                    *[*TINY_FINETUNE, *small, *"--ema_decay 0.9 --global_pool False --lr 0.01".split()],
                    *["--finetune", folder / "pretrained/checkpoint-last.pth", "--output_dir", folder / "finetuned"],
                ],
            ),
        ):
            more = ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 8, "--data_path", image_folder]
            patch.setattr(sys, "argv", ["script", *map(str, [*argv, *more])])
            cli.run_main(script.main, script.get_args_parser())
    return folder / "pretrained/checkpoint-last.pth", folder / "finetuned/checkpoint-last.pth"


@pytest.fixture
def imgs():
    torch.manual_seed(1)
    return torch.randn(3, 3, 48, 32)


def classifier(path, key="model"):
    model = models_arm.create_classifier(
        "arm_tiny_pz16", embed_dim=32, depth=2, patch_size=8, img_size=(48, 32), num_classes=3, global_pool=False
    )
    model.load_state_dict(torch.load(path, weights_only=False)[key])
    return model.eval()


def compute(path, imgs):
    """Return the outputs of an exported file in its own runtime, from the file alone."""
    if path.suffix == ".onnx":
        onnx.checker.check_model(onnx.load(path), full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: imgs.numpy()})[0])
    if path.suffix == ".pt2":
        with torch.no_grad():
            return torch.export.load(path).module()(imgs)
    about = json.loads(path.with_suffix(".json").read_text())
    model = timm.create_model(about["architecture"], checkpoint_path=str(path), **about["model_args"]).eval()
    return model(imgs).detach()


@pytest.mark.parametrize(
    ("kind", "key"), [("safetensors", "model"), ("safetensors", "model_ema"), ("onnx", "model"), ("pt2", "model_ema")]
)
def test_a_classifier(runs, run_script, tmp_path, imgs, kind, key, capsys):
    output = tmp_path / f"out.{kind}"
    run_script(export, "--no_measure", runs[1], "--to", kind, "--output", output, "--model_key", key)
    want = classifier(runs[1], key)(imgs).detach()
    assert relative_error(classifier(runs[1], "model")(imgs), classifier(runs[1], "model_ema")(imgs)) > 1e-2
    assert relative_error(compute(output, imgs), want) < 1e-5
    assert "read again it differs by at most" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["out.json", f"out.{kind}", f"out.{kind}.md"])
    about = json.loads((tmp_path / "out.json").read_text())
    assert (about["num_classes"], about["model_args"]["global_pool"]) == (3, "token")
    if kind == "onnx":
        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        (given,), (out,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.shape) == ("imgs", ["batch", 3, 48, 32])
        assert (out.name, out.shape) == ("logits", ["batch", 3])
    config = about["pretrained_cfg"]
    assert (config["input_size"], config["crop_pct"]) == ([3, 48, 32], 0.875)
    assert (len(config["mean"]), len(config["std"])) == (3, 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_encoder_of_a_classifier(runs, run_script, tmp_path, imgs, kind):
    output = tmp_path / f"out.{kind}"
    run_script(export, "--no_measure", runs[1], "--to", kind, "--output", output, "--encoder")
    want = classifier(runs[1]).forward_features(imgs).detach()
    if kind == "safetensors":
        assert "head.weight" not in safetensors.torch.load_file(output)
        assert relative_error(compute(output, imgs), want[:, 12]) < 1e-5  # timm pools the class token
    else:
        assert relative_error(compute(output, imgs), want) < 1e-5


@pytest.mark.parametrize("kind", FORMATS)
def test_the_encoder_of_pretraining(runs, run_script, tmp_path, imgs, kind):
    output = tmp_path / f"out.{kind}"
    run_script(export, "--no_measure", runs[0], "--to", kind, "--output", output, "--encoder")
    sizes = {"embed_dim": 32, "depth": 2, "patch_size": 8, "img_size": (48, 32), "cluster_size": 2}
    model = models_arm.create_pretrain_model("arm_tiny_pz16", dec_embed_dim=64, dec_depth=1, **sizes)
    model.load_state_dict(torch.load(runs[0], weights_only=False)["model"])
    want = model.forward_features(imgs).detach()
    assert want.shape == (3, 24, 32)
    # pretraining reads every patch but those of the last cluster
    seen = []
    model.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(imgs)
    assert relative_error(want[:, :20], seen[0]) < 1e-5
    if kind != "safetensors":
        assert relative_error(compute(output, imgs), want) < 1e-5
        return
    about = json.loads(output.with_suffix(".json").read_text())
    assert about["switches"]["cluster_size"] == 2
    again = models_arm.create_pretrain_model("arm_tiny_pz16", dec_embed_dim=64, dec_depth=1, **sizes)
    again.load_state_dict(safetensors.torch.load_file(output), strict=False)
    assert torch.equal(again.forward_features(imgs), want)
    overlay = {"file": str(output)}
    four = timm.create_model(
        about["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **about["model_args"]
    )
    assert torch.equal(four.layers[1].mixer.D_c_b, model.layers[1].mixer.D)


@pytest.mark.parametrize(("number", "words"), [(0, ["--encoder"]), (1, [])], ids=["pretraining", "classifier"])
def test_a_safetensors_file_keeps_the_options(runs, run_script, tmp_path, number, words):
    """The scripts of this repository read pooling, sizes and options of pretraining from it."""
    content = torch.load(runs[number], weights_only=False)
    content["args"].order = "column"
    torch.save(content, tmp_path / "a.pth")
    run_script(export, "--no_measure", tmp_path / "a.pth", "--to", "safetensors", *words)
    (again,) = tmp_path.glob("*.safetensors")
    _, about = export.load(
        Namespace(checkpoint=again, model_key=None, ignore_keys=(), encoder=bool(words), to="safetensors")
    )
    described = json.loads(again.with_suffix(".json").read_text())
    card = again.with_name(f"{again.name}.md")
    assert described.pop("files") == {file.name: sha256_of(file) for file in (again, card)}
    assert described.pop("training")["epochs"] == 1
    assert about.pop("training") == {}
    assert json.loads(json.dumps(about)) == described


def test_names_of_classes(runs, run_script, tmp_path):
    """timm reads them from config.json, the scripts of this repository from the file of the weights."""
    names = ["class_0", "class_1", "class_2"]
    run_script(export, "--no_measure", runs[1], "--to", "safetensors", "--output", tmp_path / "model.safetensors")
    (tmp_path / "model.json").rename(tmp_path / "config.json")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == names
    assert torch.equal(model.head.weight, torch.load(runs[1], weights_only=False)["model"]["head.weight"])
    assert inspection.class_names(checkpoint_file.read(tmp_path / "model.safetensors")) == names
    run_script(
        export, "--no_measure", runs[1], "--to", "safetensors", "--output", tmp_path / "e.safetensors", "--encoder"
    )
    assert "label_names" not in json.loads((tmp_path / "e.json").read_text())


def test_the_file_is_named_after_the_checkpoint(runs, run_script):
    run_script(export, "--no_measure", runs[1], "--to", "safetensors")
    run_script(export, "--no_measure", runs[1], "--to", "safetensors", "--encoder")
    for name in ("checkpoint-last", "checkpoint-last-encoder"):
        assert (runs[1].parent / f"{name}.safetensors").is_file()
        assert (runs[1].parent / f"{name}.json").is_file()


def test_a_released_file(run_script, tmp_path, imgs, caplog):
    """A bare state dict of a square model gets the sizes and pooling that evaluation assumes."""
    model = models_arm.create_classifier("arm_tiny_pz16", img_size=32, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with caplog.at_level(logging.INFO):
        run_script(export, "--no_measure", tmp_path / "bare.pth", "--to", "safetensors")
    guessed = "guessed: global_pool (mean of the patches), input_size (a square)"
    assert f"{tmp_path}/bare.pth does not say how it was trained; {guessed}" in caplog.messages
    about = json.loads((tmp_path / "bare.json").read_text())
    assert (about["architecture"], about["model_args"]["img_size"]) == ("arm_tiny_pz16", [32, 32])
    assert relative_error(compute(tmp_path / "bare.safetensors", imgs[:, :, :32]), model.eval()(imgs[:, :, :32])) < 1e-5


def test_a_file_that_computes_something_else(runs, run_script, tmp_path, monkeypatch, capsys):
    right = export.WRITERS["safetensors"]
    monkeypatch.setitem(export.WRITERS, "safetensors", lambda *args: lambda x: right(*args)(x) * 1.001)
    with pytest.raises(SystemExit) as end:
        run_script(export, "--no_measure", runs[1], "--to", "safetensors", "--output", tmp_path / "out.safetensors")
    assert end.value.code == 1
    assert "the exported model differs by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("missing.pth --to onnx", "no checkpoint file missing.pth"),
        ("{finetuned} --to caffe", "invalid choice: 'caffe'"),
        ("{finetuned}", "the following arguments are required: --to"),
        ("{pretrained} --to pt2", "comes from pretraining and has no head: export its --encoder"),
        ("{pretrained} --to pt2 --encoder --model_key model_ema", "the checkpoint has no model_ema"),
        ("{finetuned} --to pt2 --output out.onnx", "--output out.onnx: a file of --to pt2 ends in .pt2"),
        ("{finetuned} --to pt2 --output /nowhere/out.pt2", "/nowhere is no folder"),
    ],
)
def test_mistakes(runs, run_script, argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(export, "--no_measure", *argv.format(pretrained=runs[0], finetuned=runs[1]).split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_without_onnx(runs, run_script, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(SystemExit) as end:
        run_script(export, "--no_measure", runs[1], "--to", "onnx")
    assert end.value.code == 2
    assert "--to onnx needs onnxscript: pip install onnxscript" in capsys.readouterr().err


def test_as_a_command(runs, tmp_path):
    words = [REPOSITORY / "tools" / "export.py", "--no_measure", runs[1], "--to", "safetensors", "--output"]
    done = run_forked([*words, tmp_path / "out.safetensors"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").is_file()


def onnx_outputs(exported, path, imgs):
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: imgs.numpy()})[0])


OLD = pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="torch 2.11 converts no program with a loop and a gradient"
)


@pytest.mark.parametrize(
    "direct", [pytest.param(True, id="torch.onnx.export"), pytest.param(False, id="export_formats.program", marks=OLD)]
)
def test_with_gradients_enabled(tmp_path, imgs, direct):
    """The model that timm builds for exporters, and `export_formats.program`, need no `torch.no_grad`."""
    assert torch.is_grad_enabled()
    sizes = {"embed_dim": 32, "depth": 1, "patch_size": 8, "img_size": (48, 32), "num_classes": 3}
    model = timm.create_model("arm_tiny_pz16", exportable=True, **sizes).eval()
    assert model.layers[0].mixer.scan_backend == "export"
    want = model(imgs)
    module, args = (model, (imgs[:2],)) if direct else (export_formats.program(model, imgs[:2]), ())
    exported = torch.onnx.export(module, args, dynamo=True, verbose=False, dynamic_shapes=export_formats.any_batch())
    assert relative_error(onnx_outputs(exported, tmp_path / "model.onnx", imgs), want.detach()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ordered", [True, False])
def test_exported_ops(dtype, ordered):
    """Both ops, as torch.export records them, compute the formula in their dtype."""
    torch.manual_seed(0)
    K, B, L, D, N = 4, 2, 7, 8, 3
    order = torch.stack([torch.randperm(L) for _ in range(K)]) if ordered else None
    u, dt = torch.randn(2, K, B, L, D).to(dtype)
    B_, C_ = torch.randn(2, K, B, L, N).to(dtype)
    scanned = (u, dt, -torch.rand(K, D, N), B_, C_, torch.randn(K, D), torch.randn(K, D))
    convolved = (u[0], torch.randn(K, D, 4), torch.randn(K, D))

    class Ops(torch.nn.Module):
        def forward(self, scanned, convolved):
            return selective_scan(*scanned, order, "export"), convolution(*convolved, order, "export")

    torch._dynamo.reset()
    got = torch.export.export(Ops(), (scanned, convolved)).module()(scanned, convolved)
    want = naive.selective_scan(*scanned, order), naive.causal_conv1d(*convolved, order)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert relative_error(g.double(), w.double()) < tolerance
