"""Losses, gradients, weights and logits that are not finite."""

import argparse
import math
import os
import re

import pytest
import torch
from helpers import REPOSITORY, Batches, loop_args, read_log, torchrun
from timm.utils import ModelEmaV3
from training_helpers import FAST, SCRIPTS, NotedLog, one_weight_run, plain_sgd

from util.checkpoints import checkpoint_file
from util.data import datasets, loaders, transforms
from util.errors import RunError
from util.tracking.run_log import Log
from util.training import evaluation, loop
from util.training.loop import train_epoch
from util.training.run_state import Run


def test_a_nonfinite_loss_with_finite_gradients_is_skipped():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    run = Run(loop_args(), model, plain_sgd(model.parameters()))
    loader = Batches(*([torch.tensor([[sample]])] for sample in (5.0, 2.0, 3.0)))
    losses = iter([0.0, math.inf, 0.0])
    train_epoch(model, loader, lambda x: model(x).mean() + next(losses), run, torch.device("cpu"), Log())
    assert model.weight.item() == 1 - 5 - 3


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_update_is_skipped(broken):
    log = NotedLog()
    weight, stats = one_weight_run([5.0, broken, 3.0, broken], log=log)
    assert weight == 1 - 5 - 3
    assert stats["train_loss"] == (5 * 1 + 3 * (1 - 5)) / 2  # of those that were finite
    assert log.said == ["epoch 0, batch 3: skipped updates with a non-finite gradient: 2"]
    assert log.points[0]["train_loss"] == stats["train_loss"]


ONE_RANK_BREAKS = """
import math, torch
from helpers import Batches, loop_args
from util.distributed.parallel import distribute
from util.distributed.processes import end_groups, init_device, rank
from util.tracking.run_log import Log
from util.training.run_state import Run
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
def test_three_skipped_updates_in_a_row_end_the_run(tmp_path, samples, first, weight):
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


def test_two_skipped_updates_in_a_row_do_not(tmp_path):
    one_weight_run([math.nan, math.nan, 3.0, math.nan, math.nan])
    with pytest.raises(RunError, match="in 2 updates in a row, from batch 0"):
        one_weight_run([math.nan, math.nan, 3.0], max_nonfinite=2, output_dir=str(tmp_path))


@pytest.mark.parametrize("kind", SCRIPTS)
def test_nonfinite_weights_are_not_saved(kind, image_folder, tmp_path, run_script, capsys, monkeypatch):
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


def test_a_nonfinite_ema_is_not_saved():
    model = torch.nn.Linear(2, 2)
    ema = ModelEmaV3(model)
    run = Run(loop_args(), model, plain_sgd(model.parameters()), ema)
    run.save()
    ema.module.bias.data[1] = math.inf
    with pytest.raises(RunError, match="not finite: EMA of bias"):
        run.save()


def test_nothing_is_dumped_if_the_weights_were_nonfinite_before(tmp_path):
    """The first update overflows, those after it have no finite gradient."""
    with pytest.raises(RunError, match="weights that are not finite: weight"):
        one_weight_run([-1e30, 1.0, 1.0, 1.0], lr=1e30, output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


ONE_RANK_HAS_BROKEN_WEIGHTS = """
import math, torch
from helpers import loop_args
from util.distributed.processes import end_groups, init_device, rank
from util.errors import RunError
from util.training.run_state import Run

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


def test_all_processes_find_nonfinite_weights_together(tmp_path, monkeypatch):
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


def test_nonfinite_logits_count_as_wrong_and_are_named(image_folder, caplog):
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
