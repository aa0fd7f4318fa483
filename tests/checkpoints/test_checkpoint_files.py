"""Read checkpoint files: forms that are known, and files that are refused."""

import argparse
import os
import pathlib
import re

import pytest
import torch
from checkpoint_helpers import SIZES, assert_equal_state, classifier, pretrained, write
from helpers import TINY_FINETUNE

import models_arm
from Evaluation import probe
from Finetuning import main_finetune
from pretrained import Checkpoint
from tools import export
from util.checkpoints import checkpoint_file, convert, inspection
from util.errors import UserError


class Payload:
    """Pickled code: loading it unsafely would create the file `target`."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_namespace_is_read(tmp_path):
    args = argparse.Namespace(model="arm_base_pz16", input_size=224, cutmix_minmax=None)
    path = write(tmp_path / "c.pth", {"model": {"w": torch.ones(2)}, "args": args, "epoch": 3})
    content = checkpoint_file.read(path)
    assert content["args"] == args
    assert content["epoch"] == 3


def test_other_types_are_refused_by_name_and_not_run(tmp_path):
    path = write(tmp_path / "c.pth", {"model": {}, "args": Payload(tmp_path / "made")})
    with pytest.raises(UserError, match=r"refused checkpoint .*c\.pth: it holds a posix\.mkdir"):
        checkpoint_file.read(path)
    assert not (tmp_path / "made").exists()
    path = write(tmp_path / "d.pth", {"where": pathlib.PurePosixPath("a")})
    with pytest.raises(UserError, match=r"it holds a pathlib\.(_local\.)?PurePosixPath"):
        checkpoint_file.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "unreadable|refused"), (b"not a checkpoint at all", "refused|unreadable"), (None, "no checkpoint file")],
)
def test_files_that_are_no_checkpoint(tmp_path, content, message):
    path = tmp_path / "c.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint_file.read(path)
    assert "\n" not in str(caught.value)


def test_truncated_file(tmp_path):
    path = write(tmp_path / "c.pth", {"model": {"w": torch.ones(1000)}})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="unreadable checkpoint"):
        checkpoint_file.read(path)


def test_file_of_a_list(tmp_path):
    with pytest.raises(UserError, match="holds a list, not a dict"):
        checkpoint_file.read(write(tmp_path / "c.pth", [1, 2]))


@pytest.mark.parametrize("text", ["hello", "epoch", "state", "a,b,c", "build", "(", "test\n" * 9, "\x80\x02}q\x00."])
def test_a_file_of_something_else(tmp_path, text):
    """Some begin as a pickle does, by chance."""
    (tmp_path / "c.pth").write_text(text, encoding="latin1")
    with pytest.raises(checkpoint_file.DamagedCheckpoint, match=r"c\.pth"):
        checkpoint_file.read(tmp_path / "c.pth")


def with_prefix(state, prefix, inside=""):
    return {prefix + name.replace("layers.0.", f"layers.0.{inside}"): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("prefix", "inside"),
    [
        ("_orig_mod.", ""),
        ("module._orig_mod.", ""),
        ("_orig_mod.module.", ""),
        ("", "_orig_mod."),
        ("module.", "_orig_mod."),
    ],
)
def test_names_of_wrapped_models(tmp_path, prefix, inside):
    """torch.compile of the model or of a block, inside and outside of DistributedDataParallel."""
    state = classifier().state_dict()
    content = checkpoint_file.read(write(tmp_path / "c.pth", {"model": with_prefix(state, prefix, inside)}))
    assert_equal_state(inspection.weights(content), state)
    with pytest.raises(UserError, match="two tensors of one name"):
        inspection.weights({"model": {**state, "module.head.bias": torch.ones(3)}})


def test_files_of_timms_train(tmp_path):
    """Its names of both sets of weights, and its input size with the colour channels."""
    state = classifier().state_dict()
    ema = {name: value + 1 for name, value in state.items()}
    args = argparse.Namespace(input_size=[3, 48, 32], model="x", opt_kwargs={"a": [1]}, resume=None)
    content = checkpoint_file.read(
        write(tmp_path / "c.pth", {"state_dict": state, "state_dict_ema": ema, "epoch": 3, "args": args})
    )
    assert checkpoint_file.weight_keys(content) == ["model", "model_ema"]
    assert_equal_state(inspection.weights(content), state)
    assert_equal_state(inspection.weights(content, "model_ema"), ema)
    assert inspection.saved_size(content) == (48, 32)
    assert inspection.saved_arguments(content) == {"input_size": [48, 32], "model": "x", "resume": None}


def test_ignored_keys(tmp_path, caplog):
    """As RoMA's: ARM's architecture and one parameter more."""
    state = pretrained().state_dict()
    extra = {"angle_embed": torch.ones(1, 24, 32), "layers.0.mixer.angle": torch.ones(2)}
    path = write(tmp_path / "c.pth", {"model": with_prefix({**state, **extra}, "module.")})
    args = argparse.Namespace(input_size=[48, 32])
    with pytest.raises(UserError, match=r"unexpected angle_embed, layers\.0\.mixer\.angle \(--ignore_keys"):
        convert.load(pretrained(), inspection.weights(checkpoint_file.read(path)))
    with caplog.at_level("INFO"):
        content = checkpoint_file.read(path, ["angle_embed", "*.angle"])
    assert f"{path}: 2 keys are ignored: angle_embed, layers.0.mixer.angle" in caplog.messages
    assert_equal_state(inspection.weights(content), state)
    assert not Checkpoint("c.pth", {**content, "args": args}).load_into(classifier())
    with pytest.raises(UserError, match=r"--ignore_keys \*nothing: \S+c\.pth has no such key"):
        checkpoint_file.read(path, ["angle_embed", "*nothing"])
    bare = checkpoint_file.read(write(tmp_path / "d.pth", {**state, **extra}), ["*angle*"])
    assert_equal_state(inspection.weights(bare), state)


def test_scripts_that_read_a_checkpoint(tmp_path, image_folder, run_script, capsys, caplog):
    """Each leaves out the keys that it is told to, and refuses weights that are not finite, with one line."""
    state = models_arm.create_classifier("arm_tiny_pz16", img_size=(48, 32), num_classes=3, **SIZES).state_dict()
    args = argparse.Namespace(input_size=[48, 32], global_pool=True)
    extra = write(tmp_path / "extra.pth", {"model": {**state, "angle_embed": torch.ones(3)}, "args": args})
    nan = write(tmp_path / "nan.pth", {"model": {**state, "head.bias": torch.full((3,), torch.nan)}, "args": args})
    evaluate = [*TINY_FINETUNE, "--depth", 2, "--batch_size", 4, "--data_path", image_folder]
    probe_args = ["--probe", "linear", "--data_path", image_folder, "--cache", tmp_path / "cache"]
    for script, words in (
        (main_finetune, lambda path: [*evaluate, "--eval", "--resume", path]),
        (main_finetune, lambda path: [*evaluate, "--epochs", 1, "--output_dir", tmp_path / "out", "--finetune", path]),
        (export, lambda path: [path, "--to", "safetensors", "--output", tmp_path / "out.safetensors"]),
        (probe, lambda path: [path, *probe_args, "--device", "cpu", "--num_workers", 0]),
    ):
        for path, message in ((extra, "unexpected angle_embed"), (nan, "weights that are not finite .*: head.bias")):
            with pytest.raises(SystemExit) as caught:
                run_script(script, *words(path))
            assert caught.value.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert re.search(message, line)
    with caplog.at_level("INFO"):
        run_script(main_finetune, *evaluate, "--eval", "--resume", extra, "--ignore_keys", "angle_*")
    assert f"{extra}: 1 keys are ignored: angle_embed" in caplog.messages
    assert "model: top-1 " in capsys.readouterr().out
    run_script(
        export, extra, "--to", "safetensors", "--output", tmp_path / "out.safetensors", "--ignore_keys", "angle_*"
    )
    with pytest.raises(SystemExit):
        run_script(main_finetune, *evaluate, "--output_dir", tmp_path / "new", "--resume", "auto", "--ignore_keys", "x")
    assert "--ignore_keys is for --finetune and --eval" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script(main_finetune, *evaluate, "--embed_dim", 64, "--eval", "--resume", extra, "--ignore_keys", "angle_*")
    assert "the checkpoint has 32 channels and 2 blocks, the model 64 and 2" in capsys.readouterr().err
