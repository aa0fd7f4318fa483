"""Studies: their datasets, the commands of their runs, stopping and resuming, users' mistakes."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fork_server import ForkedScript
from helpers import REPOSITORY

from studies import fashion_mnist, run, shards
from studies.budgets import BUDGETS
from studies.steps import Machine, Step
from studies.study import flags, load, names, only
from util.data.decode import with_pillow
from util.data.sources.readers import open_source
from util.errors import INTERRUPTED, UserError

ONE = Machine(processes=1, jobs=1)


@pytest.fixture(scope="module")
def clothes(tmp_path_factory) -> Path:
    """Noise in the format of Fashion-MNIST, unpacked: of ten classes 12 training and 8 validation images each."""
    originals, folder = (tmp_path_factory.mktemp(name) for name in ("originals", "clothes"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("t10k", 8)):
        labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), count))
        images = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        for kind, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            with gzip.open(originals / f"{split}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(header) + values.tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "PACKAGE", originals)
        fashion_mnist.unpack(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_package(monkeypatch, tmp_path):
    """Tests do not depend on Debian's package."""
    monkeypatch.setattr(fashion_mnist, "PACKAGE", tmp_path / "not installed")


def test_unpacked_fashion_mnist(clothes):
    for split, count in (("train", 120), ("val", 80)):
        source = open_source(f"wds:{clothes}", split)
        assert source.classes == fashion_mnist.CLASSES
        assert len(source.labels) == count
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(10), 12))
    images = rng.integers(0, 256, (120, 28, 28), dtype=np.uint8)
    source = open_source(f"wds:{clothes}", "train")
    assert source.labels.tolist() == labels.tolist()
    assert (np.asarray(with_pillow(source.read(7)))[..., 0] == images[7]).all()


def test_few_labels_are_balanced_and_fixed_by_the_seed(clothes, tmp_path):
    """An epoch repeats each image; val/ has all images, by a link."""
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        data = f"wds:{clothes}"
        shards.write_subset(data, data, tmp_path / name, per_class=3, seed=seed, repeats=2)
        source = open_source(f"wds:{tmp_path / name}", "train")
        contents = Counter(source.read(i) for i in range(len(source.labels)))
        assert np.bincount(source.labels).tolist() == [6] * 10
        assert len(contents) == 30
        assert set(contents.values()) == {2}
        drawn.append(set(contents))
        assert len(open_source(f"wds:{tmp_path / name}", "val").labels) == 80
        assert (tmp_path / name / "val" / "000000.tar").is_symlink()
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(UserError, match="has 12 images: 13 cannot be drawn"):
        shards.write_subset(f"wds:{clothes}", f"wds:{clothes}", tmp_path / "d", per_class=13, seed=0)


def test_subsets_can_be_moved_with_what_they_link_to(clothes, tmp_path):
    """A missing shard is named; shards outside the folder are not moved."""
    data, moved = tmp_path / "data", tmp_path / "deeper" / "moved"
    shards.write_subset(f"wds:{clothes}", f"wds:{clothes}", data / "a", per_class=5, seed=0, val_per_class=4)
    shards.write_subset(f"wds:{data / 'a'}", f"wds:{data / 'a'}", data / "b", per_class=3, seed=0)
    shards.write_subset(f"wds:{data / 'a'}", f"wds:{data / 'b'}", data / "c", per_class=3, seed=1)
    shards.write_subset(f"wds:{clothes}", f"wds:{clothes}", data / "d", per_class=3, seed=0)
    moved.parent.mkdir()
    data.rename(moved)
    for name, images in (("b", 40), ("c", 40), ("d", 80)):
        assert len(open_source(f"wds:{moved / name}", "val").labels) == images
    (moved / "a" / "val" / "0.tar").unlink()
    with pytest.raises(UserError, match=r"b/val/000000.tar links to ../../a/val/0.tar, which is gone"):
        shards.write_subset(f"wds:{moved / 'a'}", f"wds:{moved / 'a'}", moved / "b", per_class=3, seed=0)


def test_few_labels_are_drawn_only_where_they_are_asked_for(clothes, tmp_path):
    """Otherwise a class may have fewer images."""
    found = run.find_data(f"wds:{clothes}", tmp_path, BUDGETS["cpu"], ("all",), [0])
    assert (found.few, list(tmp_path.iterdir())) == ({}, [])
    with pytest.raises(UserError, match="100 cannot be drawn"):
        run.find_data(f"wds:{clothes}", tmp_path, BUDGETS["cpu"], ("few", "all"), [0])


def planned(study: str, budget: str, seeds: tuple[int, ...] = (0,), **more: str) -> list[run.ArmRun]:
    data = run.Data("wds:all", {seed: f"wds:few{seed}" for seed in seeds}, classes=10)
    more = {kind: more.get(kind or "both", "") for kind in ("", "pretrain", "finetune")}
    return run.plan(only(load(study), budget), BUDGETS[budget], list(seeds), data, Path("out/runs"), more)


def steps_of(runs: list[run.ArmRun]) -> list[Step]:
    return [step for r in runs for step in (r.pretrain, r.finetune) if step is not None]


@pytest.mark.parametrize("study", names())
def test_every_command_is_valid(study):
    """The scripts' parsers accept it; with the smallest budget, the models can be built."""
    for budget in BUDGETS:
        for step in steps_of(planned(study, budget, (3,))):
            args = run.parse(step, ONE)
            assert args.seed == 3
            assert args.output_dir == f"out/runs/{step.name}"
            assert args.resume == "auto"
    run.check(steps_of(planned(study, "cpu")), ONE)


def test_equal_runs_are_shared(tmp_path):
    """By labels, arms and studies. Seeds, flags and data distinguish runs, the number of processes does not."""
    runs = planned("pretrain_vs_scratch", "cpu", (0, 1))
    assert len(steps_of(runs)) == 12
    assert len({step.name for step in steps_of(runs)}) == 10
    shared = {r.pretrain.name for r in runs if r.pretrain} & {r.pretrain.name for r in planned("order", "cpu", (0, 1))}
    assert len(shared) == 2
    step = runs[-1].finetune
    two = run.parse(step, Machine(processes=2, jobs=1))
    assert (two.batch_size, two.output_dir) == (8, run.parse(step, ONE).output_dir)
    with pytest.raises(UserError, match="--processes 3 cannot share out a batch of 16"):
        run.parse(step, Machine(processes=3, jobs=1))


def test_more_flags(monkeypatch):
    """They replace the budget's flags, and an arm's flags replace them; both spellings count, abbreviations do not."""
    more = {"finetune": "--layer_decay=0.75 --epochs=20", "pretrain": "--cluster_size 3"}
    random, pretrained, *_ = planned("pretrain_vs_scratch", "cpu", **more)
    assert run.parse(random.finetune, ONE).layer_decay == 1
    assert run.parse(pretrained.finetune, ONE).layer_decay == 0.75
    assert run.parse(pretrained.pretrain, ONE).cluster_size == 3
    assert run.parse(pretrained.finetune, ONE).epochs == 20
    assert pretrained.finetune.flags["--epochs"] == ["20"]
    spaced = planned("pretrain_vs_scratch", "cpu", **{kind: text.replace("=", " ") for kind, text in more.items()})
    assert pretrained.finetune.name == spaced[1].finetune.name
    for words in ("--epoch 20", "--epoch=20"):
        with pytest.raises(UserError, match="unrecognized arguments: --epoch 20"):
            run.check(steps_of(planned("order", "cpu", both=words)), ONE)
    sharded = planned("order", "cpu", both="--fsdp")[0].pretrain
    with pytest.raises(UserError, match="--fsdp shards over processes"):
        run.parse(sharded, ONE)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run.parse(sharded, Machine(processes=2, jobs=1)).fsdp
    assert "WORLD_SIZE" not in os.environ


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def begun(argv: list[str], folder: Path, **how: object) -> subprocess.Popen:
    """Return a runner with one job, once its run has written a checkpoint."""
    runner = ForkedScript([sys.executable, "-m", "studies.run", *argv, "--jobs", "1"], cwd=REPOSITORY, **how)
    end = time.monotonic() + 120
    while not list(folder.glob("runs/pretrain-*/checkpoint-last.pth")):
        assert runner.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    return runner


def test_a_study_that_is_asked_to_stop_several_times(clothes, tmp_path):
    """As by `timeout`, and by pressing Ctrl-C again: it waits for its run and ends with one line."""
    argv = ["order", "--smoke", "--data_path", f"wds:{clothes}", "--output", str(tmp_path)]
    runner = begun(argv, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        runner.send_signal(number)
        time.sleep(0.05)
    said = runner.communicate(timeout=60)[0]
    assert runner.returncode == INTERRUPTED
    assert said.splitlines()[-1] == "studies.run: stopped; the same command resumes"
    (output,) = tmp_path.glob("runs/*/output.txt")
    assert "stopped in epoch" in output.read_text().splitlines()[-1]


def test_a_killed_study_resumes(clothes, tmp_path, run_script, capsys):
    """It is killed during pretraining, resumed to the end, and started a third time with nothing left to do."""
    argv = ["pretrain_vs_scratch", "--smoke", "--data_path", f"wds:{clothes}", "--output", str(tmp_path)]
    first = begun(argv, tmp_path)
    (lock,) = tmp_path.glob("runs/*/run.lock")
    pid = json.loads(lock.read_text())["pid"]
    first.kill()
    first.wait()
    run_script(run, *argv)  # while the run of the first runner may still be stopping
    assert not alive(pid)
    (folder,) = tmp_path.glob("runs/pretrain-*")
    stopped, _, resumed = (folder / "output.txt").read_text().partition("resuming from")
    assert "main_pretrain.py: stopped in epoch" in stopped  # because its runner was killed
    assert "epoch 1: loss" in resumed
    results = json.loads((tmp_path / "pretrain_vs_scratch-smoke" / "results.json").read_text())
    assert [(r["labels"], r["arm"]) for r in results["runs"]] == [
        (labels, arm) for labels in ("20 labels", "all 80 labels") for arm in ("random weights", "pretrained")
    ]
    for r in results["runs"]:
        last = json.loads((tmp_path / "runs" / r["finetune"]["run"] / "log.txt").read_text().splitlines()[-1])
        assert (r["accuracy"], r["loss"], r["images"], last["epoch"]) == (last["test_acc1"], last["test_loss"], 80, 1)
        assert f"--seed {r['seed']}" in r["finetune"]["command"]
    assert [r["pretrain"]["attempts"] for r in results["runs"] if r["pretrain"]] == [2, 2]
    killed, second = results["runs"][1]["pretrain"]["machines"]
    assert (killed["jobs"], second["jobs"]) == (1, len(os.sched_getaffinity(0)))
    assert (tmp_path / "pretrain_vs_scratch-smoke" / "plot.png").stat().st_size > 10000
    assert "| all 80 labels | pretrained |" in (tmp_path / "pretrain_vs_scratch-smoke" / "table.md").read_text()

    before = {path: path.read_bytes() for path in tmp_path.glob("runs/*/run.json")}
    assert len(before) == 5
    capsys.readouterr()
    run_script(run, *argv)
    assert "5 runs, 5 of them finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.glob("runs/*/run.json")} == before


@pytest.mark.parametrize(
    "argv",
    [["--arms", "rows", "spiral"], ["--flags=--input_size 25"], ["--flags=--unknown 1"], ["--processes", "3"]],
    ids=["arms", "sizes", "flags", "processes"],
)
def test_mistakes_are_found_before_data_are_written(argv, run_script, monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "unpack", lambda folder: pytest.fail("unpacked"))
    with pytest.raises(SystemExit) as ended:
        run_script(run, "order", "--budget", "cpu", "--output", tmp_path / "out", *argv)
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


def test_data_whose_name_is_not_utf8(clothes, tmp_path):
    """It is passed on unchanged to folders and commands."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 a")
    os.symlink(clothes, path)
    found = run.find_data(f"wds:{path}", tmp_path / "data", BUDGETS["smoke"], ("few",), [0])
    step = Step("pretrain", 0, flags("--batch_size 8") | {"--data_path": [found.everything]}, tmp_path)
    assert len(open_source(found.everything, "train").labels) == 80
    assert run.parse(step, ONE).data_path == [found.everything]


def test_mistakes_of_users(run_script, capsys, tmp_path, clothes):
    data = ["--smoke", "--data_path", f"wds:{clothes}", "--output", tmp_path]
    for argv, wanted in (
        (["sizes"], "unknown study 'sizes'; choose from cluster_size, "),
        (
            ["order", "--arms", "rows", "spiral"],
            "budget cpu has no arm 'spiral'; choose from 'rows', 'rows, backwards', ",
        ),
        (["order", "--data_path", tmp_path / "none", "--output", tmp_path], "no such folder"),
        (["order", "--data_path="], "argument --data_path: it is empty"),
        (["order", "--output", tmp_path, "--flags=--batch_size x"], "--batch_size x is no number of images"),
        (["order", "--output", tmp_path, "--flags=--input_size 25"], "does not divide"),
        (["order", "--output", tmp_path], "Fashion-MNIST cannot be downloaded: "),
        (["order", "--output", os.fsdecode(b"caf\xe9")], "--output caf\\xe9: TensorBoard needs a name in UTF-8"),
        (["cluster_size", *data, "--arms", "4 x 4 patches"], "budget smoke has no arm '4 x 4 patches'; choose from"),
        (["decoder", *data, "--flags", "lr 1"], "lr: flags begin with --"),
        (["decoder", *data, "--flags", "--aa 'x"], "--aa 'x: No closing quotation"),
        (["decoder", *data, "--flags", "--batch_size abc"], "--batch_size abc is no number of images"),
        (["decoder", *data, "--flags", "--batch_size 1" + "0" * 5000], " is no number of images"),
        (["decoder", *data, "--flags=--batch_size"], "--batch_size  is no number of images"),
        (["decoder", *data[:-1], "/dev/null"], "Not a directory: '/dev/null/data'"),
        (["decoder", *data[:-1], "x" * 5000], "File name too long"),
        (["pretrain_vs_scratch", *data, "--pretrain_flags", "--cluster_size 5"], "does not divide"),
        (["pretrain_vs_scratch", *data, "--finetune_flags", "--layers 5"], "unrecognized arguments: --layers 5"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_script(run, *argv)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert wanted in error
        assert error.count("\n") == 1
        assert len(error) < 1000
    assert not (tmp_path / "runs").exists()
