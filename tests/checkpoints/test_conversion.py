"""Load weights into models, also of another kind, resolution or number of classes."""

import argparse

import pytest
import torch
from checkpoint_helpers import SIZES, assert_equal_state, classifier, pretrained

import models_arm
from pretrained import Checkpoint
from util.checkpoints import convert
from util.errors import UserError


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


def test_a_model_of_another_size_is_refused_with_both_sizes():
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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_8_bits_are_compared(dtype):
    assert convert.is_finite(torch.ones(3).to(dtype))
    assert not convert.is_finite(torch.tensor([1.0, float("nan")]).to(dtype))
