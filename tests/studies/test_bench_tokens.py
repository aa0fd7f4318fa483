"""Run bench_tokens.py with small images: what it prints, writes and draws, and that it rejects mistakes."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench_tokens


def run(*argv):
    bench_tokens.main(bench_tokens.get_args_parser().parse_args([str(word) for word in ("--device", "cpu", *argv)]))


def test_tokens(tmp_path, capsys, monkeypatch):
    """Times of all models at all sizes, and memory in a fresh process, which is that of a larger pass."""
    apart = []

    def in_fresh_process(function, *words):
        apart.append(words)
        return 10**6 * len(apart)

    monkeypatch.setattr(bench_tokens, "in_fresh_process", in_fresh_process)
    output, picture = tmp_path / "tokens.json", tmp_path / "tokens.png"
    run("--pixels", 64, 32, "--rounds", 2, "--output", output, "--plot", picture)
    report, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert {"date", "torch", "cpu", "threads", "width", "clock"} <= report.keys()
    assert [(row["pixels"], row["tokens"]) for row in report["results"]] == [(32, 4), (64, 16)]
    for row in report["results"]:
        assert list(row["models"]) == list(bench_tokens.MODELS)
        for name, passes in row["models"].items():
            assert 0 < passes["forward"]["seconds"] < passes["train"]["seconds"]
            assert len(passes["train"]["seconds_of_rounds"]) == 2
            number = apart.index((name, "tiny", row["pixels"], 1, "train")) + 1
            assert passes["train"]["peak_bytes"] == 10**6 * number
            assert f"{1e6 * passes['train']['seconds'] / row['tokens']:.1f}" in printed
    assert f"peak forward {math.log(7) / math.log(4):.2f}" in printed
    assert np.asarray(Image.open(picture).convert("L")).std() > 10


def test_models_of_the_same_size():
    """All have the width and the depth of the ViT, whose attention is the fused one."""
    cpu = torch.device("cpu")
    arm, one, vit = (bench_tokens.build(name, "tiny", 64, cpu) for name in bench_tokens.MODELS)
    assert arm.embed_dim == one.embed_dim == vit.embed_dim
    assert len(arm.layers) == len(one.layers) == len(vit.blocks)
    assert (len(arm.order), len(one.order)) == (4, 1)
    assert all(block.attn.fused_attn for block in vit.blocks)
    assert {model.forward_features(torch.randn(1, 3, 64, 64)).shape for model in (arm, one, vit)} == {(1, 17, 192)}


def test_a_model_that_does_not_fit(monkeypatch, tmp_path, capsys):
    """The others are measured, and the row says so."""
    right = bench_tokens.run_pass

    def run_pass(model, images, kind):
        if kind == "train" and hasattr(model, "blocks"):
            raise torch.OutOfMemoryError
        right(model, images, kind)

    monkeypatch.setattr(bench_tokens, "run_pass", run_pass)
    monkeypatch.setattr(bench_tokens, "in_fresh_process", lambda *words: None)
    run("--pixels", 32, "--rounds", 1, "--output", tmp_path / "t.json", "--plot", tmp_path / "t.png")
    ((row,), printed) = json.loads((tmp_path / "t.json").read_text())["results"], capsys.readouterr().out
    assert row["models"]["ViT"]["train"] == {"out_of_memory": True}
    assert row["models"]["ARM, 1 direction"]["train"]["seconds"] > 0
    assert re.search(r"ViT .* memory +- +-$", printed, re.MULTILINE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory():
    """A fresh process counts what a pass holds at a time; with gradients, the inputs of all products and parameters."""
    forward, train = (
        bench_tokens.in_fresh_process(bench_tokens.resident_peak, "ViT", "tiny", 512, 1, kind)
        for kind in bench_tokens.PASSES
    )
    parameters = sum(p.nbytes for p in bench_tokens.build("ViT", "tiny", 512, torch.device("cpu")).parameters())
    hidden = 4 * 1025 * 4 * 192  # bytes of the widest layer
    assert 3 * hidden < forward < train / 4
    assert parameters + 24 * hidden < train < 4 * (parameters + 24 * hidden)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pixels 32 250", "--pixels 250: it does not divide into two or more patches of 16"),
        ("--pixels 16", "--pixels 16: it does not divide into two or more patches of 16"),
        ("--plot x.jpg", "--plot x.jpg: it has to end in .png"),
        ("--plot /dev/null/x.png", "--plot /dev/null/x.png cannot be written"),
        ("--output /dev/null/x.json", "--output /dev/null/x.json cannot be written"),
    ],
)
def test_mistakes(run_script, capsys, words, message):
    with pytest.raises(SystemExit, match=r"^2$"):
        run_script(bench_tokens, "--device", "cpu", *words.split())
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
