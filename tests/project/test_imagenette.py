"""recipes/imagenette.sh: its commands, and one whole run on a few images."""

import itertools
import json
import os
import subprocess

import numpy as np
import pytest
import torch
from fork_server import run_forked
from helpers import REPOSITORY, read_log
from PIL import Image

from main_pretrain import build_model
from util.checkpoints import checkpoint_file
from util.seeding import seed_everything

RECIPE = REPOSITORY / "recipes" / "imagenette.sh"
# stands in for Python: it notes its arguments, code from the standard input among them, and fails on demand
NOTE = """#!/bin/bash
[ "$1" != - ] || set -- -c "$(cat)" "${@:2}"
printf '%s\\0' "$#" "$@" >>"$NOTES"
[[ -z $FAILS || "$*" != *$FAILS* ]]
"""


@pytest.fixture
def noted(tmp_path):
    """Run the recipe without running its steps; return its exit status and the arguments of each step."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(NOTE)
    python.chmod(0o755)

    def run(*arguments, data="", fails=""):
        (tmp_path / "notes").write_text("")
        how = {"PATH": f"{python.parent}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}
        how |= {"DATA": data, "FAILS": fails}
        done = subprocess.run(["bash", RECIPE, *arguments], env=os.environ | how, capture_output=True, cwd=REPOSITORY)
        words, steps = (tmp_path / "notes").read_text().split("\0")[:-1], []
        while words:
            steps.append([words.pop(0) for _ in range(int(words.pop(0)))])
        return done.returncode, steps

    return run


def test_steps(noted):
    """Each resumes; one that fails ends the recipe; the head says what is not known."""
    status, steps = noted("out", "--seed", "7")
    assert status == 0
    kinds = ["main_pretrain.py"] * 2 + ["Evaluation/probe.py"] * 2 + ["Finetuning/main_finetune.py"] * 2
    assert [step[0] for step in steps] == [*kinds, "-c"]
    for step in steps[:-1]:
        assert ("--resume auto" in " ".join(step)) == ("--seed 7" in " ".join(step)) == ("probe" not in step[0])
        assert step[step.index("--data_path") + 1].startswith("hfds:frgfm/imagenette@")
    assert noted("out", "--seed", "7", fails="probe.py") == (1, steps[:3])
    assert noted()[1] == []
    head = RECIPE.read_text().partition("\nset ")[0]
    for words in ("Recipe: not published, and not run here", "Reaches: not measured", "Takes: not measured"):
        assert f"\n# {words}" in head
    after = [dict(itertools.pairwise(step)) for step in steps if "--epochs" in step]
    updates = [9469 // int(flags["--batch_size"]) * int(flags["--epochs"]) for flags in after]
    assert f"{updates[0]:,} updates of pretraining and {sum(updates[2:]):,} of finetuning" in head


def test_imagenette(noted, tmp_path):
    """Its last lines are the accuracies that its steps have written; the random weights are the initial ones."""
    library, rng = pytest.importorskip("datasets"), np.random.default_rng(0)
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b", "c"])})
    for split, labels in (("train", [0, 1, 2] * 8), ("validation", [0, 1, 2] * 5)):
        pixels = (rng.normal(100 + 9 * label, 50, (40, 53, 3)).clip(0, 255).astype(np.uint8) for label in labels)
        rows = library.Dataset.from_dict({"image": map(Image.fromarray, pixels), "label": labels}, features=features)
        rows.to_parquet(tmp_path / f"images/{split}-0.parquet")
    small = "--device cpu --num_workers 0 --batch_size 8 --input_size 96 --embed_dim 32 --depth 6 --epochs 1".split()
    out = tmp_path / "the output"
    for step in noted(out, *small, data=f"hfds:{tmp_path / 'images'}")[1]:
        done = run_forked(step, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
    wanted = ["| top-1 (%) | 20-NN | linear | finetuned for 1 epochs |", "| --- | --- | --- | --- |"]
    for weights, run in (("pretrained", "finetuned"), ("random", "finetuned_random")):
        probes = json.loads((out / weights / "checkpoint-last.probe.json").read_text())["results"]
        values = *(row["acc1"] for row in probes), read_log(out / run)[-1]["test_acc1"]
        wanted.append(f"| {weights} weights | {' | '.join(f'{value:.1f}' for value in values)} |")
    assert done.stdout.splitlines()[-4:] == wanted
    content = checkpoint_file.read(out / "random" / "checkpoint-last.pth")
    seed_everything(content["args"].seed)
    for name, weight in build_model(content["args"]).state_dict().items():
        assert torch.equal(weight, content["model"][name]), name
