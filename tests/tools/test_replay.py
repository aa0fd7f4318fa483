"""Test replay_nonfinite.py: a damaged folder gives one line."""

import os

import pytest
import torch
from helpers import TINY_PRETRAIN

import main_pretrain
from tools import replay_nonfinite


@pytest.fixture
def bundle(tmp_path):
    """Return state and batches as a run of one process writes them, and a folder."""
    args = main_pretrain.get_args_parser().parse_args([*TINY_PRETRAIN, "--data_path", "x"])
    args.world_size = 1
    state = {"model": main_pretrain.build_model(args).state_dict(), "args": args, "epoch": 0}
    batches = [[torch.randn(2, 3, 48, 32), torch.tensor([0, 1])]]
    return state, {"batches": batches, "epoch": 0, "first": 4}, tmp_path


def write(bundle):
    state, update, folder = bundle
    torch.save(state, folder / "state.pth")
    torch.save(update, folder / "batches-rank0.pth")
    return folder


def test_a_whole_bundle(bundle, run_script, capsys):
    run_script(replay_nonfinite, write(bundle), "--device", "cpu")
    out = capsys.readouterr().out
    assert "rank 0, batch 4: loss" in out
    assert out.endswith("everything is finite here\n")


UPDATES = {
    "no batches": {"batches": []},
    "no pair of images of 3 x 48 x 32": {"batches": [[torch.randn(2, 3, 48, 48), torch.tensor([0, 1])]]},
    "no pair": {"batches": [[torch.randn(2, 3, 48, 32)]]},
    "is no pair of": {"batches": [[torch.randn(2, 3, 48, 32), torch.tensor([0.0, 1.0])]]},
    "a batch is no": {"batches": [[torch.randn(3, 3, 48, 32), torch.tensor([0, 1])]]},
    "batch is": {"batches": ["x"]},
    "it has no batches": {"batches": "x"},
    "no number first": {"first": -1},
    "no number epoch": {"epoch": None},
}
ARGS = {
    "args say world_size": {"world_size": 10**30},
    "args say world_size 0": {"world_size": 0},
    "does not hold the arguments": {"seed": -1},
    "args lack seed": {"seed": None},
    "model": {"model": 5},
    "args say input_size": {"input_size": "x"},
    "cluster": {"cluster_size": 5},
    "state.pth: ": {"dec_depth": "x"},
}


@pytest.mark.parametrize("message", [*UPDATES, *ARGS, "no checkpoint file", "holds no batches", "args"])
def test_odd_bundles(bundle, message, run_script, capsys):
    state, update, folder = bundle
    update |= UPDATES.get(message, {})
    for name, value in ARGS.get(message, {}).items():
        setattr(state["args"], name, value)
    if message == "args":
        state["args"] = {"world_size": 1, "seed": 0}
    write(bundle)
    if message == "no checkpoint file":
        os.remove(folder / "state.pth")
    if message == "holds no batches":
        (folder / "batches-rank0.pth").rename(folder / "batches-rank1.pth")  # of more processes than the run had
    with pytest.raises(SystemExit) as ended:
        run_script(replay_nonfinite, folder, "--device", "cpu")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
