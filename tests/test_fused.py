"""The fused operators: who chooses them."""

import pytest
import torch

import main_pretrain
import ops
from conftest import TINY_PRETRAIN
from ops import fused, measured

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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


def test_what_is_taken_is_measured():
    """Each entry of the table names a committed file of results, of a GPU."""
    for places in measured.FASTER.values():
        for capability, file in places.items():
            assert capability >= (8, 0)
            assert (ops.measured.RESULTS / file).is_file(), file


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_asked_for_where_they_cannot_work(image_folder, tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--fused_ops", "norm", "swiglu"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, *words)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--fused_ops norm swiglu: fused operators are Triton kernels for CUDA, and the model is on cpu" in line
