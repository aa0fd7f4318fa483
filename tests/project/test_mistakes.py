"""Mistakes of a user: exit status 2 and one line on stderr, before any training."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY_FINETUNE, TINY_PRETRAIN, assert_one_line
from PIL import Image

import main_pretrain
from Finetuning import main_finetune
from util.distributed.processes import init_device
from util.errors import UserError

PRETRAIN_MISTAKES = {
    "--batch_size 0": "argument --batch_size: 0 is not at least 1",
    "--model arm_giant": r"argument --model: invalid choice: 'arm_giant' \(choose from '?arm_base_pz16",
    "--in_chans 0": "argument --in_chans: 0 is not at least 1 and at most 64",
    "--in_chans 65": "argument --in_chans: 65 is not at least 1 and at most 64",
    "--grad_checkpointing --cuda_graph": "--cuda_graph does not go together with --grad_checkpointing",
    "--input_size 40 32": r"image size 40 does not divide .* nearest: 32 or 48",
    "--input_size 1 2 3": "--input_size takes one side",
    "--dec_embed_dim 65": "decoder width 65 is not a multiple of 64",
    "--dec_depth 4": "depth 4 is too small for 4 decoder blocks",
    "--scan_backend warp": "unknown backend 'warp'",
    "--scan_backend mamba_ssm": "pip install --no-build-isolation -r requirements-cuda.txt",
    "--data_path /nowhere": "--data_path /nowhere: no such folder",
    "--fsdp": "--fsdp shards over processes, and there is one: start several with torchrun",
    "--accum_iter 25": "24 training images do not fill one update: batch size 4 x 1 processes x 25",
    "--batch_size 25": "24 training images do not fill one update: batch size 25",
    "--resume none.pth": "no checkpoint file none.pth",
    "--warmup_epochs 2": "--warmup_epochs 2 is not shorter than the run of --epochs 1: the learning rate would never",
    "--epochs 3 --warmup_epochs 3": "--warmup_epochs 3 is not shorter than the run of --epochs 3",
    "--epochs 9 --warmup_epochs 40": "--warmup_epochs 40 is not shorter than the run",
    "--start_epoch 9": "--start_epoch 9: the run has epochs 0 to 0",
    "--device cuda": "finds no GPU",
    "--unknown 1": "unrecognized arguments: --unknown 1",
    "--scale 1 0.2": "--scale: the smaller value comes first",
    "--scale 0 0": "--scale: .* the larger one must be above 0",
    "--resume=": "argument --resume: it is empty",
    "--output_dir=": "argument --output_dir: it is empty",
    "--scale 0.2 1.5": "1.5 is not at least 0 and at most 1",
    "--embed_dim 30": "encoder width 30 is not a multiple of 4",
    "--lr -1": "-1 is not at least 0",
    "--lr nan": "nan is not at least 0",
    "--lr fast": "invalid float value: 'fast'",
    "--seed -1": "-1 is not at least 0",
    "--clip_grad 0": "0 is not above 0",
    "--device meta": "--device meta: cuda and cpu are supported$",
    "--device mps": "--device mps: cuda and cpu are supported; Apple's GPUs do not compute float64, which training",
    "--log_dir /dev/null/x": "--log_dir /dev/null/x cannot be written",
    "--probe_images 8": "--probe_images is only for --probe_freq: leave it out, or give both",
}
FINETUNE_MISTAKES = {
    "--nb_classes 2": "has 3 classes, the classifier 2",
    "--finetune none.pth": "no checkpoint file none.pth",
    "--freeze 2": "--freeze 2 keeps weights as they are: --finetune says which",
    "--freeze 2 --eval --resume none.pth": "--freeze 2 is for training, and --eval trains nothing",
    "--freeze -1": "argument --freeze: -1 is not at least 0 and at most 1000",
    "--freeze some": "argument --freeze: 'some' is neither a number of blocks nor all",
    "--resume none.pth --model_key model_ema": "--model_key chooses among the weights of --finetune",
    "--eval": "--eval needs a checkpoint",
    "--output x": "--output is the folder for the report of --eval; that of a run is --output_dir",
    "--input_size 50": "image size 50 does not divide into patches of 8 pixels; nearest: 48 or 56",
    "--mixup 0.8 --batch_size 3": "need an even batch",
    "--smoothing 1": "1 is not at least 0 and at most 0.999",
    "--drop_path -1": "-1 is not at least 0 and at most 1",
    "--nb_classes -1": "-1 is not at least 1",
    "--remode foo": "invalid choice: 'foo'",
    "--aa foo": "--aa foo: ",
    "--cutmix_minmax 0.9 0.2": r"--cutmix_minmax: of \d+ pixels that is from \d+ to below \d+, which is nothing",
    "--cutmix_minmax 0.5 0.5": "which is nothing",
    "--finetune=": "argument --finetune: it is empty",
    "--ema_decay 2": "2 is not at least 0 and at most 1",
    "--layer_decay 0": "0 is not above 0 and at most 1",
    "--cutmix -1": "-1 is not at least 0",
}
MISTAKES = [(main_pretrain, TINY_PRETRAIN, *item) for item in PRETRAIN_MISTAKES.items()]
MISTAKES += [(main_finetune, TINY_FINETUNE, *item) for item in FINETUNE_MISTAKES.items()]


@pytest.mark.parametrize(("script", "tiny", "words", "message"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_mistakes(run_script, image_folder, tmp_path, capsys, script, tiny, words, message):
    if words == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    common = ["--data_path", image_folder, "--output_dir", tmp_path / "out", "--batch_size", 4, "--epochs", 1]
    with pytest.raises(SystemExit) as exit_info:
        run_script(script, *tiny, *common, *words.split())
    assert_one_line(capsys, exit_info, message)
    assert not list(tmp_path.rglob("*.pth"))


# the last, kernel_resources, chooses Triton's compiler when it is imported, and its numbers are choices
@pytest.mark.parametrize("flag", ["loader", "eval_loader"])
def test_the_fast_loader_without_its_decoder(flag, run_script, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--loader", "pil", f"--{flag}", "fast"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *TINY_FINETUNE, *words)
    assert_one_line(capsys, exit_info, f"--{flag} fast needs simplejpeg: pip install simplejpeg, or take --{flag} pil")


@pytest.mark.parametrize(
    "device", ["cuda:999", "cuda:-1", "cuda:99999999999999999999", "cuda:007", "cuda:٣", "mps", "meta", "cuda:", ""]
)
@pytest.mark.parametrize("gpus", [0, 2])
def test_devices_that_are_none(monkeypatch, run_script, capsys, tmp_path, device, gpus):
    """torch itself takes cuda:999 as device 65511."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, "--data_path", "x", "--output_dir", tmp_path, f"--device={device}")
    assert_one_line(capsys, exit_info, "--device")


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR"])
def test_a_world_size_without_torchrun(monkeypatch, run_script, capsys, tmp_path, name):
    """Some clusters set it for every container."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, "--data_path", "x", "--output_dir", tmp_path)
    assert_one_line(capsys, exit_info, "WORLD_SIZE is set, but not all that torchrun sets: .*RANK expected")


@pytest.mark.parametrize("flag", ["--output_dir", "--log_dir"])
@pytest.mark.parametrize("kind", ["file", "fifo", "loop", "device", "long", "longer"])
def test_folders_that_are_none(run_script, image_folder, tmp_path, capsys, flag, kind):
    path = (
        Path("/dev/null") if kind == "device" else tmp_path / {"long": "x" * 300, "longer": "x" * 5000}.get(kind, kind)
    )
    if kind == "file":
        path.touch()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(tmp_path / "other")
        (tmp_path / "other").symlink_to(path)
    words = ["--data_path", image_folder, "--output_dir", tmp_path / "out", flag, path]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, *words)
    reason = "File name too long" if "long" in kind else "File exists"
    assert_one_line(capsys, exit_info, f"{flag} .{{,500}} cannot be written: {reason}")


@pytest.mark.parametrize("words", [["--resume", "none"], ["--finetune", "none"], ["--data_path", "none"], ["--none"]])
def test_mistakes_whose_names_are_not_utf8(run_script, image_folder, tmp_path, capsys, words):
    *flag, name = words
    words = [*flag, os.fsdecode(name.encode() + b"\xe9\n")]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *TINY_FINETUNE, "--data_path", image_folder, "--output_dir", tmp_path / "out", *words)
    assert_one_line(capsys, exit_info, r"none\\xe9\\n")


def test_a_run_whose_names_are_not_utf8(run_script, image_folder, tmp_path, capsys):
    """It works; only TensorBoard does not take such a folder, and that is said first."""
    data, out = (os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/d\xe9 ta", b"/o\xfft"))
    shutil.copytree(image_folder, data)
    words = [*TINY_PRETRAIN, "--data_path", data, "--output_dir", out, "--batch_size", 8, "--epochs", 1]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *words, "--warmup_epochs", 0)
    assert_one_line(capsys, exit_info, r"--log_dir .*o\\xfft: TensorBoard needs a name in UTF-8")
    assert not os.path.exists(out)
    words += ["--log_dir", tmp_path / "log", "--warmup_epochs", 0]
    run_script(main_pretrain, *words)
    run_script(main_pretrain, *words, "--resume", f"{out}/checkpoint-last.pth")
    assert "all of them done" in capsys.readouterr().out


def test_data_path_is_required(run_script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain)
    assert_one_line(capsys, exit_info, "required: --data_path")


def damaged(folder: Path, damage: str) -> None:
    if damage == "no train":
        shutil.rmtree(folder / "train")
    elif damage == "no val":
        shutil.rmtree(folder / "val")
    elif damage == "empty class":
        (folder / "train" / "class_x").mkdir()
    elif damage == "no class":
        shutil.rmtree(folder / "train")
        (folder / "train").mkdir()
    elif damage == "other classes":
        (folder / "val" / "class_2").rename(folder / "val" / "class_x")


@pytest.mark.parametrize(
    ("script", "tiny", "damage", "message"),
    [
        (main_pretrain, TINY_PRETRAIN, "no train", "it has val and no train, so images to validate with"),
        (main_pretrain, TINY_PRETRAIN, "no class", "train: no image in it"),
        (main_finetune, TINY_FINETUNE, "empty class", "no image in 1 of 4 class folders: class_x"),
        (main_finetune, TINY_FINETUNE, "no class", "Couldn't find any class folder"),
        (main_finetune, TINY_FINETUNE, "no train", "there is no folder 'train'"),
        (main_finetune, TINY_FINETUNE, "no val", "there is no folder 'val'"),
        (
            main_finetune,
            TINY_FINETUNE,
            "other classes",
            "val has images of 1 classes that .*train does not have: class_x",
        ),
    ],
)
def test_damaged_data_folder(run_script, image_folder, tmp_path, capsys, script, tiny, damage, message):
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    damaged(folder, damage)
    with pytest.raises(SystemExit) as exit_info:
        run_script(script, *tiny, "--data_path", folder, "--output_dir", tmp_path / "out", "--epochs", 1)
    assert_one_line(capsys, exit_info, message)


def test_output_folder_that_cannot_be_written(run_script, image_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_info:
        run_script(
            main_pretrain, *TINY_PRETRAIN, "--data_path", image_folder, "--output_dir", tmp_path / "file" / "out"
        )
    assert_one_line(capsys, exit_info, "--output_dir .* cannot be written: Not a directory")


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_checkpoint_that_is_foreign(run_script, image_folder, tmp_path, capsys, flag):
    path = tmp_path / "vit.pth"
    torch.save({"model": {"blocks.0.attn.qkv.weight": torch.ones(3)}}, path)
    common = ["--data_path", image_folder, "--output_dir", tmp_path / "out", "--epochs", 1]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *TINY_FINETUNE, *common, flag, path)
    assert_one_line(capsys, exit_info, "not one of ARM")


@pytest.mark.parametrize(
    ("environment", "device", "gpus", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}, None, 2, "8 processes, but 2 GPUs"),
        ({}, "cuda:2", 2, "--device cuda:2: 1 processes, 2 GPUs"),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, "cuda:1", 2, "under torchrun say --device cuda"),
    ],
)
def test_gpus_that_are_not_there(monkeypatch, environment, device, gpus, message):
    """Every process finds the mistake, before any of them waits for the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        init_device(device)


def test_backend_that_cannot_use_the_device(run_script, image_folder, tmp_path, capsys):
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--scan_backend", "cpu", "--dtype", "bf16"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, *words)
    assert_one_line(capsys, exit_info, "backend 'cpu' does not compute torch.bfloat16")


def test_images_of_any_mode_are_read(run_script, image_folder, tmp_path):
    """Grey, palette and alpha images train like the others."""
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (40, 30)).save(folder / "train" / "class_0" / f"mode_{mode}.png")
    run_script(
        main_pretrain, *TINY_PRETRAIN, "--data_path", folder, "--output_dir", tmp_path / "out", "--epochs", 1,
        "--batch_size", 28, "--warmup_epochs", 0,
    )  # fmt: skip
    assert (tmp_path / "out" / "checkpoint-0.pth").exists()
