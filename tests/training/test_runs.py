"""Whole runs of both scripts on real files: training, checkpoints, resuming, evaluation, curves."""

import argparse
import fcntl
import json
import math
import os
import pty
import re
import struct
import sys
import termios

import pytest
import torch
from fork_server import ForkedScript
from helpers import REPOSITORY, TINY_PRETRAIN, read_log, torchrun
from torch.utils.tensorboard import SummaryWriter
from training_helpers import FAST, FINETUNE, SCRIPTS, assert_same_run, final_weights

import main_pretrain
import models_arm
from Finetuning import main_finetune
from util.checkpoints import checkpoint_file


@pytest.fixture(scope="module", params=SCRIPTS)
def runs(request, image_folder, tmp_path_factory):
    """The same run of two epochs with 8 images an update: at once, accumulated, on two processes."""
    script, file, tiny = SCRIPTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    common = [*tiny, "--data_path", image_folder, *FAST]

    def argv(name, *more):
        return [str(w) for w in (*common, "--output_dir", folder / name, *more)]

    def here(name, *more):
        script.main(script.get_args_parser().parse_args(argv(name, *more)))
        return final_weights(folder / name), read_log(folder / name)

    torch.manual_seed(0)
    start = here("start", "--batch_size", 8, "--lr", 0)[0]
    reference = here("reference", "--batch_size", 8)
    accumulated = here("accumulated", "--batch_size", 2, "--accum_iter", 4)
    output = torchrun(file, *argv("two", "--batch_size", 4), processes=2)
    two = final_weights(folder / "two"), read_log(folder / "two")
    return argparse.Namespace(
        kind=request.param, folder=folder, start=start, reference=reference, accumulated=accumulated, two=two,
        output=output, here=here,
    )  # fmt: skip


def test_accumulation_equals_the_large_batch(runs):
    assert_same_run(runs.accumulated, runs.reference, runs.start)


def test_two_processes_equal_one(runs):
    assert_same_run(runs.two, runs.reference, runs.start)


def test_only_rank_0_prints(runs):
    assert (
        len(re.findall(r"^epoch 1  \[3/3\]  loss [\d.]+  lr [\d.e-]+  img/s \d+  left ", runs.output, re.MULTILINE))
        == 1
    )
    assert runs.output.count("processes, lr 0.001, 2 epochs") == 1


def test_resumed_run_equals_the_uninterrupted_one(runs):
    """Between epochs, bitwise: samples depend on seed, epoch and index only."""
    more = ["--batch_size", 8, "--resume", runs.folder / "reference" / "checkpoint-0.pth"]
    state, log = runs.here("resumed", *more)
    for name, value in runs.reference[0].items():
        assert torch.equal(state[name], value), name
    assert log == runs.reference[1][1:]


def test_checkpoints_hold_their_true_epoch(runs):
    """The released code writes epoch -1 into its latest file and -10 or -20 into its best ones."""
    for name, epoch in (("checkpoint-0.pth", 0), ("checkpoint-1.pth", 1), ("checkpoint-last.pth", 1)):
        content = checkpoint_file.read(runs.folder / "reference" / name)
        assert content["epoch"] == epoch
        assert content["args"].batch_size == 8


def test_log_file(runs):
    rows = runs.reference[1]
    assert [row["epoch"] for row in rows] == [0, 1]
    keys = {"train_loss", "train_lr", "epoch"}
    if runs.kind == "finetune":
        keys |= {"test_acc1", "test_acc5", "test_loss", "test_images", "n_parameters"}
    assert set(rows[0]) == keys
    last_update = 1 + 2 / 3  # of 3 updates an epoch
    low = 1e-6 if runs.kind == "finetune" else 0
    want = low + (1e-3 - low) * 0.5 * (1 + math.cos(math.pi * last_update / 2))
    assert rows[1]["train_lr"] == pytest.approx(want)
    assert list((runs.folder / "reference").glob("events.out.tfevents.*"))


def test_pretrain_finetune_evaluate(image_folder, tmp_path, run_script, capsys):
    """The path of a user: each script reads what the one before wrote; evaluation needs a checkpoint and data only."""
    common = ["--data_path", image_folder, *FAST, "--batch_size", 8]
    run_script(main_pretrain, *TINY_PRETRAIN, *common, "--output_dir", tmp_path / "pre")
    pretrained = checkpoint_file.read(tmp_path / "pre" / "checkpoint-1.pth")["model"]
    more = [
        "--finetune",
        tmp_path / "pre" / "checkpoint-1.pth",
        "--ema_decay",
        "0.5",
        "--mixup",
        "0.8",
        "--cutmix",
        "1",
    ]
    run_script(main_finetune, *FINETUNE, *common, *more, "--lr", 0, "--min_lr", 0, "--output_dir", tmp_path / "still")
    still = checkpoint_file.read(tmp_path / "still" / "checkpoint-last.pth")["model"]
    for suffix in ("", "_b", "_c", "_c_b"):  # at learning rate 0 the weights are those that were loaded
        assert torch.equal(still[f"layers.3.mixer.x_proj{suffix}.weight"], pretrained["layers.3.mixer.x_proj.weight"])
    assert still["head.weight"].std().item() == pytest.approx(2e-5, rel=0.3)

    run_script(main_finetune, *FINETUNE, *common, *more, "--output_dir", tmp_path / "fine")
    log = read_log(tmp_path / "fine")
    content = checkpoint_file.read(tmp_path / "fine" / "checkpoint-best.pth")
    best = max(log, key=lambda row: row["test_acc1"])  # the first of equals
    assert content["epoch"] == best["epoch"]
    assert content["max_accuracy"] == best["test_acc1"]  # the released code stores the accuracy before it
    content = checkpoint_file.read(tmp_path / "fine" / "checkpoint-best-ema.pth")
    best = max(log, key=lambda row: row["ema_test_acc1"])
    assert (content["epoch"], content["ema_max_accuracy"]) == (best["epoch"], best["ema_test_acc1"])

    capsys.readouterr()
    last = tmp_path / "fine" / "checkpoint-last.pth"
    run_script(
        main_finetune, "--eval", "--resume", last, "--data_path", image_folder, "--num_workers", 0, "--device", "cpu"
    )
    out = capsys.readouterr().out
    number = r"([\d.]+)"
    for key, prefix in (("model", "test"), ("model_ema", "ema_test")):
        found = re.search(rf"^{key}: top-1 {number} %, top-5 {number} %, loss {number} on 7 images$", out, re.MULTILINE)
        want = [log[-1][f"{prefix}_{name}"] for name in ("acc1", "acc5", "loss")]
        assert [float(x) for x in found.groups()] == pytest.approx(want, abs=0.006)

    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_script(
            main_finetune, "--eval", "--resume", tmp_path / "pre" / "checkpoint-1.pth", "--data_path", image_folder
        )
    assert exit_info.value.code == 2
    assert "comes from pretraining: --finetune it first" in capsys.readouterr().err


def test_evaluation_counts_every_image_once(image_folder, tmp_path, run_script, capsys):
    """7 images on 2 processes in batches of 2; a sampler that pads would count 8."""
    common = ["--data_path", image_folder, *FAST, "--batch_size", 2]
    run_script(main_finetune, *FINETUNE, *common, "--lr", 0.01, "--output_dir", tmp_path)  # no --ema_decay
    assert "model_ema" not in checkpoint_file.read(tmp_path / "checkpoint-last.pth")
    words = ["--eval", "--resume", tmp_path / "checkpoint-last.pth", "--device", "cpu", "--num_workers", 0]
    words += ["--data_path", image_folder, "--batch_size", 2]
    capsys.readouterr()
    run_script(main_finetune, *words)
    (alone,) = re.findall(r"^model: .* on 7 images$", capsys.readouterr().out, re.MULTILINE)
    for more in (["--dist_eval"], []):
        together = torchrun("Finetuning/main_finetune.py", *words, *more).splitlines()
        assert [line for line in together if line.startswith("model: ")] == [alone]


def test_evaluation_pools_as_the_checkpoint_was_finetuned(image_folder, tmp_path, run_script, capsys):
    common = ["--data_path", image_folder, *FAST, "--batch_size", 2, "--lr", 0.01]
    run_script(main_finetune, *FINETUNE, *common, "--global_pool", "False", "--output_dir", tmp_path)
    want = read_log(tmp_path)[-1]
    words = ["--eval", "--resume", tmp_path / "checkpoint-last.pth", "--data_path", image_folder, "--device", "cpu"]
    words += ["--num_workers", 0]
    losses = []
    for more in ([], ["--global_pool", "False"], ["--global_pool", "--allow_changed_args"]):
        capsys.readouterr()
        run_script(main_finetune, *words, *more)
        out = capsys.readouterr().out
        losses.append(float(re.search(r"^model: .* loss ([\d.]+) on 7", out, re.MULTILINE)[1]))
        assert ("mean of the patches" if "--allow_changed_args" in more else "class token") in out
        assert "7 images of 3 classes, an input of 48 x 32 (square); 3 outputs, 4 directions, " in out
        assert "guessed" not in out
    assert losses[0] == losses[1] == pytest.approx(want["test_loss"], abs=6e-5)
    assert losses[2] != losses[0]
    for more, message in (
        (["--global_pool"], "was trained with --global_pool False, and --global_pool True is another model; --allow"),
        (["--directions", 1], "has weights for 4 directions, which --directions 1 cannot take"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_script(main_finetune, *words, *more)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


RANDOM = ["--drop_path", 0.3, "--mixup", 0.8, "--cutmix", 1, "--reprob", 0.5, "--ema_decay", 0.9]


def test_resume_with_random_augmentation(image_folder, tmp_path, run_script):
    """Drop path, mixup, erasing and EMA are as in the uninterrupted run, bitwise."""
    common = [*FINETUNE, "--data_path", image_folder, *FAST, "--batch_size", 8, *RANDOM]
    run_script(main_finetune, *common, "--output_dir", tmp_path / "reference")
    first = tmp_path / "reference" / "checkpoint-0.pth"
    run_script(
        main_finetune, *common, "--output_dir", tmp_path / "resumed", "--resume", first, "--finetune", "gone.pth"
    )
    want, got = (checkpoint_file.read(tmp_path / name / "checkpoint-last.pth") for name in ("reference", "resumed"))
    for key in ("model", "model_ema"):
        for name, value in want[key].items():
            assert torch.equal(got[key][name], value), (key, name)
    assert got["ema_max_accuracy"] == want["ema_max_accuracy"]


def test_resume_does_not_drop_or_invent_an_ema(image_folder, tmp_path, run_script, capsys):
    common = [*FINETUNE, "--data_path", image_folder, *FAST, "--batch_size", 8]
    run_script(main_finetune, *common, "--output_dir", tmp_path / "with", "--ema_decay", 0.9)
    run_script(main_finetune, *common, "--output_dir", tmp_path / "without")
    capsys.readouterr()
    changed = [*common, "--output_dir", tmp_path, "--allow_changed_args"]
    with pytest.raises(SystemExit):
        run_script(main_finetune, *changed, "--resume", tmp_path / "with" / "checkpoint-0.pth")
    assert "holds an EMA: resume with --ema_decay" in capsys.readouterr().err
    more = ["--resume", tmp_path / "without" / "checkpoint-0.pth", "--ema_decay", 0.9]
    run_script(main_finetune, *changed, *more)
    assert "holds no EMA: the EMA starts from the weights" in capsys.readouterr().out
    assert "model_ema" in checkpoint_file.read(tmp_path / "checkpoint-last.pth")


def test_ema_of_two_processes(image_folder, tmp_path, run_script, capsys):
    """It starts from the weights of rank 0 on every process, and each scores its share with the same EMA."""
    words = [*FINETUNE, "--data_path", image_folder, *FAST, "--batch_size", 4, "--ema_decay", 0.99, "--dist_eval"]
    torchrun("Finetuning/main_finetune.py", *words, "--lr", 0.01, "--output_dir", tmp_path)
    row = read_log(tmp_path)[-1]
    words = ["--resume", tmp_path / "checkpoint-last.pth", "--data_path", image_folder, "--device", "cpu"]
    run_script(main_finetune, "--eval", *words, "--model_key", "model_ema", "--num_workers", 0)
    out = capsys.readouterr().out
    assert "model: " not in out
    loss = float(re.search(r"^model_ema: .* loss ([\d.]+) on 7", out, re.MULTILINE)[1])
    assert loss == pytest.approx(row["ema_test_loss"], abs=6e-5)


def test_bare_state_dict_is_evaluated(image_folder, tmp_path, run_script, capsys):
    torch.manual_seed(0)
    model = models_arm.create_classifier(
        "arm_tiny_pz16", img_size=48, patch_size=8, embed_dim=32, depth=2, num_classes=3
    )
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    words = ["--eval", "--finetune", tmp_path / "bare.pth", "--data_path", image_folder, "--num_workers", 0]
    run_script(main_finetune, *words, "--device", "cpu")
    assert re.search(r"^weights: top-1 .* on 7 images$", capsys.readouterr().out, re.MULTILINE)
    run_script(main_finetune, *words, "--device", "cpu", "--input_size", 64, 48)
    assert re.search(r"^weights: top-1 .* on 7 images$", capsys.readouterr().out, re.MULTILINE)


def test_pretraining_ignores_the_mixed_precision_scaler(monkeypatch, image_folder, tmp_path, run_script):
    """bf16 needs none; the released code scales all the same."""

    def scale(*_):
        raise AssertionError("the loss was scaled")

    monkeypatch.setattr(torch.amp.GradScaler, "scale", scale)
    run_script(
        main_pretrain, *TINY_PRETRAIN, "--data_path", image_folder, "--output_dir", tmp_path, "--batch_size", 8,
        "--epochs", 1,
    )  # fmt: skip
    assert (tmp_path / "checkpoint-0.pth").exists()


def test_loss_falls_on_learnable_data(image_folder, tmp_path, run_script):
    """The three classes differ in brightness: a few epochs separate them."""
    common = ["--data_path", image_folder, "--batch_size", 8, "--warmup_epochs", 1, "--epochs", 12, "--lr", 3e-3]
    more = ["--smoothing", 0, "--aa", "none", "--layer_decay", 1, "--output_dir", tmp_path]
    run_script(main_finetune, *FINETUNE, *common, *more)
    log = read_log(tmp_path)
    assert log[-1]["train_loss"] < 0.5 * log[0]["train_loss"]
    assert log[-1]["test_acc1"] == 100


def test_live_bar_on_a_terminal(image_folder, tmp_path):
    """On a terminal a bar moves, with loss, lr and img/s; no plain progress lines."""
    command = [sys.executable, REPOSITORY / "main_pretrain.py", *TINY_PRETRAIN, "--data_path", image_folder]
    command += ["--output_dir", tmp_path, "--batch_size", 8, "--epochs", 1]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = ForkedScript([str(w) for w in command], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the terminal closes with the process
        pass
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"epoch 0: 100%\|█+\| 3/3 \[[\d:]+<00:00, .*loss=[\d.]+, lr=[\d.e+-]+, img/s=\d+\]", text)
    assert "[3/3]" not in text


def test_tensorboard_points(image_folder, tmp_path, run_script, monkeypatch):
    points = []
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda self, name, value, step: points.append((name, value, step)))
    run_script(
        main_pretrain, *TINY_PRETRAIN, "--data_path", image_folder, "--output_dir", tmp_path, "--batch_size", 8, *FAST
    )
    log = read_log(tmp_path)
    losses = [(value, step) for name, value, step in points if name == "train_loss"]
    assert [value for value, _ in losses] == pytest.approx([row["train_loss"] for row in log])
    assert [step for _, step in losses] == [666, 1666]  # thousandths of epochs, at the last of 3 updates
    assert {name for name, _, _ in points} == {"train_loss", "lr", "grad_norm"}
    points.clear()
    fine = tmp_path / "fine"
    run_script(main_finetune, *FINETUNE, "--data_path", image_folder, "--output_dir", fine, "--batch_size", 8, *FAST)
    want = [(row["test_acc1"], 1000 * (row["epoch"] + 1)) for row in read_log(fine)]
    assert [(value, step) for name, value, step in points if name == "test_acc1"] == want


def test_log_txt_is_appended_to_by_a_resumed_run(image_folder, tmp_path, run_script):
    common = ["--data_path", image_folder, "--batch_size", 8, "--output_dir", tmp_path, "--save_freq", 1]
    run_script(main_pretrain, *TINY_PRETRAIN, *common, "--epochs", 1)
    run_script(main_pretrain, *TINY_PRETRAIN, *common, "--epochs", 2, "--resume", "auto", "--allow_changed_args")
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]
