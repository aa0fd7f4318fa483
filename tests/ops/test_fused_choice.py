"""The choice of the fused operators of a run."""

import argparse

import pytest
import torch
from helpers import TINY_FINETUNE, TINY_PRETRAIN

import main_pretrain
import ops
from Finetuning import main_finetune
from ops import fused, kernel_choice, measured

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICE = GPU if torch.cuda.is_available() else CPU  # without a GPU Triton interprets the kernels
pytestmark = [pytest.mark.gpu] if DEVICE == GPU else []


@pytest.fixture(autouse=True)
def _none_afterwards():
    yield
    fused.use(["none"], CPU)


def test_choice(monkeypatch):
    monkeypatch.setattr(fused, "unavailable", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(measured, "FASTER", {name: {} for name in measured.FASTER} | {"norm": {(9, 0): "a file"}})
    assert fused.use(["auto"], GPU) == ["norm"]
    assert fused.uses("norm")
    assert not fused.uses("swiglu")
    assert fused.use(["auto"], CPU) == []
    assert fused.use(["none"], GPU) == []
    assert fused.use(["all"], GPU) == list(fused.FUSED)
    assert fused.use(["conv", "norm"], GPU) == ["norm", "conv"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fused.use(["auto"], GPU) == []
    monkeypatch.setattr(fused, "unavailable", lambda name: "no compiler")
    assert fused.use(["auto"], GPU) == []
    with pytest.raises(ops.BackendUnavailable, match="need Triton: no compiler"):
        fused.use(["norm"], GPU)


@pytest.mark.parametrize("names", [["all", "norm"], ["norm", "none"], ["auto", "conv"]])
def test_all_none_and_auto_cannot_be_combined_with_names(names):
    with pytest.raises(
        ValueError, match=r"^(all|none|auto) decides for all operators and cannot be combined with other"
    ):
        fused.use(names, DEVICE)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (main_pretrain, "augment", "--fused_ops augment: pretraining only crops and flips"),
        (main_pretrain, "norm casts --no_compile", "--fused_ops casts: the model is not compiled"),
        (
            main_finetune,
            "augment --loader pil",
            "--fused_ops augment: it carries out RandAugment on the training device",
        ),
        (main_finetune, "augment --aa none", "--fused_ops augment: it carries out RandAugment on the training device"),
    ],
)
def test_operators_that_have_nothing_to_do(script, words, message, image_folder, tmp_path, run_script, capsys):
    tiny = TINY_PRETRAIN if script is main_pretrain else TINY_FINETUNE
    words = ["--fused_ops", *words.split(), "--data_path", image_folder, "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as exit_info:
        run_script(script, *tiny, *words)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_run_logs_its_operators(caplog):
    args = argparse.Namespace(scan_backend="torch", fused_ops=["all"], cuda_graph=False, compile=False)
    with caplog.at_level("INFO", "arm"):
        kernel_choice.choose(args, DEVICE, 32, {"augment": "no images"})  # nor casts without a compiler
    assert args.fused_ops == ["swiglu", "norm", "conv", "projections"]
    assert not fused.uses("casts")
    assert "fused operators: swiglu, norm, conv, projections" in caplog.messages


def test_every_default_is_measured():
    """Each entry of the table names a committed file of results, of a GPU."""
    for places in measured.FASTER.values():
        for capability, file in places.items():
            assert capability >= (8, 0)
            assert (ops.measured.RESULTS / file).is_file(), file


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_requested_where_they_cannot_work(image_folder, tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--fused_ops", "norm", "swiglu"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, *words)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--fused_ops norm swiglu: fused operators are Triton kernels for CUDA, and the model is on cpu" in line
