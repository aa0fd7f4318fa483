"""Claims of docs/differences.md about this code that no other test checks."""

import argparse
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import main_pretrain
from Finetuning import main_finetune
from util.data.loaders import EpochSampler
from util.errors import UserError
from util.tracking.run_log import ScreenLog
from util.training.evaluation import evaluate

PAGE = (REPOSITORY / "docs" / "differences.md").read_text()


def test_a_single_process_draws_a_new_order_every_epoch():
    sampler, orders = EpochSampler(range(50), seed=0), []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] == orders[2] != orders[1]


class Whole(list):
    """Batches of a loader of one process."""

    sampler = SimpleNamespace(distributed=False)


def test_the_loss_on_val_is_the_mean_over_images():
    """Losses 1, 1 and 3 by hand: 5 / 3, where the mean over batches would be 2."""
    p = torch.tensor([1.0, 1.0, 3.0]).neg().exp()
    logits = torch.stack([p, 1 - p], dim=1).log()  # (3, 2), cross-entropy of label 0 is -log p
    labels = torch.zeros(3, dtype=torch.int64)
    found = evaluate(
        nn.Identity(), Whole([[logits[:2], labels[:2]], [logits[2:], labels[2:]]]), torch.device("cpu"), ScreenLog()
    )
    assert found["loss"] == pytest.approx(5 / 3)


def points(folder, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_names_and_axes_of_curves(run_script, image_folder, tmp_path):
    """Three batches an epoch: one point each, at its last update, with the mean loss."""
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--batch_size", 8, "--epochs", 2]
    run_script(main_finetune, *TINY_FINETUNE, *words, "--warmup_epochs", 0, "--ema_decay", 0.9)
    tags = set(EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"])
    evaluated = {f"{kind}test_{name}" for kind in ("", "ema_") for name in ("acc1", "acc5", "loss", "images")}
    assert tags == {"train_loss", "lr", "grad_norm"} | evaluated
    for name in ("train_loss", "lr", "grad_norm"):
        assert [step for step, _ in points(tmp_path, name)] == [666, 1666]
    assert [step for step, _ in points(tmp_path, "test_acc1")] == [1000, 2000]


def test_settings_of_a_resumed_optimizer(run_script, image_folder, tmp_path):
    """Moments are those of the file, weight decay is that of the command line."""
    words = ["--data_path", image_folder, "--batch_size", 8, "--warmup_epochs", 0, "--epochs"]
    run_script(main_pretrain, *TINY_PRETRAIN, *words, 1, "--output_dir", tmp_path / "a")
    first = tmp_path / "a" / "checkpoint-last.pth"
    changed = ["--weight_decay", 0.2, "--allow_changed_args", "--resume", first, "--output_dir", tmp_path / "b"]
    run_script(main_pretrain, *TINY_PRETRAIN, *words, 2, *changed)
    with torch.serialization.safe_globals([argparse.Namespace]):
        before, after = (torch.load(path, weights_only=True) for path in (first, tmp_path / "b" / first.name))
    assert {group["weight_decay"] for group in before["optimizer"]["param_groups"]} == {0.05, 0.0}
    assert {group["weight_decay"] for group in after["optimizer"]["param_groups"]} == {0.2, 0.0}
    assert {int(state["step"]) for state in after["optimizer"]["state"].values()} == {6}  # 3 of each run


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (main_finetune, ["--dist_on_itp"], "unrecognized arguments: --dist_on_itp"),
        (main_pretrain, ["--dist_on_itp"], "unrecognized arguments: --dist_on_itp"),
        (main_finetune, ["--resplit"], "unrecognized arguments: --resplit"),
        (main_finetune, ["--output_dir", ""], "argument --output_dir: it is empty"),
    ],
)
def test_arguments_that_are_not_taken(script, words, message):
    with pytest.raises(UserError, match=message):
        script.get_args_parser().parse_args(["--data_path", "x", *words])


def test_plain_torch_reads_a_checkpoint(run_script, image_folder, tmp_path, monkeypatch):
    """The page's lines read all that a run writes."""
    monkeypatch.chdir(tmp_path)
    words = ["--data_path", image_folder, "--output_dir", "out_b", "--batch_size", 8, "--epochs", 1]
    run_script(main_finetune, *TINY_FINETUNE, *words, "--warmup_epochs", 0, "--ema_decay", 0.9)
    (tmp_path / "out_b" / "checkpoint-0.pth").rename(tmp_path / "out_b" / "checkpoint-1599.pth")
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    names = {}
    exec(code, names)
    assert {"model", "model_ema", "optimizer", "epoch", "scaler", "args"} <= names["content"].keys()
    assert names["content"]["args"].batch_size == 8
