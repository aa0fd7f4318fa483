"""Resume a run: position, weights and optimizer of its checkpoint."""

import argparse

import pytest
import torch
from checkpoint_helpers import assert_equal_state, pretrained

from util.errors import UserError
from util.training import resume
from util.training.run_state import Run


def run_of(epoch, **more):
    model = pretrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, **more}
    return content, model, optimizer


@pytest.mark.parametrize("epoch", [-1, -10, -20])
def test_epochs_of_released_latest_and_best_files(epoch):
    """The released code writes these numbers; resuming from them would start at a wrong epoch with a negative lr."""
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    with pytest.raises(UserError, match=f"says epoch {epoch}, which no run has.*--start_epoch"):
        resume.resume(args, *run_of(epoch))
    args.start_epoch = 42
    assert resume.resume(args, *run_of(epoch)) == (42, 0)


def test_resume_starts_after_the_saved_epoch():
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    content, model, optimizer = run_of(7)
    content["model"] = {name: value + 1 for name, value in content["model"].items()}
    assert resume.resume(args, content, model, optimizer) == (8, 0)
    assert_equal_state(model.state_dict(), content["model"])
    assert resume.resume(args, {**content, "samples": 640}, model, optimizer) == (8, 640)
    assert resume.resume(args, {**content, "epoch": -1, "samples": 640}, model, optimizer) == (0, 640)
    args.start_epoch = 3
    assert resume.resume(args, {**content, "samples": 640}, model, optimizer) == (3, 0)
    content |= {"samples": 640, "args": argparse.Namespace(start_epoch=3)}  # of a run that began there
    assert resume.resume(args, content, model, optimizer) == (8, 640)
    assert resume.resume(args, {**content, "epoch": 1}, model, optimizer) == (3, 0)
    args.start_epoch = 4
    assert resume.resume(args, content, model, optimizer) == (4, 0)
    args.start_epoch = None
    del content["optimizer"]
    with pytest.raises(UserError, match=r"cannot resume from c\.pth: it has no optimizer"):
        resume.resume(args, content, model, optimizer)


def test_a_position_between_updates():
    """Of another batch size: refused with what to do, which then works, also where the file is of a run that did it."""
    content, model, optimizer = run_of(1)
    args = argparse.Namespace(resume="c.pth", start_epoch=None, batch_size=4, accum_iter=1, world_size=1)
    content |= {"samples": 6, "args": argparse.Namespace(**vars(args) | {"start_epoch": 2, "batch_size": 3})}
    args.allow_changed_args = True
    with pytest.raises(UserError, match=r"after 6 images .* effective batch size 4: --start_epoch 2 restarts"):
        Run(args, model, optimizer, content=content, images=10**6)
    args.start_epoch = 2
    run = Run(args, model, optimizer, content=content, images=10**6)
    assert (run.epoch, run.samples) == (2, 0)


def test_an_optimizer_of_another_model_does_not_fit():
    content, model, _ = run_of(0)
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    with pytest.raises(UserError, match=r"optimizer in c\.pth does not fit this run: it has other groups"):
        resume.resume(args, content, model, torch.optim.AdamW([torch.zeros(1)]))


@pytest.mark.parametrize("change", [{"optimizer": None}, {"epoch": None}, {"model": None}, {"optimizer": {}}], ids=str)
def test_resuming_from_a_damaged_file(change):
    content, model, optimizer = run_of(0)
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    with pytest.raises(UserError, match=f"{next(iter(change))}"):
        resume.resume(args, {**content, **change}, model, optimizer)


def test_a_resumed_optimizer_has_the_moments_of_the_file_and_the_settings_of_the_run():
    content, model, _ = run_of(0)
    trained = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trained.step()
    content |= {"optimizer": trained.state_dict(), "model": model.state_dict()}
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.7, betas=(0.5, 0.6), fused=True)
    resume.resume(args, content, model, optimizer)
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["fused"]) == (0.7, (0.5, 0.6), True)
    assert torch.allclose(optimizer.state[model.ar_token]["exp_avg"], torch.full_like(model.ar_token, 0.1))


def test_impossible_moments_are_refused():
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    content, model, optimizer = run_of(0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def resume_with(change):
        saved = optimizer.state_dict()
        change(saved)
        state = {**saved["state"], 0: dict(saved["state"][0])} if isinstance(saved["state"], dict) else saved["state"]
        again = torch.optim.AdamW(model.parameters(), lr=0.1)
        resume.resume(args, {**content, "optimizer": {**saved, "state": state}}, model, again)

    def moment(name, value):
        return lambda saved: saved["state"].update({0: {**saved["state"][0], name: value}})

    shape = optimizer.state_dict()["state"][0]["exp_avg"].shape
    for change in (
        moment("exp_avg", torch.full(shape, float("nan"))),
        moment("exp_avg_sq", torch.full(shape, float("inf"))),
        moment("exp_avg", torch.zeros(7)),
        moment("step", "many"),
        moment("step", float("nan")),
        lambda saved: saved["state"].update({10**6: {}, 10**6 + 1: {"step": torch.ones(())}}),
        lambda saved: saved.update(state=[1, 2]),
        lambda saved: saved.update(param_groups=[3]),
        lambda saved: saved["param_groups"][0].pop("lr"),
        lambda saved: saved["param_groups"][0].update(lr=float("nan")),
    ):
        with pytest.raises(UserError, match=r"^the optimizer in c\.pth does not fit this run: .") as caught:
            resume_with(change)
        assert "\n" not in str(caught.value)
    resume_with(moment("step", 3))  # as torch wrote it before 1.12


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": True},
        {"epoch": "3"},
        {"epoch": 10**30},
        {"samples": -1},
        {"samples": None},
        {"loss": [1]},
        {"loss": "x"},
        {"skipped_in_a_row": 0.5},
        {"max_accuracy": "high"},
    ],
    ids=str,
)
def test_impossible_positions_are_refused(change):
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    content, model, optimizer = run_of(0)
    with pytest.raises(UserError, match=f"^cannot resume from c.pth: .*{next(iter(change))}"):
        resume.resume(args, {**content, **change}, model, optimizer)
