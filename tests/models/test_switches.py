"""The options of pretraining and finetuning, through the scripts and all readers of their checkpoints."""

import argparse

import pytest
import torch
from helpers import TINY_FINETUNE, TINY_PRETRAIN, read_log, torchrun

import main_pretrain
import models_arm
import pretrained
from Evaluation import features, probe
from Finetuning import main_finetune
from tools import export
from util.checkpoints import checkpoint_file

RUN = "--batch_size 8 --epochs 1 --warmup_epochs 0 --save_freq 1".split()
SWITCHES = {
    "order random, normalised pixels, taps last": "--order random --norm_pix_loss --taps last --dec_depth 3",
    "order random_per_image, cluster_size 1": "--order random_per_image --cluster_size 1",
    "objective mae, order column": "--objective mae --order column --norm_pix_loss",
}


@pytest.mark.parametrize("words", SWITCHES.values(), ids=SWITCHES)
def test_a_pretraining_run(words, image_folder, tmp_path, run_script, capsys):
    """Its checkpoint is resumed and loaded, gives features and an exported encoder, and is finetuned."""
    data = ["--data_path", image_folder]
    run_script(main_pretrain, *TINY_PRETRAIN, *words.split(), *RUN, *data, "--output_dir", tmp_path)
    last = tmp_path / "checkpoint-last.pth"
    args = [*TINY_PRETRAIN, *words.split(), *RUN, *data, "--output_dir", tmp_path, "--epochs", 2]
    run_script(main_pretrain, *args, "--resume", "auto", "--allow_changed_args")
    assert "epoch 1: loss" in capsys.readouterr().out

    content = checkpoint_file.read(last)
    model = main_pretrain.build_model(content["args"]).eval()
    model.load_state_dict(content["model"])
    imgs = torch.randn(3, 3, 48, 32)
    outputs = []
    for same in (model, pretrained.load(last)[0]):
        torch.manual_seed(0)
        outputs.append(same(imgs))
    assert torch.equal(*outputs)

    args = probe.get_args_parser().parse_args([str(last), "--data_path", "x"])
    encoder = features.load_model(args, torch.device("cpu"))
    want = model.forward_features(imgs)
    assert torch.equal(encoder.forward_features(imgs), want)
    for kind in ("safetensors", "pt2"):  # which compares with what it has written
        run_script(export, "--no_measure", last, "--to", kind, "--encoder", "--output", tmp_path / f"encoder.{kind}")
    again, _ = pretrained.load(tmp_path / "encoder.safetensors", encoder=True, scan_backend="torch")
    assert torch.allclose(again.forward_features(imgs), want, atol=1e-5)  # another backend
    # with few saved arguments; of masked prediction, only the saved arguments tell the cluster size
    told = {"input_size": [48, 32], "cluster_size": model.cluster_size}
    torch.save({"model": content["model"], "args": argparse.Namespace(**told)}, tmp_path / "untold.pth")
    untold = pretrained.load(tmp_path / "untold.pth")[0]
    assert type(untold) is type(model)
    assert untold.state_dict().keys() == content["model"].keys()

    args = [*TINY_FINETUNE, *RUN, *data, "--finetune", last, "--output_dir", tmp_path / "finetune"]
    run_script(main_finetune, *args)
    assert "checkpoint-best.pth" in {path.name for path in (tmp_path / "finetune").iterdir()}


def test_two_processes_have_one_order(image_folder, tmp_path, run_script):
    """All ranks take the random order of rank 0: two processes compute the same as one."""
    words = [*TINY_PRETRAIN, *"--order random --vis_freq 0 --epochs 2 --warmup_epochs 0 --lr 1e-3".split()]
    words += ["--data_path", image_folder]
    torchrun("main_pretrain.py", *words, "--batch_size", 4, "--output_dir", tmp_path / "two")
    run_script(main_pretrain, *words, "--batch_size", 8, "--output_dir", tmp_path / "one")
    one, two = (checkpoint_file.read(tmp_path / name / "checkpoint-last.pth")["model"] for name in ("one", "two"))
    assert torch.equal(one["cluster_order"], two["cluster_order"])
    losses = [[row["train_loss"] for row in read_log(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_options_missing_in_a_file_have_the_published_values(image_folder, tmp_path, run_script, capsys):
    """A file of an earlier version is not resumed with other values."""
    data = ["--data_path", image_folder, "--output_dir", tmp_path]
    run_script(main_pretrain, *TINY_PRETRAIN, *RUN, *data)
    content = checkpoint_file.read(tmp_path / "checkpoint-last.pth")
    for name in ("order", "taps", "objective"):
        delattr(content["args"], name)
    for path in tmp_path.glob("*"):
        if path.is_file():
            path.unlink()
    torch.save(content, tmp_path / "checkpoint-last.pth")
    args = [*TINY_PRETRAIN, *RUN, *data, "--resume", "auto", "--epochs", 2]
    with pytest.raises(SystemExit) as stopped:
        run_script(main_pretrain, *args, "--order", "column", "--taps", "last")
    assert stopped.value.code == 2
    assert "epochs 1 -> 2, order row -> column, taps even -> last;" in capsys.readouterr().err


@pytest.mark.parametrize(
    "switches", [{"order": "column"}, {"order": "random_per_image"}, {"objective": "mae"}, {"taps": "last"}], ids=str
)
def test_compiled(switches):
    """Without graph breaks, with the values of eager code."""
    sizes = {"img_size": 32, "patch_size": 8, "cluster_size": 2, "embed_dim": 32, "dec_embed_dim": 64, "dec_depth": 2}
    model = models_arm.create_pretrain_model("arm_tiny_pz16", **sizes, depth=4, norm_pix_loss=True, **switches)
    imgs, losses = torch.randn(2, 3, 32, 32), []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(model(imgs))
        model.compile(backend="aot_eager", fullgraph=True)
    assert torch.allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("directions", [1, 4])
def test_finetuning_with_some_directions(directions, image_folder, tmp_path, run_script, capsys):
    """--eval and --resume build as many directions as the checkpoint has."""
    data = ["--data_path", image_folder]
    args = [*TINY_FINETUNE, *RUN, *data, "--output_dir", tmp_path, "--nb_classes", 4, "--directions", directions]
    run_script(main_finetune, *args)
    said = capsys.readouterr().out
    assert "3 classes, and 4 outputs: --nb_classes" in said
    content = checkpoint_file.read(tmp_path / "checkpoint-last.pth")
    assert len([name for name in content["model"] if name.startswith("layers.0.mixer.conv1d")]) == 2 * directions
    run_script(main_finetune, "--eval", "--resume", tmp_path / "checkpoint-last.pth", *data)
    accuracy = said[said.index("top-1") :].splitlines()[0].split(";")[0]
    assert accuracy in capsys.readouterr().out
    run_script(main_finetune, *args[:-2], "--resume", "auto", "--epochs", 2, "--allow_changed_args")
    assert "epoch 1: loss" in capsys.readouterr().out


def test_the_published_settings_are_the_defaults():
    args = main_pretrain.get_args_parser().parse_args(["--data_path", "x"])
    assert (args.order, args.taps, args.objective, args.cluster_size, args.dec_depth) == ("row", "even", "arm", 4, 4)
    with torch.device("meta"):
        model = main_pretrain.build_model(args)
    assert type(model) is models_arm.ARMPretrain
    assert (model.taps, model.cluster_order) == ([6, 8, 10, 12], None)
    del args.order, args.taps, args.objective  # as in a file of an earlier version
    with torch.device("meta"):
        assert main_pretrain.build_model(args).state_dict().keys() == model.state_dict().keys()
