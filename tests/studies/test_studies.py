"""Studies: every command, the runner with its end and its going on, and the numbers that it reports."""

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY

from studies import fashion_mnist, report, run, shards
from studies.budgets import BUDGETS
from studies.steps import Machine, Step, run_steps
from studies.study import flags, load, names, only
from util.data.decode import with_pillow
from util.data.readers import open_source
from util.errors import INTERRUPTED, RunError, UserError

ONE = Machine(processes=1, jobs=1)


@pytest.fixture(scope="module")
def clothes(tmp_path_factory) -> Path:
    """Noise in the files of Fashion-MNIST, unpacked: ten classes, 12 images each to train, 8 to validate."""
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
    """Whether Debian's package is installed changes nothing."""
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
    """Each folder is drawn anew; an epoch has each image so often; val/ is the whole one, without a copy."""
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
    """A shard that is gone is named; shards of others stay where they are."""
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


def test_one_runner_makes_data(tmp_path):
    """A second one waits until the first has made them, or has died."""
    program = "import sys; from pathlib import Path; from studies import shards\nprint('waits', flush=True)\n"
    program += "with shards.alone(Path(sys.argv[1])): Path(sys.argv[1], 'made').touch()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with shards.alone(tmp_path):
        second = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert second.stdout.readline() == b"waits\n"
        time.sleep(0.5)
        assert not (tmp_path / "made").exists()
    assert second.wait(60) == 0
    assert (tmp_path / "made").exists()
    second.stdout.close()


def test_few_labels_are_drawn_only_where_they_are_asked_for(clothes, tmp_path):
    """No class need have as many images else."""
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
    """For the scripts' own parsers; and for a small budget their models can be built."""
    for budget in BUDGETS:
        for step in steps_of(planned(study, budget, (3,))):
            args = run.parse(step, ONE)
            assert args.seed == 3
            assert args.output_dir == f"out/runs/{step.name}"
            assert args.resume == "auto"
    run.check(steps_of(planned(study, "cpu")), ONE)


def test_equal_runs_are_one(tmp_path):
    """Pretraining is shared by labels, arms and studies; seeds, flags and data tell runs apart; processes do not."""
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
    """Count less than those of an arm, more than the budget's, in either form; are known by whole names only."""
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


def test_gpus_are_shared_out(monkeypatch):
    """By processes of a run, then by runs: as many groups as there are whole ones."""
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    for budget, processes, jobs, wanted in (
        ("imagenet", None, 1, ["0,1,2,3,4,5,6,7"]),
        ("imagenet", 4, 2, ["0,1,2,3", "4,5,6,7", "0,1,2,3"]),
        ("imagenet", 3, 2, ["0,1,2", "3,4,5", "0,1,2"]),
        ("gpu", None, 96, ["0", "1", "2"]),
    ):
        machine = run.find_machine(Namespace(processes=processes, jobs=None), BUDGETS[budget])
        assert machine.jobs == jobs
        assert [machine.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(len(wanted))] == wanted
    assert "CUDA_VISIBLE_DEVICES" not in ONE.environment(0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def begun(argv: list[str], folder: Path, **how: object) -> subprocess.Popen:
    """A runner with one job, once that has written a checkpoint."""
    runner = subprocess.Popen([sys.executable, "-m", "studies.run", *argv, "--jobs", "1"], cwd=REPOSITORY, **how)
    end = time.monotonic() + 120
    while not list(folder.glob("runs/pretrain-*/checkpoint-last.pth")):
        assert runner.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    return runner


def test_a_study_that_is_told_to_stop_several_times(clothes, tmp_path):
    """As `timeout` does, and who presses Ctrl-C again: it waits for its run, and says so in one line."""
    argv = ["order", "--smoke", "--data_path", f"wds:{clothes}", "--output", str(tmp_path)]
    runner = begun(argv, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        runner.send_signal(number)
        time.sleep(0.05)
    said = runner.communicate(timeout=60)[0]
    assert runner.returncode == INTERRUPTED
    assert said.splitlines()[-1] == "studies.run: stopped; the same command goes on"
    (output,) = tmp_path.glob("runs/*/output.txt")
    assert "stopped in epoch" in output.read_text().splitlines()[-1]


def test_killed_study_goes_on(clothes, tmp_path, run_script, capsys):
    """Killed in the middle of pretraining, started again to the end, and a third time with nothing left to do."""
    argv = ["pretrain_vs_scratch", "--smoke", "--data_path", f"wds:{clothes}", "--output", str(tmp_path)]
    first = begun(argv, tmp_path)
    (lock,) = tmp_path.glob("runs/*/run.lock")
    pid = json.loads(lock.read_text())["pid"]
    first.kill()
    first.wait()
    run_script(run, *argv)  # while what the first one has started may still be ending
    assert not alive(pid)
    (folder,) = tmp_path.glob("runs/pretrain-*")
    stopped, _, gone_on = (folder / "output.txt").read_text().partition("going on from")
    assert "main_pretrain.py: stopped in epoch" in stopped  # when its runner was killed
    assert "epoch 1: loss" in gone_on
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
def test_a_mistake_is_told_before_data_are_made(argv, run_script, monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "unpack", lambda folder: pytest.fail("unpacked"))
    with pytest.raises(SystemExit) as ended:
        run_script(run, "order", "--budget", "cpu", "--output", tmp_path / "out", *argv)
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


RECORDS = [
    "",
    "[]",
    "{",
    "NaN",
    "[" * 100_000,
    '{"finished": true}',
    '{"finished": true, "attempts": []}',
    '{"finished": 1, "attempts": []}',
    '{"finished": false, "attempts": [1]}',
    '{"finished": false, "attempts": [{"start": 1}]}',
    '{"finished": true, "attempts": [{"command": "", "commit": null, "start": 1, "end": null}]}',
]


@pytest.mark.parametrize("text", RECORDS, ids=lambda text: text[:70] or "empty")
def test_a_damaged_record_is_named(tmp_path, text):
    """Before anything starts."""
    step = Step("pretrain", 0, flags("--data_path /nowhere --batch_size 8 --epochs 1"), tmp_path)
    step.folder.mkdir()
    step.path("run.json").write_text(text)
    with pytest.raises(UserError, match=rf"^{re.escape(str(step.path('run.json')))} is ") as raised:
        run_steps([step], ONE, None)
    assert "\n" not in str(raised.value)
    assert [path.name for path in step.folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["runner.lock", "output.txt"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_files_of_a_run_are_files(tmp_path, name, kind):
    """Another file is neither truncated nor extended through a link; a pipe is not waited for."""
    step = Step("pretrain", 0, flags("--data_path /nowhere --batch_size 8 --epochs 1"), tmp_path / "runs")
    step.folder.mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    if kind == "link":
        step.path(name).symlink_to(tmp_path / "precious")
    elif kind == "fifo":
        os.mkfifo(step.path(name))
    else:
        step.path(name).mkdir()
    with pytest.raises(UserError, match=re.escape(str(step.path(name)))):
        run_steps([step], ONE, None)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_command_is_not_written_through_a_link(tmp_path):
    step = Step("pretrain", 0, flags("--data_path /nowhere --batch_size 8 --epochs 1"), tmp_path / "runs")
    step.folder.mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    step.path("command.txt").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match="/nowhere: no such folder"):
        run_steps([step], ONE, None)
    assert (tmp_path / "precious").read_text() == "precious"
    assert "--data_path /nowhere" in step.path("command.txt").read_text()


def test_a_log_without_a_value_is_named(tmp_path):
    """As another program, or a damaged disk, may have left it."""
    step = Step("finetune", 0, flags("--batch_size 8 --epochs 1"), tmp_path)
    step.folder.mkdir()
    attempts = [{"command": "python", "commit": None, "start": 1.0, "end": 2.0}]
    step.write({"finished": True, "attempts": attempts})
    row = {"epoch": 0, "train_loss": 1.0, "test_acc1": 50.0, "test_loss": 1.0, "test_images": 7, "images_per_second": 9}
    step.path("log.txt").write_text(json.dumps(row))
    assert step.result()["test_acc1"] == 50.0
    for name, value in (("test_acc1", None), ("train_loss", "1"), ("images_per_second", [])):
        step.path("log.txt").write_text(json.dumps(row | {name: value}))
        with pytest.raises(RunError, match=f"log.txt has no {name} of epoch 0"):
            step.result()


def test_data_whose_name_is_not_utf8(clothes, tmp_path):
    """Runs, their folders and commands take it as it is."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 a")
    os.symlink(clothes, path)
    found = run.find_data(f"wds:{path}", tmp_path / "data", BUDGETS["smoke"], ("few",), [0])
    step = Step("pretrain", 0, flags("--batch_size 8") | {"--data_path": [found.everything]}, tmp_path)
    assert len(open_source(found.everything, "train").labels) == 80
    assert run.parse(step, ONE).data_path == found.everything


def test_a_failed_run_ends_the_study(tmp_path):
    """With what it said; and it does not count as finished."""
    step = Step("pretrain", 0, flags("--data_path /nowhere --batch_size 8 --epochs 1 --device cpu"), tmp_path / "runs")
    with pytest.raises(RunError, match=r"failed with exit status 2(?s:.)*--data_path /nowhere: no such folder"):
        run_steps([step], ONE, None)
    assert not step.finished


def test_a_run_goes_on_whose_runner_died_before_its_first_word(tmp_path):
    """Between writing run.json and opening output.txt: that attempt has taken no time."""
    step = Step("pretrain", 0, flags("--data_path /nowhere --batch_size 8 --epochs 1 --device cpu"), tmp_path / "runs")
    step.folder.mkdir(parents=True)
    step.write({"finished": False, "attempts": [{"command": "", "commit": None, "start": 5.0, "end": None}]})
    with pytest.raises(RunError, match="failed with exit status 2"):
        run_steps([step], ONE, None)
    first, second = step.record["attempts"]
    assert (first["end"], "machine" in first) == (5.0, False)
    assert second["machine"]["jobs"] == 1


def result(arm: str, seed: int, accuracy: float) -> dict:
    times = {"seconds": 10.0 + seed, "machines": []}
    more = {"labels": "20 labels", "images": 10000, "curve": [accuracy], "pretrain": None, "finetune": times}
    return {"arm": arm, "seed": seed, "accuracy": accuracy, **more}


def test_numbers_of_the_table():
    """By hand: 1, 2, 4 have the sample deviation (7 / 3) ** 0.5, and 0, 2, 1 have 1; differences are 1, 0, 3."""
    runs = [result("a", seed, value) for seed, value in ((2, 1.0), (0, 0.0), (1, 2.0))]  # in any order
    runs += [result("b", seed, value) for seed, value in ((0, 1.0), (1, 2.0), (2, 4.0))]
    first, second = report.summary(runs)
    assert (first["mean"], first["std"], first["seeds"]) == (1.0, 1.0, [0, 1, 2])
    assert "compared" not in first
    assert second["mean"] == pytest.approx(7 / 3)
    assert second["std"] == pytest.approx(math.sqrt(7 / 3))
    assert (second["pretrain_seconds"], second["finetune_seconds"]) == (0, 11.0)
    wanted = {"difference": 4 / 3, "std": math.sqrt(7 / 3), "effect": 4 / 3 / math.sqrt((7 / 3 + 1) / 2)}
    half = 4.302653 * math.sqrt(7) / 3  # the t of a table with two degrees of freedom
    assert second["compared"].pop("interval") == pytest.approx((4 / 3 - half, 4 / 3 + half))
    assert second["compared"] == pytest.approx(wanted)
    machines = [{"jobs": 1, "cpu": "a CPU", "cores": 2, "torch": "2", "dates": ["today"]}]
    text = report.markdown({"runs": runs, "machines": machines, "budget": "cpu"})
    assert "| 20 labels | b | 2.33 ± 1.53 | +1.33 ± 1.53 | -2.46 to +5.13 | +1.0 | 3 | 0 + 11 |" in text
    assert report.compare([1.0], [2.0]) == {"difference": -1.0, "std": None, "interval": None, "effect": None}


def test_the_table_names_the_machines_of_the_runs():
    """Not that of the last command, except for runs that do not know theirs."""
    here = {"cpu": "here", "cores": 2, "jobs": 2, "torch": "2", "date": "2030-01-09"}
    runs = [result("a", seed, 1.0) for seed in range(4)]
    for r, date in zip(runs, ("2030-01-02", "2030-01-01", "2030-01-03", "2030-01-02"), strict=True):
        r["finetune"]["machines"] = [here | {"cpu": "there", "date": date}]
    (found,) = report.machines(runs, here)
    assert (found["cpu"], found["dates"]) == ("there", ["2030-01-01", "2030-01-03"])
    runs[0]["finetune"]["machines"] = []
    machines = report.machines(runs, here)
    text = report.markdown({"runs": runs, "machines": machines, "budget": "cpu"})
    assert text.endswith(
        "\nhere, 2 cores, 2 runs at a time, torch 2, 2030-01-09; "
        "there, 2 cores, 2 runs at a time, torch 2, 2030-01-01 to 2030-01-03.\n"
    )


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("studies/results/*/results.json")), ids=lambda p: p.parent.name)
def test_the_page_tells_what_was_found(path):
    """The table of every committed result, as its numbers give it, with the command."""
    results = json.loads(path.read_text())
    table, page = path.with_name("table.md").read_text(), (REPOSITORY / "docs" / "studies.md").read_text()
    assert report.markdown(results) == table
    assert table.split("\n\n")[0] in page
    assert results["command"] in page
    assert results["commit"][:7] in page
    assert "dirty" not in results["commit"]
    assert f"../studies/results/{path.parent.name}/plot.png" in page


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
