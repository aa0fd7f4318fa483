"""Checkpoint files: what is read, refused, converted and written."""

import argparse
import collections
import os
import pathlib
import re

import pytest
import torch
from helpers import TINY_FINETUNE

import models_arm
from Evaluation import probe
from Finetuning import main_finetune
from pretrained import Checkpoint
from tools import export
from util.checkpoints import checkpoint_file, convert, inspection
from util.checkpoints.checkpoint_file import say_once
from util.errors import UserError
from util.training import resume
from util.training.run import Run

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


def test_weights_are_found_in_every_form():
    state = collections.OrderedDict(classifier().state_dict())
    ema = {name: value + 1 for name, value in state.items()}
    assert_equal_state(inspection.weights({"model": state, "model_ema": ema}), state)
    assert_equal_state(inspection.weights({"model": state, "model_ema": ema}, "model_ema"), ema)
    assert_equal_state(inspection.weights({"model_ema": ema}), ema)
    assert_equal_state(inspection.weights(state), state)
    assert_equal_state(inspection.weights({f"module.{name}": value for name, value in state.items()}), state)
    with pytest.raises(UserError, match="no model_ema; it has model"):
        inspection.weights({"model": state}, "model_ema")


def test_foreign_checkpoints():
    vit = {"cls_token": torch.ones(1), "patch_embed.proj.weight": torch.ones(4, 3, 2, 2), "pos_embed": torch.ones(1)}
    with pytest.raises(UserError, match=r"not one of ARM: it has no layers\.0\.mixer\.A_log"):
        inspection.weights({"model": vit})
    with pytest.raises(UserError, match="not one of ARM"):
        inspection.weights({"state": 1})


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
        inspection.weights({"model": change.get("model", state)})


def test_every_misfit_is_listed():
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["norm_f.bias"]
    state["extra.weight"] = torch.ones(1)
    state["head.weight"] = torch.ones(7, 32)
    with pytest.raises(UserError) as caught:
        convert.load(model, state)
    message = str(caught.value)
    assert "missing norm_f.bias" in message
    assert "unexpected extra.weight" in message
    assert "head.weight has shape (7, 32), the model (3, 32)" in message
    assert_equal_state(model.state_dict(), before)


def test_scan_parameters_go_to_all_directions():
    source, model = pretrained().state_dict(), classifier()
    state = convert.pretrain_to_classifier(source, model, (48, 32))
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
    state = convert.pretrain_to_classifier(source, model, (48, 32))
    pos = source["pos_embed"]
    patches = torch.cat([pos[:, :12], pos[:, 13:]], dim=1).view(1, 6, 4, 32).permute(0, 3, 1, 2)
    large = torch.nn.functional.interpolate(patches, size=(12, 8), mode="bicubic", align_corners=False)
    large = large.permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(state["pos_embed"], torch.cat([large[:, :48], pos[:, 12:13], large[:, 48:]], dim=1))
    assert torch.equal(state["head.weight"], source["head.weight"])
    same = convert.pretrain_to_classifier(source, classifier((48, 32)), (48, 32))
    assert torch.equal(same["pos_embed"], pos)


def test_grid_of_a_checkpoint():
    """The saved input size where it fits, else the model's own grid where that fits, else a square."""
    source = pretrained().state_dict()

    def rows(model, saved):
        pos_embed = convert.pretrain_to_classifier(source, model, saved)["pos_embed"]
        return torch.cat([pos_embed[:, :12], pos_embed[:, 13:]], dim=1)

    assert torch.equal(rows(classifier(), (48, 32)), source["pos_embed"])
    assert torch.equal(rows(classifier(), None), source["pos_embed"])
    assert not torch.equal(rows(classifier((32, 48)), (48, 32)), source["pos_embed"])
    with pytest.raises(UserError, match="24 patches, which is no square"):
        convert.pretrain_to_classifier(source, classifier((48, 48)))
    square = pretrained((48, 48)).state_dict()
    for saved in (None, (224, 224)):  # a size that contradicts the number of patches does not count
        state = convert.pretrain_to_classifier(square, classifier((64, 64)), saved)
        assert state["pos_embed"].shape == (1, 65, 32)


@pytest.mark.parametrize(("size", "want"), [(48, (48, 48)), ([48], (48, 48)), ([48, 32], (48, 32)), (None, None)])
def test_input_size_is_read_from_the_saved_arguments(size, want):
    assert inspection.saved_size({"args": argparse.Namespace(input_size=size)}) == want
    assert inspection.saved_size(pretrained().state_dict()) is None


def test_only_a_head_of_another_size_is_left_out():
    args = argparse.Namespace(input_size=[48, 32])
    content = {"model": classifier(num_classes=7).state_dict(), "args": args}
    model = classifier(num_classes=3)
    head = model.head.weight.clone()
    with pytest.raises(UserError, match=r"head\.weight has shape \(7, 32\)"):
        Checkpoint("c.pth", content).load_into(model)
    assert not Checkpoint("c.pth", content).load_into(model, keep_head=False)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.layers[1].mlp.w1.weight, content["model"]["layers.1.mlp.w1.weight"])
    fits = {"model": {n: v + 1 for n, v in classifier().state_dict().items()}, "args": args}
    assert Checkpoint("c.pth", fits).load_into(model, keep_head=False)
    assert torch.equal(model.head.weight, fits["model"]["head.weight"])


def test_incomplete_pretraining_checkpoint_is_refused():
    content = {"model": pretrained().state_dict(), "args": argparse.Namespace(input_size=[48, 32])}
    del content["model"]["layers.1.mlp.w3.bias"]
    with pytest.raises(UserError, match=r"does not fit the model: missing layers\.1\.mlp\.w3\.bias$"):
        Checkpoint("c.pth", content).load_into(classifier(), keep_head=False)


def test_sizes_are_read_off_the_shapes():
    assert inspection.classifier_sizes(classifier().state_dict()) == {**SIZES, "num_classes": 3, "directions": 4}
    assert inspection.classifier_sizes(pretrained().state_dict()) == SIZES
    assert inspection.image_size(classifier().state_dict(), (48, 32)) == (48, 32)
    assert inspection.image_size(classifier((48, 48)).state_dict()) == (48, 48)


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
    with pytest.raises(UserError, match=r"image 6 .* multiple of the 4 of an update: --start_epoch 2 begins"):
        Run(args, model, optimizer, content=content, images=10**6)
    args.start_epoch = 2
    run = Run(args, model, optimizer, content=content, images=10**6)
    assert (run.epoch, run.samples) == (2, 0)


def test_an_optimizer_of_another_model_does_not_fit():
    content, model, _ = run_of(0)
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    with pytest.raises(UserError, match=r"optimizer in c\.pth does not fit this run: it has other groups"):
        resume.resume(args, content, model, torch.optim.AdamW([torch.zeros(1)]))


@pytest.mark.parametrize("text", ["hello", "epoch", "state", "a,b,c", "build", "(", "test\n" * 9, "\x80\x02}q\x00."])
def test_a_file_of_something_else(tmp_path, text):
    """Some begin as a pickle does, by chance."""
    (tmp_path / "c.pth").write_text(text, encoding="latin1")
    with pytest.raises(checkpoint_file.DamagedCheckpoint, match=r"c\.pth"):
        checkpoint_file.read(tmp_path / "c.pth")


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


def test_keys_that_are_ignored(tmp_path, caplog):
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


def test_a_model_of_another_size_is_answered_with_both():
    large = models_arm.create_classifier(
        "arm_tiny_pz16", img_size=(48, 32), num_classes=3, **{**SIZES, "embed_dim": 64, "depth": 3}
    )
    with pytest.raises(UserError, match=r"^the checkpoint has 32 channels and 2 blocks, the model 64 and 3: --model, "):
        convert.load(large, classifier().state_dict())


def test_the_message_of_many_misfits_is_short():
    state = {f"part{i}.{name}": value for i in range(3) for name, value in classifier().state_dict().items()}
    with pytest.raises(UserError) as caught:
        convert.load(classifier(), {**state, "x" * 10**6: torch.ones(1)})
    count = len(classifier().state_dict())
    assert f"and {count - 5} more; unexpected part0.cls_token, " in str(caught.value)
    assert f"and {3 * count + 1 - 5} more" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value):
    model, state = classifier(), classifier().state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["norm_f.bias"][3] = state["layers.1.mixer.D"][0] = value
    before = model.norm_f.weight.clone()
    with pytest.raises(UserError, match=r"weights that are not finite .*: layers\.1\.mixer\.D, norm_f\.bias$"):
        convert.load(model, {**state, "norm_f.weight": before + 1})
    assert torch.equal(model.norm_f.weight, before)


def test_the_attention_mask_may_be_infinite():
    model = pretrained()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert state["mask"].isinf().any()
    convert.load(model, state)
    state["mask"][0, 0] = float("nan")
    with pytest.raises(UserError, match=r"not finite .*: mask$"):
        convert.load(model, state)


def test_moments_that_no_run_wrote():
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
def test_positions_that_no_run_wrote(change):
    args = argparse.Namespace(resume="c.pth", start_epoch=None, epochs=100)
    content, model, optimizer = run_of(0)
    with pytest.raises(UserError, match=f"^cannot resume from c.pth: .*{next(iter(change))}"):
        resume.resume(args, {**content, **change}, model, optimizer)


@pytest.mark.parametrize(
    "value",
    [
        {"input_size": "abc"},
        {"input_size": []},
        {"input_size": 10**9},
        {"input_size": [-1, 5]},
        {"input_size": True},
        {"input_size": [48, 32, 16]},
        {"global_pool": 0.5},
        {"global_pool": ["avg"]},
        {"order": 3},
        {"norm_pix_loss": "x" * 10**6},
        {"cluster_size": -2},
        {"cluster_size": 10**18},
        {"start_epoch": "a"},
        {"world_size": 0},
        {"batch_size": torch.ones(3)},
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("form", [argparse.Namespace, dict])
def test_saved_arguments_that_cannot_be(value, form):
    with pytest.raises(UserError, match=rf"^the checkpoint is damaged: its args say {next(iter(value))} ") as caught:
        inspection.saved_arguments({"args": form(**value)})
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("args", [None, [1], "text", 3, torch.ones(2)], ids=str)
def test_arguments_that_are_no_namespace(args):
    """The weights are right all the same."""
    content = {"model": classifier((48, 48)).state_dict(), "args": args}
    assert inspection.saved_arguments(content) == {}
    assert Checkpoint("c.pth", content).load_into(classifier((48, 48)))
    with pytest.raises(UserError, match=r"its args lack batch_size, accum_iter, world_size$"):
        Run(argparse.Namespace(start_epoch=None), None, None, content={**content, "samples": 0}, images=10**6)


def test_what_is_guessed_is_said(caplog):
    state, args = classifier((48, 48)).state_dict(), argparse.Namespace(input_size=48, global_pool=False)
    assert Checkpoint("c.pth", {"model": state, "args": args}).guesses() == {}
    assert Checkpoint("c.pth", {"model": state, "args": args}).options == {"global_pool": False}
    assert Checkpoint("c.pth", state).guesses() == {"global_pool": "mean of the patches", "input_size": "a square"}
    assert Checkpoint("c.pth", state).guesses({"global_pool"}) == {"input_size": "a square"}
    assert Checkpoint("c.pth", state).options == {"global_pool": True}
    state = pretrained((48, 48)).state_dict()
    say_once.cache_clear()
    with caplog.at_level("INFO"):
        Checkpoint("bare.pth", state).say_guesses()
    assert re.fullmatch(
        r"bare\.pth does not say how it was trained; guessed: input_size \(a square\), .*order \(row\).*",
        caplog.messages[0],
    )


def huge_names(state):
    return {**state, **{f"layers.{i}.norm1.weight": torch.ones(0) for i in range(20_000)}}


def changed(**shapes):
    return lambda state: {**state, **{name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (huge_names, "it has 20000 blocks layers"),
        (lambda s: {n.replace("layers.1.", "layers.7."): v for n, v in s.items()}, r"layers\.1 has not the tensors"),
        (lambda s: {n: v for n, v in s.items() if n != "layers.1.mixer.D"}, r"layers\.1 has not .*: mixer\.D$"),
        (changed(layers__1__mixer__D=(5,)), r"layers\.1 has not .*: mixer\.D$"),
        (changed(patch_embed__proj__weight=(10**5, 3, 8, 8), pos_embed=(1, 25, 10**5)), "do not have the 100000"),
        (changed(head__weight=(3, 5)), r"its head has shape \(3, 5\)"),
        (changed(head__weight=(3,)), r"its head has shape \(3,\)"),
    ],
)
def test_sizes_are_bounded_by_what_is_there(change, message):
    """A model of sizes that a file names is not built before they are known to fit together."""
    state = inspection.weights(change(classifier().state_dict()))
    with pytest.raises(UserError, match=message) as caught:
        inspection.classifier_sizes(state)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "change",
    [
        changed(patch_embed__proj__weight=(32, 3, 8, 4)),
        changed(patch_embed__proj__weight=(32, 3, 0, 0)),
        changed(pos_embed=(2, 25, 32)),
        changed(pos_embed=(1, 25, 31)),
        changed(pos_embed=(1, 0, 32)),
        lambda state: {**state, "pos_embed": torch.ones(1, 25, 32, dtype=torch.int64)},
    ],
)
def test_embeddings_of_odd_shapes(change):
    with pytest.raises(UserError, match="patch or position embedding have other dimensions"):
        inspection.weights(change(classifier().state_dict()))


def test_sizes_of_decoders():
    state = pretrained().state_dict()
    assert inspection.decoder_sizes(state) == {"dec_embed_dim": 64, "dec_depth": 1}
    for name, value in {"ar_token": torch.ones(1, 1, 10**6), "dec_block.0.attn2.q.weight": torch.ones(3)}.items():
        with pytest.raises(UserError, match="no whole decoder"):
            inspection.decoder_sizes({**state, name: value})
    with pytest.raises(UserError, match="it has 0 blocks dec_block"):
        inspection.decoder_sizes(classifier().state_dict())
    for mask in (torch.ones(3), torch.ones(10**3, 1), torch.ones(())):
        with pytest.raises(UserError, match="a mask of shape"):
            inspection.pretrain_options({"model": state}, {**state, "mask": mask})


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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_8_bits_are_compared(dtype):
    assert convert.is_finite(torch.ones(3).to(dtype))
    assert not convert.is_finite(torch.tensor([1.0, float("nan")]).to(dtype))
