"""Find weights, sizes and saved arguments in the content of a checkpoint."""

import argparse
import collections
import re

import pytest
import torch
from checkpoint_helpers import SIZES, assert_equal_state, classifier, pretrained

from pretrained import Checkpoint
from util.checkpoints import inspection
from util.checkpoints.checkpoint_file import say_once
from util.errors import UserError
from util.training.run_state import Run


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


@pytest.mark.parametrize(("size", "want"), [(48, (48, 48)), ([48], (48, 48)), ([48, 32], (48, 32)), (None, None)])
def test_input_size_is_read_from_the_saved_arguments(size, want):
    assert inspection.saved_size({"args": argparse.Namespace(input_size=size)}) == want
    assert inspection.saved_size(pretrained().state_dict()) is None


def test_sizes_are_read_off_the_shapes():
    sizes = {**SIZES, "in_chans": 3}
    assert inspection.classifier_sizes(classifier().state_dict()) == {**sizes, "num_classes": 3, "directions": 4}
    assert inspection.classifier_sizes(pretrained().state_dict()) == sizes
    assert inspection.image_size(classifier().state_dict(), (48, 32)) == (48, 32)
    assert inspection.image_size(classifier((48, 48)).state_dict()) == (48, 48)


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
def test_impossible_saved_arguments_are_refused(value, form):
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


def test_guesses_are_logged(caplog):
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
def test_sizes_are_bounded_by_the_tensors(change, message):
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
        with pytest.raises(UserError, match="no complete decoder"):
            inspection.decoder_sizes({**state, name: value})
    with pytest.raises(UserError, match="it has 0 blocks dec_block"):
        inspection.decoder_sizes(classifier().state_dict())
    for mask in (torch.ones(3), torch.ones(10**3, 1), torch.ones(())):
        with pytest.raises(UserError, match="a mask of shape"):
            inspection.pretrain_options({"model": state}, {**state, "mask": mask})
