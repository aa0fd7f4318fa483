"""Whole runs of both scripts on real files: what is trained, written, resumed, evaluated and shown."""

import argparse
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from helpers import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN, Batches, loop_args, read_log, torchrun
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import SummaryWriter

import main_pretrain
import models_arm
from Finetuning import engine_finetune, main_finetune
from util.checkpoints import checkpoint_file
from util.data import datasets, loaders, transforms
from util.distributed.parallel import distribute
from util.distributed.processes import end_groups
from util.errors import RunError
from util.tracking.run_log import Log, Progress
from util.training import evaluation, loop
from util.training.loop import train_epoch
from util.training.run import Run

FAST = "--warmup_epochs 0 --lr 1e-3 --epochs 2 --save_freq 1".split()
FINETUNE = [*TINY_FINETUNE, "--reprob", "0"]  # random erasing draws once per image: it would be the same, only slower
SCRIPTS = {
    "pretrain": (main_pretrain, "main_pretrain.py", [*TINY_PRETRAIN, "--norm_pix_loss"]),
    "finetune": (main_finetune, "Finetuning/main_finetune.py", FINETUNE),
}


def final_weights(folder):
    return checkpoint_file.read(folder / "checkpoint-last.pth")["model"]


def assert_same_run(folder, reference, start):
    """The runs end within 1 % of the distance that the reference has gone, and every logged loss within 1e-4.

    AdamW divides by the gradient's size, so rounding noise becomes a step where the true gradient is zero (the keys'
    bias): weights are therefore compared as one vector.
    """
    want, got, begin = (torch.cat([v.flatten() for v in w.values()]) for w in (reference[0], folder[0], start))
    finite = torch.isfinite(want)  # the mask holds -inf
    distance = (want - begin)[finite].norm()
    assert distance > 0.1
    assert (got - want)[finite].norm() < 0.01 * distance
    for row, want_row in zip(folder[1], reference[1], strict=True):
        assert row["train_loss"] == pytest.approx(want_row["train_loss"], rel=1e-4)
        assert row["train_lr"] == want_row["train_lr"]


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
    whole = here("whole", "--batch_size", 8)
    accumulated = here("accumulated", "--batch_size", 2, "--accum_iter", 4)
    output = torchrun(file, *argv("two", "--batch_size", 4), processes=2)
    two = final_weights(folder / "two"), read_log(folder / "two")
    return argparse.Namespace(
        kind=request.param, folder=folder, start=start, whole=whole, accumulated=accumulated, two=two,
        output=output, here=here,
    )  # fmt: skip


def test_accumulation_equals_the_large_batch(runs):
    assert_same_run(runs.accumulated, runs.whole, runs.start)


def test_two_processes_equal_one(runs):
    assert_same_run(runs.two, runs.whole, runs.start)


def test_rank_0_alone_speaks(runs):
    assert (
        len(re.findall(r"^epoch 1  \[3/3\]  loss [\d.]+  lr [\d.e-]+  img/s \d+  left ", runs.output, re.MULTILINE))
        == 1
    )
    assert runs.output.count("processes, lr 0.001, 2 epochs") == 1


def test_resumed_run_equals_the_uninterrupted_one(runs):
    """Between epochs, bitwise: samples depend on seed, epoch and index only."""
    more = ["--batch_size", 8, "--resume", runs.folder / "whole" / "checkpoint-0.pth"]
    state, log = runs.here("resumed", *more)
    for name, value in runs.whole[0].items():
        assert torch.equal(state[name], value), name
    assert log == runs.whole[1][1:]


def test_checkpoints_hold_their_true_epoch(runs):
    """The released code writes epoch -1 into its latest file and -10 or -20 into its best ones."""
    for name, epoch in (("checkpoint-0.pth", 0), ("checkpoint-1.pth", 1), ("checkpoint-last.pth", 1)):
        content = checkpoint_file.read(runs.folder / "whole" / name)
        assert content["epoch"] == epoch
        assert content["args"].batch_size == 8


def test_log_file(runs):
    rows = runs.whole[1]
    assert [row["epoch"] for row in rows] == [0, 1]
    keys = {"train_loss", "train_lr", "epoch"}
    if runs.kind == "finetune":
        keys |= {"test_acc1", "test_acc5", "test_loss", "test_images", "n_parameters"}
    assert set(rows[0]) == keys
    last_update = 1 + 2 / 3  # of 3 updates an epoch
    low = 1e-6 if runs.kind == "finetune" else 0
    want = low + (1e-3 - low) * 0.5 * (1 + math.cos(math.pi * last_update / 2))
    assert rows[1]["train_lr"] == pytest.approx(want)
    assert list((runs.folder / "whole").glob("events.out.tfevents.*"))


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
    alone = capsys.readouterr().out.splitlines()[-1]
    assert alone.endswith("on 7 images")
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
        assert "7 images of 3 classes, resized to 48 x 32 (square); 3 outputs, 4 directions, " in out
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


def test_resume_with_all_that_is_random(image_folder, tmp_path, run_script):
    """Drop path, mixup, erasing and EMA go on as in the uninterrupted run, bitwise."""
    common = [*FINETUNE, "--data_path", image_folder, *FAST, "--batch_size", 8, *RANDOM]
    run_script(main_finetune, *common, "--output_dir", tmp_path / "whole")
    first = tmp_path / "whole" / "checkpoint-0.pth"
    run_script(
        main_finetune, *common, "--output_dir", tmp_path / "resumed", "--resume", first, "--finetune", "gone.pth"
    )
    want, got = (checkpoint_file.read(tmp_path / name / "checkpoint-last.pth") for name in ("whole", "resumed"))
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


def test_ema_is_the_recursion_over_updates(monkeypatch):
    """Two updates of two accumulated batches each, against the formula on the weights after each update."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    history = [model.weight.detach().clone()]
    ema = ModelEmaV3(model, decay=0.9)
    follow = engine_finetune.follow
    monkeypatch.setattr(
        engine_finetune,
        "follow",
        lambda e, m, skipped: (history.append(m.weight.detach().clone()), follow(e, m, skipped)),
    )
    loader = Batches(*([torch.randn(2, 3), torch.randint(2, (2,))] for _ in range(4)))
    args = loop_args(lr=0.1, min_lr=0, accum_iter=2, batch_size=2)
    run = Run(args, model, torch.optim.AdamW(model.parameters(), fused=True), ema)
    engine_finetune.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, run, torch.device("cpu"), Log())
    assert len(history) == 3
    want = 0.9 * (0.9 * history[0] + 0.1 * history[1]) + 0.1 * history[2]
    assert torch.allclose(ema.module.weight, want, rtol=1e-6)
    assert not torch.equal(ema.module.weight, history[2])


def test_ema_is_that_of_timm_and_stays_at_skipped_updates():
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 20)
    ours, theirs = ModelEmaV3(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    for skipped in (0.0, 1.0, 0.0):
        torch.nn.init.normal_(model.weight)
        before = ours.module.weight.clone()
        engine_finetune.follow(ours, model, torch.tensor(skipped))
        if skipped:
            assert torch.equal(ours.module.weight, before)
        else:
            theirs.update(model)
        assert torch.allclose(ours.module.weight, theirs.module.weight, rtol=1e-6)


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    run = Run(loop_args(), model, plain_sgd(model.parameters()))
    loader = Batches(*([torch.tensor([[sample]])] for sample in (5.0, 2.0, 3.0)))
    losses = iter([0.0, math.inf, 0.0])
    train_epoch(model, loader, lambda x: model(x).mean() + next(losses), run, torch.device("cpu"), Log())
    assert model.weight.item() == 1 - 5 - 3


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, fused=True)


def one_weight_run(samples, log=None, make_optimizer=plain_sgd, **changes):
    """Train weight w of loss = w * sample with plain SGD, which shows every gradient as it is."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    loader = Batches(*([torch.tensor([[sample]], dtype=torch.float32)] for sample in samples))
    run = Run(loop_args(**changes), model, make_optimizer(model.parameters()))
    log = Log() if log is None else log
    stats = train_epoch(model, loader, lambda x: model(x).mean(), run, torch.device("cpu"), log)
    return model.weight.item(), stats


def test_gradients_are_neither_scaled_nor_clipped_by_default():
    weight, stats = one_weight_run([5.0, 3.0])
    assert weight == 1 - 5 - 3
    assert stats["train_loss"] == (5 * 1 + 3 * (1 - 5)) / 2


def test_gradient_clipping():
    assert one_weight_run([5.0, -0.25], clip_grad=2.0)[0] == pytest.approx(1 - 2 + 0.25, abs=1e-5)


def test_batches_that_fill_no_update_are_left_out():
    weight, stats = one_weight_run([5.0, 3.0, 100.0], accum_iter=2)
    assert weight == 1 - (5 + 3) / 2
    assert stats["train_loss"] == (5 + 3) / 2


def test_windows_longer_than_the_log_interval():
    """More accumulated batches than there are between two log points."""
    weight, stats = one_weight_run([1.0, 3.0] * 25, accum_iter=50)
    assert weight == pytest.approx(1 - 2, abs=1e-5)
    assert stats["train_loss"] == pytest.approx(2)


class NotedLog(Log):
    """A silent log that remembers what it was told."""

    def __init__(self):
        self.said, self.points = [], []

    def say(self, text):
        self.said.append(text)

    def scalars(self, step, **values):
        self.points.append(values)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_skipped(broken):
    log = NotedLog()
    weight, stats = one_weight_run([5.0, broken, 3.0, broken], log=log)
    assert weight == 1 - 5 - 3
    assert stats["train_loss"] == (5 * 1 + 3 * (1 - 5)) / 2  # of those that were finite
    assert log.said == ["epoch 0, batch 3: skipped updates with a non-finite gradient: 2"]
    assert log.points[0]["train_loss"] == stats["train_loss"]


def test_every_log_line_tells_of_its_own_batches():
    log = NotedLog()
    samples = [1.0] * 19 + [math.nan] + [2.0] * 20 + [3.0] * 5
    _, stats = one_weight_run(samples, log=log, lr=0.0, min_lr=0.0)
    assert [point["train_loss"] for point in log.points] == [1, 2, 3]
    assert log.said == ["epoch 0, batch 19: skipped updates with a non-finite gradient: 1"]
    assert stats["train_loss"] == pytest.approx((19 + 40 + 15) / 44)


ONE_RANK_BREAKS = """
import math, torch
from helpers import Batches, loop_args
from util.distributed.parallel import distribute
from util.distributed.processes import end_groups, init_device, rank
from util.tracking.run_log import Log
from util.training.run import Run
from util.training.loop import train_epoch

device = init_device("cpu")
bare = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.ones_(bare.weight)
samples = [[5.0, 1.0, 3.0], [3.0, math.nan, 1.0]][rank()]
loader = Batches(*([torch.tensor([[sample]])] for sample in samples))
model = distribute(bare, device)
run = Run(loop_args(), bare, torch.optim.SGD(bare.parameters(), fused=True))
with run:
    stats = train_epoch(model, loader, lambda x: model(x).mean(), run, device, Log())
loss = stats["train_loss"]
print(f"rank {rank()}: weight {bare.weight.item()}, loss {loss}\\n", end="")
end_groups()
"""


def test_all_processes_skip_together(tmp_path, monkeypatch):
    """One process of two meets a loss that is not finite."""
    (tmp_path / "script.py").write_text(ONE_RANK_BREAKS)
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
    out = torchrun(tmp_path / "script.py")
    weight = 1 - 4 - 2  # the means of the two processes' first and third samples
    losses = [5, 3, 1 * (1 - 4), 3 * (1 - 4), 1 * (1 - 4)]  # five are finite
    for rank in (0, 1):
        assert f"rank {rank}: weight {weight:.1f}, loss {sum(losses) / 5}" in out


@pytest.mark.parametrize(
    ("samples", "first", "weight"),
    [
        ([5.0, 3.0, math.nan, math.nan, math.nan], 2, 1 - 5 - 3),
        ([5.0, math.nan, math.nan, math.nan, *[3.0] * 17], 1, 1 - 5),  # whatever comes before the host looks
        ([*[0.125] * 18, *[math.nan] * 4], 18, 1 - 18 / 8),  # across two log lines
    ],
)
def test_three_in_a_row_stop_the_run(tmp_path, samples, first, weight):
    """With the weights of before, the batch and the position."""
    message = f"not finite in 3 updates in a row, from batch {first} of epoch 0; all of them were skipped.*--resume "
    with pytest.raises(RunError, match=message):
        one_weight_run(samples, output_dir=str(tmp_path))
    folder = tmp_path / f"nonfinite-epoch0-batch{first}"
    state = torch.load(folder / "state.pth", weights_only=False)
    assert state["model"]["weight"].item() == weight
    assert (state["epoch"], state["samples"], state["skipped_in_a_row"]) == (-1, first, 0)
    ((batch,),) = torch.load(folder / "batches-rank0.pth")["batches"]
    assert math.isnan(batch.item())


def test_two_in_a_row_do_not(tmp_path):
    one_weight_run([math.nan, math.nan, 3.0, math.nan, math.nan])
    with pytest.raises(RunError, match="in 2 updates in a row, from batch 0"):
        one_weight_run([math.nan, math.nan, 3.0], max_nonfinite=2, output_dir=str(tmp_path))


@pytest.mark.parametrize("kind", SCRIPTS)
def test_weights_that_the_last_update_breaks_are_not_saved(
    kind, image_folder, tmp_path, run_script, capsys, monkeypatch
):
    """Every gradient is finite, and no loss after the update could show it."""
    script, _, tiny = SCRIPTS[kind]
    words = [*tiny, "--data_path", image_folder, *FAST, "--batch_size", 24, "--output_dir", tmp_path]
    if kind == "finetune":
        words += ["--ema_decay", 0.5]
    lr_at = loop.lr_at
    monkeypatch.setattr(loop, "lr_at", lambda epoch, *args: 1e39 if epoch >= 1 else lr_at(epoch, *args))
    with pytest.raises(SystemExit) as exit_info:
        run_script(script, *words)
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"an update of epoch 1 has made weights that are not finite: \w+, .* and \d+ more\. They", line)
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names >= {"checkpoint-last.pth", "checkpoint-0.pth"}
    for name in names:
        content = checkpoint_file.read(tmp_path / name)
        assert content["epoch"] + (content["samples"] > 0) == 0
        assert content["model"]["patch_embed.proj.weight"].isfinite().all()
    assert all(row["epoch"] == 0 for row in read_log(tmp_path) if "test_acc1" in row)
    monkeypatch.undo()
    run_script(script, *words, "--resume", "auto")  # resumes from the newest
    assert checkpoint_file.read(tmp_path / "checkpoint-last.pth")["epoch"] == 1


def test_an_ema_that_is_not_finite_is_not_saved():
    model = torch.nn.Linear(2, 2)
    ema = ModelEmaV3(model)
    run = Run(loop_args(), model, plain_sgd(model.parameters()), ema)
    run.save()
    ema.module.bias.data[1] = math.inf
    with pytest.raises(RunError, match="not finite: EMA of bias"):
        run.save()


def test_no_evidence_of_weights_that_were_broken_before(tmp_path):
    """The first update overflows, those after it have no finite gradient."""
    with pytest.raises(RunError, match="weights that are not finite: weight"):
        one_weight_run([-1e30, 1.0, 1.0, 1.0], lr=1e30, output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


ONE_RANK_HAS_BROKEN_WEIGHTS = """
import math, torch
from helpers import loop_args
from util.distributed.processes import end_groups, init_device, rank
from util.errors import RunError
from util.training.run import Run

init_device("cpu")
model = torch.nn.Linear(1, 1, bias=False)
run = Run(loop_args(), model, torch.optim.SGD(model.parameters()))
run.save()
if rank() == 1:
    model.weight.data[:] = math.nan
try:
    run.save()
except RunError as error:
    print(f"rank {rank()}: {error}\\n", end="")
end_groups()
"""


def test_all_processes_find_broken_weights_together(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(ONE_RANK_HAS_BROKEN_WEIGHTS)
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
    out = torchrun(tmp_path / "script.py")
    for rank in (0, 1):
        assert f"rank {rank}: an update of epoch 0 has made weights that are not finite: weight" in out


class BreaksSome(torch.nn.Module):
    """Right answers, but logits that are not finite at some places."""

    def __init__(self, labels, places):
        super().__init__()
        self.labels, self.places, self.seen = labels, places, 0

    def forward(self, imgs):
        logits = torch.nn.functional.one_hot(self.labels[self.seen : self.seen + len(imgs)], 3).float()
        for place, value in self.places.items():
            if self.seen <= place < self.seen + len(imgs):
                logits[place - self.seen, place % 3] = value
        self.seen += len(imgs)
        return logits


def test_logits_that_are_not_finite_are_wrong_and_named(image_folder, caplog):
    args = argparse.Namespace(
        batch_size=2, num_workers=0, pin_mem=False, worker_timeout=0, dist_eval=True, eval_bad="stop"
    )
    data = datasets.image_dataset(str(image_folder), "val", transforms.eval_transform((48, 32), "square"), "pil")
    loader = loaders.eval_loader(data, args, torch.device("cpu"))
    labels = torch.from_numpy(data.source.labels)

    def evaluated(**places):
        model = BreaksSome(labels, {int(place[1:]): value for place, value in places.items()})
        return evaluation.evaluate(model, loader, torch.device("cpu"), Log())

    whole = evaluated()
    assert (whole["acc1"], whole["images"], "nonfinite" in whole) == (100, 7, False)
    # infinity at the right class would win, NaN counts as the largest
    result = evaluated(_0=math.inf, _3=math.nan, _6=-math.inf)
    assert (result["nonfinite"], result["images"]) == (3, 7)
    assert (result["acc1"], result["acc5"]) == pytest.approx((400 / 7, 400 / 7))
    assert result["loss"] == pytest.approx(whole["loss"])
    assert evaluation.describe_result(result).endswith(
        "on 7 images, 3 of them with logits that are not finite, counted as wrong"
    )
    assert [record.args[0] for record in caplog.records] == [data.source.name(place) for place in (0, 3, 6)]
    with pytest.raises(RunError, match="the logits of all 7 images are not finite"):
        evaluated(**{f"_{place}": math.nan for place in range(7)})


def test_loss_spikes_are_said():
    log = NotedLog()
    one_weight_run([1.0] * 460 + [7.0] * 20 + [1.0] * 20, log=log, lr=0.0, min_lr=0.0)
    assert log.said == ["epoch 0, batch 479: the loss rose to 7, from 1"]


def test_losses_that_are_not_finite_are_no_part_of_what_was_before():
    """Of a whole window, here of one update, too."""
    log = NotedLog()
    samples = [1.0] * 5 + [math.nan] + [1.0] * 24
    weight, stats = one_weight_run([*samples, 7.0], log=log, lr=0.0, min_lr=0.0, save_every_steps=1)
    assert (weight, stats["train_loss"]) == (1, (29 + 7) / 30)
    assert log.said[-1] == "epoch 0, batch 30: the loss rose to 7, from 1"


def test_skipped_updates_leave_the_moments_of_adamw():
    """Also on accumulated batches: one of them is enough to spoil an update."""
    ends = []
    for samples in ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, math.nan, 5.0, 3.0, 4.0]):
        optimizers = []

        def make(parameters, optimizers=optimizers):
            optimizers.append(torch.optim.AdamW(parameters, fused=True))
            return optimizers[0]

        weight, _ = one_weight_run(samples, accum_iter=2, make_optimizer=make, lr=0.1, min_lr=0.1)
        ((_, state),) = optimizers[0].state.items()
        ends.append((weight, state["step"].item(), state["exp_avg"].item(), state["exp_avg_sq"].item()))
    assert ends[0] == ends[1]
    assert ends[0][1] == 2


@pytest.fixture
def alone_in_a_group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    end_groups()


@pytest.mark.usefixtures("alone_in_a_group")
def test_gradients_travel_once_an_update(monkeypatch):
    monkeypatch.setattr("util.distributed.parallel.world_size", lambda: 2)
    model = distribute(torch.nn.Linear(1, 1), torch.device("cpu"))
    monkeypatch.undo()
    assert model.gradient_as_bucket_view
    loader = Batches(*([torch.ones(1, 1)] for _ in range(6)))
    run = Run(loop_args(accum_iter=3), model.module, plain_sgd(model.parameters()))
    travels = []

    def compute_loss(x):
        travels.append(model.require_backward_grad_sync)
        return model(x).mean()

    train_epoch(model, loader, compute_loss, run, torch.device("cpu"), Log())
    assert travels == [False, False, True] * 2


class CountReads(TorchDispatchMode):
    """Count how often the host asks for a number on the device, which on a GPU makes it wait."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("accum_iter", [1, 3])
def test_the_host_reads_only_where_it_logs(accum_iter, monkeypatch):
    lists = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.shape) or to_list(self))
    reads = []
    for batches in (3, 45):
        log = NotedLog()
        with CountReads() as mode:
            one_weight_run([0.5] * batches, log=log, accum_iter=accum_iter, clip_grad=1.0, lr=1e-3, min_lr=1e-3)
        reads.append(mode.reads)
    assert reads[0] == reads[1] == 1  # this test's own look at the weight
    assert len(log.points) == 3  # batches 20 or 21, 40 or 42, 45
    assert lists.count(torch.Size([5])) == 1 + 3


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


def test_loss_falls_on_what_can_be_learnt(image_folder, tmp_path, run_script):
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
    process = subprocess.Popen([str(w) for w in command], stdout=theirs, stderr=theirs)
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


def test_quiet_steps_count_and_say_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    progress = Progress("epoch 7", 3)
    progress.update(8, quiet=True)
    assert capsys.readouterr().out == ""
    progress.update(8, loss=0.25)
    assert re.fullmatch(r"epoch 7  \[2/3\]  loss 0.25  img/s \d+  left 0:00:0\d\n", capsys.readouterr().out)


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
