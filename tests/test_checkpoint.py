"""Checkpoint files: what is read, refused, converted and written."""

import argparse
import collections
import os
import pathlib

import pytest
import torch

import models_arm
from util import checkpoint
from util.errors import UserError
from util.run import Run

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 2}


def classifier(img_size=(48, 32), num_classes=3):
    torch.manual_seed(1)
    return models_arm.create_classifier("arm_tiny_pz16", img_size=img_size, num_classes=num_classes, **SIZES)


def pretrained(img_size=(48, 32)):
    torch.manual_seed(2)
    sizes = {**SIZES, "img_size": img_size, "cluster_size": 2, "dec_embed_dim": 64, "dec_depth": 1}
    return models_arm.create_pretrain_model("arm_tiny_pz16", **sizes)


def assert_equal_state(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def write(path, content):
    torch.save(content, path)
    return path


class Payload:
    """Pickled code: loading it unsafely would create the file `target`."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_namespace_is_read(tmp_path):
    args = argparse.Namespace(model="arm_base_pz16", input_size=224, cutmix_minmax=None)
    path = write(tmp_path / "c.pth", {"model": {"w": torch.ones(2)}, "args": args, "epoch": 3})
    content = checkpoint.read(path)
    assert content["args"] == args
    assert content["epoch"] == 3


def test_other_types_are_refused_by_name_and_not_run(tmp_path):
    path = write(tmp_path / "c.pth", {"model": {}, "args": Payload(tmp_path / "made")})
    with pytest.raises(UserError, match=r"refused checkpoint .*c\.pth: it holds a posix\.mkdir"):
        checkpoint.read(path)
    assert not (tmp_path / "made").exists()
    path = write(tmp_path / "d.pth", {"where": pathlib.PurePosixPath("a")})
    with pytest.raises(UserError, match=r"it holds a pathlib\.(_local\.)?PurePosixPath"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "unreadable|refused"), (b"not a checkpoint at all", "refused|unreadable"), (None, "no checkpoint file")],
)
def test_files_that_are_no_checkpoint(tmp_path, content, message):
    path = tmp_path / "c.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)


def test_truncated_file(tmp_path):
    path = write(tmp_path / "c.pth", {"model": {"w": torch.ones(1000)}})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="unreadable checkpoint"):
        checkpoint.read(path)


def test_file_of_a_list(tmp_path):
    with pytest.raises(UserError, match="holds a list, not a dict"):
        checkpoint.read(write(tmp_path / "c.pth", [1, 2]))


def test_weights_are_found_in_every_form():
    state = collections.OrderedDict(classifier().state_dict())
    ema = {name: value + 1 for name, value in state.items()}
    assert_equal_state(checkpoint.weights({"model": state, "model_ema": ema}), state)
    assert_equal_state(checkpoint.weights({"model": state, "model_ema": ema}, "model_ema"), ema)
    assert_equal_state(checkpoint.weights({"model_ema": ema}), ema)
    assert_equal_state(checkpoint.weights(state), state)
    assert_equal_state(checkpoint.weights({f"module.{name}": value for name, value in state.items()}), state)
    with pytest.raises(UserError, match="no model_ema; it has model"):
        checkpoint.weights({"model": state}, "model_ema")


def test_foreign_checkpoints():
    vit = {"cls_token": torch.ones(1), "patch_embed.proj.weight": torch.ones(4, 3, 2, 2), "pos_embed": torch.ones(1)}
    with pytest.raises(UserError, match=r"not one of ARM: it has no layers\.0\.mixer\.A_log"):
        checkpoint.weights({"model": vit})
    with pytest.raises(UserError, match="not one of ARM"):
        checkpoint.weights({"state": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"model": {0: torch.ones(1)}},
        {"model": {"patch_embed.proj.weight": 1}},
        {"patch_embed.proj.weight": torch.ones(4, 4)},
        {"pos_embed": None},
        {"head.weight": None},
        {"layers.0.mixer.A_log": None},
    ],
    ids=str,
)
def test_damaged_state_dicts(change):
    state = {**classifier().state_dict(), **{k: v for k, v in change.items() if k != "model"}}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(UserError, match="not one of ARM"):
        checkpoint.weights({"model": change.get("model", state)})


def test_every_misfit_is_listed():
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["norm_f.bias"]
    state["extra.weight"] = torch.ones(1)
    state["head.weight"] = torch.ones(7, 32)
    with pytest.raises(UserError) as caught:
        checkpoint.load(model, state)
    message = str(caught.value)
    assert "missing norm_f.bias" in message
    assert "unexpected extra.weight" in message
    assert "head.weight has shape (7, 32), the model (3, 32)" in message
    assert_equal_state(model.state_dict(), before)


def test_scan_parameters_go_to_all_directions():
    source, model = pretrained().state_dict(), classifier()
    state = checkpoint.pretrain_to_classifier(source, model, (48, 32))
    for layer in ("layers.0", "layers.1"):
        for s in ("", "_b", "_c", "_c_b"):
            for want, got in (
                ("A_log", f"A{s}_log"),
                ("D", f"D{s}"),
                ("conv1d.weight", f"conv1d{s}.weight"),
                ("conv1d.bias", f"conv1d{s}.bias"),
                ("x_proj.weight", f"x_proj{s}.weight"),
                ("dt_proj.weight", f"dt_proj{s}.weight"),
                ("dt_proj.bias", f"dt_proj{s}.bias"),
            ):
                assert torch.equal(state[f"{layer}.mixer.{got}"], source[f"{layer}.mixer.{want}"]), got
    patches = source["pos_embed"]
    want = torch.cat([patches[:, :12], torch.zeros(1, 1, 32), patches[:, 12:]], dim=1)
    assert torch.equal(state["pos_embed"], want)


def test_finetuned_checkpoint_at_another_resolution():
    """Only the grid rows are interpolated; the class token's row stays."""
    source, model = classifier((48, 32)).state_dict(), classifier((96, 64))
    state = checkpoint.pretrain_to_classifier(source, model, (48, 32))
    pos = source["pos_embed"]
    patches = torch.cat([pos[:, :12], pos[:, 13:]], dim=1).view(1, 6, 4, 32).permute(0, 3, 1, 2)
    large = torch.nn.functional.interpolate(patches, size=(12, 8), mode="bicubic", align_corners=False)
    large = large.permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(state["pos_embed"], torch.cat([large[:, :48], pos[:, 12:13], large[:, 48:]], dim=1))
    assert torch.equal(state["head.weight"], source["head.weight"])
    same = checkpoint.pretrain_to_classifier(source, classifier((48, 32)), (48, 32))
    assert torch.equal(same["pos_embed"], pos)


def test_grid_of_a_checkpoint():
    """The saved input size where it fits, else the model's own grid where that fits, else a square."""
    source = pretrained().state_dict()

    def rows(model, saved):
        pos_embed = checkpoint.pretrain_to_classifier(source, model, saved)["pos_embed"]
        return torch.cat([pos_embed[:, :12], pos_embed[:, 13:]], dim=1)

    assert torch.equal(rows(classifier(), (48, 32)), source["pos_embed"])
    assert torch.equal(rows(classifier(), None), source["pos_embed"])
    assert not torch.equal(rows(classifier((32, 48)), (48, 32)), source["pos_embed"])
    with pytest.raises(UserError, match="24 patches, which is no square"):
        checkpoint.pretrain_to_classifier(source, classifier((48, 48)))
    square = pretrained((48, 48)).state_dict()
    for saved in (None, (224, 224)):  # a size that contradicts the number of patches does not count
        state = checkpoint.pretrain_to_classifier(square, classifier((64, 64)), saved)
        assert state["pos_embed"].shape == (1, 65, 32)


@pytest.mark.parametrize(("size", "want"), [(48, (48, 48)), ([48], (48, 48)), ([48, 32], (48, 32)), (None, None)])
def test_input_size_is_read_from_the_saved_arguments(size, want):
    assert checkpoint.saved_size({"args": argparse.Namespace(input_size=size)}) == want
    assert checkpoint.saved_size(pretrained().state_dict()) is None


def test_only_a_head_of_another_size_is_left_out():
    args = argparse.Namespace(input_size=[48, 32])
    content = {"model": classifier(num_classes=7).state_dict(), "args": args}
    model = classifier(num_classes=3)
    head = model.head.weight.clone()
    with pytest.raises(UserError, match=r"head\.weight has shape \(7, 32\)"):
        checkpoint.load_into_classifier(content, model)
    assert not checkpoint.load_into_classifier(content, model, keep_head=False)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.layers[1].mlp.w1.weight, content["model"]["layers.1.mlp.w1.weight"])
    fits = {"model": {n: v + 1 for n, v in classifier().state_dict().items()}, "args": args}
    assert checkpoint.load_into_classifier(fits, model, keep_head=False)
    assert torch.equal(model.head.weight, fits["model"]["head.weight"])


def test_incomplete_pretraining_checkpoint_is_refused():
    content = {"model": pretrained().state_dict(), "args": argparse.Namespace(input_size=[48, 32])}
    del content["model"]["layers.1.mlp.w3.bias"]
    with pytest.raises(UserError, match=r"does not fit the model: missing layers\.1\.mlp\.w3\.bias$"):
        checkpoint.load_into_classifier(content, classifier(), keep_head=False)


def test_sizes_are_read_off_the_shapes():
    assert checkpoint.classifier_sizes(classifier().state_dict()) == {**SIZES, "num_classes": 3, "directions": 4}
    assert checkpoint.classifier_sizes(pretrained().state_dict()) == SIZES
    assert checkpoint.image_size(classifier().state_dict(), (48, 32)) == (48, 32)
    assert checkpoint.image_size(classifier((48, 48)).state_dict()) == (48, 48)


def run_of(epoch, **more):
    model = pretrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, **more}
    return content, model, optimizer


@pytest.mark.parametrize("epoch", [-1, -10, -20])
def test_epochs_of_released_latest_and_best_files(epoch):
    """The released code writes these numbers; going on from them would start at a wrong epoch with a negative lr."""
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    with pytest.raises(UserError, match=f"says epoch {epoch}, which no run has.*--start_epoch"):
        checkpoint.resume(args, *run_of(epoch))
    args.start_epoch = 42
    assert checkpoint.resume(args, *run_of(epoch)) == (42, 0)


def test_resume_starts_after_the_saved_epoch():
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    content, model, optimizer = run_of(7)
    content["model"] = {name: value + 1 for name, value in content["model"].items()}
    assert checkpoint.resume(args, content, model, optimizer) == (8, 0)
    assert_equal_state(model.state_dict(), content["model"])
    assert checkpoint.resume(args, {**content, "samples": 640}, model, optimizer) == (8, 640)
    assert checkpoint.resume(args, {**content, "epoch": -1, "samples": 640}, model, optimizer) == (0, 640)
    args.start_epoch = 3
    assert checkpoint.resume(args, {**content, "samples": 640}, model, optimizer) == (3, 0)
    content |= {"samples": 640, "args": argparse.Namespace(start_epoch=3)}  # of a run that began there
    assert checkpoint.resume(args, content, model, optimizer) == (8, 640)
    assert checkpoint.resume(args, {**content, "epoch": 1}, model, optimizer) == (3, 0)
    args.start_epoch = 4
    assert checkpoint.resume(args, content, model, optimizer) == (4, 0)
    args.start_epoch = None
    del content["optimizer"]
    with pytest.raises(UserError, match=r"cannot resume from c\.pth: it has no optimizer"):
        checkpoint.resume(args, content, model, optimizer)


def test_a_position_between_updates():
    """Of another batch size: refused with what to do, which then works, also where the file is of a run that did it."""
    content, model, optimizer = run_of(1)
    args = argparse.Namespace(resume="c.pth", start_epoch=None, batch_size=4, accum_iter=1, world_size=1)
    content |= {"samples": 6, "args": argparse.Namespace(**vars(args) | {"start_epoch": 2, "batch_size": 3})}
    run = Run(argparse.Namespace(**vars(args), allow_changed_args=True), model, optimizer)
    with pytest.raises(UserError, match=r"image 6 .* multiple of the 4 of an update: --start_epoch 2 begins"):
        run.restore(content)
    run.args.start_epoch = 2
    run.restore(content)
    assert (run.epoch, run.samples) == (2, 0)


def test_an_optimizer_of_another_model_does_not_fit():
    content, model, _ = run_of(0)
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    with pytest.raises(UserError, match=r"optimizer in c\.pth does not fit this run: it has other groups"):
        checkpoint.resume(args, content, model, torch.optim.AdamW([torch.zeros(1)]))


@pytest.mark.parametrize("text", ["hello", "epoch", "state", "a,b,c", "build", "(", "test\n" * 9, "\x80\x02}q\x00."])
def test_a_file_of_something_else(tmp_path, text):
    """Some begin as a pickle does, by chance."""
    (tmp_path / "c.pth").write_text(text, encoding="latin1")
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"c\.pth"):
        checkpoint.read(tmp_path / "c.pth")


@pytest.mark.parametrize("change", [{"optimizer": None}, {"epoch": None}, {"model": None}, {"optimizer": {}}], ids=str)
def test_resuming_from_a_damaged_file(change):
    content, model, optimizer = run_of(0)
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    with pytest.raises(UserError, match=f"{next(iter(change))}"):
        checkpoint.resume(args, {**content, **change}, model, optimizer)


def test_a_resumed_optimizer_has_the_moments_of_the_file_and_the_settings_of_the_run():
    content, model, _ = run_of(0)
    trained = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trained.step()
    content |= {"optimizer": trained.state_dict(), "model": model.state_dict()}
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.7, betas=(0.5, 0.6), fused=True)
    checkpoint.resume(args, content, model, optimizer)
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["fused"]) == (0.7, (0.5, 0.6), True)
    assert torch.allclose(optimizer.state[model.ar_token]["exp_avg"], torch.full_like(model.ar_token, 0.1))
