"""The studies' runner: locks, records, failures, GPUs, several runners at a time."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import Timeout
from helpers import REPOSITORY

from studies import run
from studies.budgets import BUDGETS
from studies.steps import SCRIPTS, Machine, Step, acquire, run_steps
from studies.study import flags
from util.errors import INTERRUPTED, Interrupted, RunError, UserError

ONE = Machine(processes=1, jobs=1)


def test_gpus_are_shared_out(monkeypatch):
    """Each run gets a GPU for each of its processes; GPUs that are too few for a run stay idle."""
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


def test_a_lock_is_waited_for(tmp_path):
    """Until the process that has it ends, even by SIGKILL; or `acquire` raises Timeout at once."""
    path = tmp_path / "data" / "making.lock"
    program = "import sys, time; from filelock import FileLock\nwith FileLock(sys.argv[1]): print(1, flush=True); "
    path.parent.mkdir()
    other = subprocess.Popen([sys.executable, "-c", f"{program}time.sleep(60)", path], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(Timeout):
        acquire(path, blocking=False)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(lambda: acquire(path).lock.release())
        time.sleep(0.5)
        assert not waiting.done()
        other.kill()
        waiting.result(timeout=10)
    other.communicate()


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


def test_a_log_without_a_value_is_named(tmp_path):
    """As another program or a damaged disk may have left it."""
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


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> tuple[Step, str]:
    """Return a run that failed, and the message; in its folder were a link and the record of a killed attempt."""
    folder = tmp_path_factory.mktemp("failed")
    step = Step("pretrain", 0, flags("--data_path /nowhere --batch_size 8 --epochs 1 --device cpu"), folder / "runs")
    step.folder.mkdir(parents=True)
    (folder / "precious").write_text("precious")
    step.path("command.txt").symlink_to(folder / "precious")
    # its runner was killed after writing run.json and before opening output.txt
    step.write({"finished": False, "attempts": [{"command": "", "commit": None, "start": 5.0, "end": None}]})
    with pytest.raises(RunError) as raised:
        run_steps([step], ONE, None)
    return step, str(raised.value)


def test_a_failed_run_ends_the_study(failed):
    """The message has the run's output; the run does not count as finished."""
    step, message = failed
    assert re.search(r"failed with exit status 2(?s:.)*--data_path /nowhere: no such folder", message)
    assert not step.finished


def test_a_command_is_not_written_through_a_link(failed):
    step, _ = failed
    assert (step.folder.parents[1] / "precious").read_text() == "precious"
    assert "--data_path /nowhere" in step.path("command.txt").read_text()


def test_an_attempt_without_output_has_taken_no_time(failed):
    """It was killed with its runner; the next attempt is recorded with its machine."""
    first, second = failed[0].record["attempts"]
    assert (first["end"], "machine" in first) == (5.0, False)
    assert second["machine"]["jobs"] == 1


@pytest.fixture
def stub_steps(monkeypatch, tmp_path):
    """Return steps that run a text of Python each, instead of a training script."""

    def make(*texts: str) -> list[Step]:
        choose = f"import os, sys, time\nexec({texts!r}[int(sys.argv[sys.argv.index('--seed') + 1])])"
        (tmp_path / "script.py").write_text(choose)
        monkeypatch.setitem(SCRIPTS, "pretrain", str(tmp_path / "script.py"))
        given = flags("--batch_size 8 --epochs 1")
        return [Step("pretrain", seed, given, tmp_path / "runs") for seed in range(len(texts))]

    return make


def test_a_failed_run_stops_the_others(stub_steps):
    failing, sleeping, waiting = stub_steps("sys.exit(3)", "time.sleep(100)", "sys.exit()")
    with pytest.raises(RunError, match=f"{failing.name} failed with exit status 3"):
        run_steps([failing, sleeping, waiting], Machine(processes=1, jobs=2), None)
    assert [len(step.record["attempts"]) for step in (failing, sleeping, waiting)] == [1, 1, 0]
    assert not sleeping.finished
    assert sleeping.record["attempts"][0]["end"] is not None


def test_a_run_that_someone_else_stops(stub_steps):
    """It ends the study, which can be resumed."""
    (step,) = stub_steps(f"sys.exit({INTERRUPTED})")
    with pytest.raises(Interrupted, match=f"{step.name} was asked to stop; the same command resumes"):
        run_steps([step], ONE, None)
    assert not step.finished


def test_runs_at_a_time_have_gpus_of_their_own(stub_steps, capsys):
    """Their epochs are shown."""
    text = "print('epoch 0: 1 s since the start on', os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(0.5)"
    steps = stub_steps(text, text)
    run_steps(steps, Machine(processes=1, jobs=2, gpus=("4", "7")), None)
    printed = capsys.readouterr().out
    for step in steps:
        assert f"{step.name}: {step.path('output.txt').read_text()}" in printed
    assert {step.path("output.txt").read_text().split()[-1] for step in steps} == {"4", "7"}


def test_another_runner_finishes_a_run(stub_steps):
    """This runner waits, and does not repeat the run."""
    (step,) = stub_steps("")
    other = {"command": "python", "commit": None, "start": 1.0, "end": 2.0}

    def run_elsewhere() -> None:
        with acquire(step.path("runner.lock")):
            taken.set()
            time.sleep(0.5)
            step.write({"finished": True, "attempts": [other]})

    taken = threading.Event()
    with ThreadPoolExecutor() as pool:
        pool.submit(run_elsewhere)
        assert taken.wait(10)
        run_steps([step], ONE, None)
    assert step.record == {"finished": True, "attempts": [other]}
    assert not step.path("output.txt").exists()


def test_a_run_whose_runner_was_killed_is_waited_for(stub_steps):
    """It holds the lock of its folder until it has written its checkpoint."""
    (step,) = stub_steps("")
    step.folder.mkdir(parents=True)
    program = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
    program += "print(1, flush=True); time.sleep(1)"
    orphan = subprocess.Popen([sys.executable, "-c", program, step.path("run.lock")], stdout=subprocess.PIPE)
    assert orphan.stdout.readline() == b"1\n"
    run_steps([step], ONE, None)
    assert orphan.wait(0) == 0  # it ended before
    assert step.finished
    orphan.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_command_stops_when_its_parent_is_killed(tmp_path):
    """It is asked to, by SIGTERM."""
    asked = tmp_path / "asked"
    (tmp_path / "child.py").write_text(
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path({str(asked)!r}).touch()))\n"
        "print(1, flush=True); time.sleep(20)"
    )
    program = f"from util import launch; launch.start('python {tmp_path}/child.py', {{}}).wait()"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"1\n"
    parent.kill()
    parent.communicate()  # until the child, too, has closed its output
    assert asked.exists()
