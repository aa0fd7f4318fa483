"""gpu_check.py without a GPU: stand-in parts are run, some parts are rehearsed at toy size."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fork_server import ForkedScript
from helpers import REPOSITORY

from benchmarks import bench_train, gpu_check
from benchmarks.gpu import gpu_tables
from benchmarks.gpu.gpu_tables import LOOK
from benchmarks.gpu_check import Part

HANG = "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
HANG += "open('FOLDER/child', 'w').write(str(child.pid)); time.sleep(60)"


def stand_in(name, code="pass", seconds=1.0, **fields):
    return Part(name, seconds, ("-c", code), f"{name}.json", **fields)


def writes(name, content):
    return stand_in(name, f"open('FOLDER/{name}.json', 'w').write({json.dumps(content)!r})")


def run(chosen, folder, seconds=20.0, done=None, after_each=lambda: None):
    done = {} if done is None else done
    gpu_check.run_parts(chosen, folder, seconds, done, after_each)
    return done


def statuses(done):
    return {name: found["status"] for name, found in done.items()}


def assert_gone(pid):
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return  # a zombie
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} is alive")


def test_failed_parts_and_the_parts_after_them(tmp_path, capsys):
    chosen = [
        stand_in("scan", "print('first'); raise SystemExit('it broke')"),
        stand_in("ncu", after=("scan",)),
        stand_in("ops", "open('FOLDER/ops.json', 'w').write('{}')"),
        stand_in("train", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        stand_in("augment", needs=("no_such_package", "torch")),
        stand_in("losses", program=("no_such_program",)),
    ]
    seen = []
    done = run(chosen, tmp_path, after_each=lambda: seen.append(len(seen)))
    assert statuses(done) == {
        "scan": "failed", "ncu": "left out", "ops": "done", "train": "failed", "augment": "left out",
        "losses": "left out",
    }  # fmt: skip
    assert done["scan"]["reason"] == "exit status 1: it broke"
    assert done["ncu"]["reason"] == "it needs part scan, which is failed"
    assert "killed by SIGSEGV" in done["train"]["reason"]
    assert done["augment"]["reason"] == "not installed: no_such_package"
    assert done["losses"]["reason"] == "there is no program no_such_program"
    assert (tmp_path / "scan.log").read_text() == "first\nit broke\n"
    assert (tmp_path / "ops.json").exists()
    assert len(seen) == 9  # before and after the three parts that ran, after the three that did not
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == [part.name for part in chosen]


def test_a_part_that_hangs_is_killed_with_its_children(tmp_path):
    start = time.monotonic()
    done = run([stand_in("scan", HANG, 1.0), writes("ops", {})._replace(seconds=3.0)], tmp_path, 8.0)
    assert time.monotonic() - start < 8
    assert done["scan"]["status"] == "stopped"
    assert done["scan"]["reason"] == "its time of 2 s was over"
    assert "KeyboardInterrupt" in (tmp_path / "scan.log").read_text()  # its traceback
    assert done["ops"]["status"] == "done"
    assert_gone(int((tmp_path / "child").read_text()))


def test_a_part_that_does_not_end_when_asked(tmp_path):
    deaf = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {HANG}"
    done = run([stand_in("scan", deaf)], tmp_path, 2.0)
    assert done["scan"]["status"] == "stopped"
    assert_gone(int((tmp_path / "child").read_text()))


def test_stopped_tests_report_those_that_ran(tmp_path):
    (tmp_path / "test_some.py").write_text("import time\ndef test_a(): assert 0\ndef test_b(): time.sleep(60)\n")
    words = ("-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", "--junitxml", "FOLDER/tests.xml")
    done = run([Part("tests", 1.0, (*words, str(tmp_path / "test_some.py")), "tests.xml")], tmp_path, 6.0)
    assert done["tests"]["status"] == "stopped"
    assert gpu_tables.tests_found((tmp_path / "tests.xml").read_text())["failures"] == 1


@pytest.mark.parametrize(
    ("writes", "status"), [("open('FOLDER/train.json', 'w').write('{}'); ", "done"), ("", "left out")]
)
def test_the_part_after_a_stopped_one(writes, status, tmp_path):
    """It runs if the stopped part has left a result."""
    train = Part("train", 1.0, ("-c", f"{writes}import time; time.sleep(60)"), "train.json")
    done = run([train, stand_in("profile", after=("train",))._replace(seconds=3.0)], tmp_path, 4.0)
    assert statuses(done) == {"train": "stopped", "profile": status}


def test_training_without_wrong_kernels(tmp_path, capsys):
    scan = {"results": [{"microseconds": {"triton": {}}, "wrong": {"cuda": "cuda is wrong"}}]}
    ops = {"results": [{"operator": "norm", "wrong": "it fails"}, {"operator": "conv", "microseconds": {}}]}
    chosen = [
        writes("scan", scan),
        writes("ops", ops),
        stand_in("train", "import sys; print(sys.argv[1:])", trains=True),
    ]
    run([*chosen, stand_in("augment", "import sys; print(sys.argv[1:])")], tmp_path)
    assert (tmp_path / "train.log").read_text() == "['--without', 'norm', 'cuda']\n"
    assert (tmp_path / "augment.log").read_text() == "[]\n"
    assert "train     without cuda: cuda is wrong\n" in capsys.readouterr().out


@pytest.mark.parametrize("status", ["failed", "stopped", "done", None])
def test_a_scan_without_a_result(status, tmp_path):
    done = {"scan": {"status": status}} if status else {}
    crashed = status in ("failed", "stopped")
    assert gpu_check.faulty(tmp_path, done) == ({"cuda": f"part scan {status} before it was timed"} if crashed else {})
    timed = {"results": [{"microseconds": {"cuda": {}}}]}
    (tmp_path / "scan.json").write_text(json.dumps(timed))
    assert gpu_check.faulty(tmp_path, done) == {}


def test_children_of_a_finished_part_are_killed(tmp_path):
    done = run([stand_in("scan", HANG.rpartition(";")[0])], tmp_path)
    assert done["scan"]["status"] == "done"
    assert_gone(int((tmp_path / "child").read_text()))


NCU = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
printf 'scan_backward (1, 1, 1)\n    Section: Warp State Statistics\n' > "$2"
while [ "$1" != "$PYTHON" ]; do shift; done
exec "$@"
"""


def test_a_part_that_runs_under_a_program(tmp_path, monkeypatch):
    """Like ncu, the program gets the command of Python as its last words."""
    program = tmp_path / "ncu"
    program.write_text(NCU)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    ncu = next(part for part in gpu_check.parts(toy=False) if part.name == "ncu")
    done = run(
        [ncu._replace(command=("-c", "print('under it')"), seconds=1.0)], tmp_path, done={"scan": {"status": "done"}}
    )
    assert done["ncu"]["status"] == "done"
    assert (tmp_path / "ncu.log").read_text() == "under it\n"
    (row,) = gpu_tables.ncu_table((tmp_path / "ncu.txt").read_text())
    assert (row.measured, row.decision) == ("1 launches in ncu.txt", LOOK)


def test_shares_of_the_time(tmp_path, monkeypatch):
    """A part that ends early leaves its time to the others; late parts take no time from them."""
    limits, now = {}, [0.0]
    took = {"scan": 10, "ops": 100, "train": 200, "released": 5}

    def run_part(part, folder, limit):
        limits[part.name] = round(limit)
        now[0] += took[part.name]
        return {"status": "done", "seconds": 0.0, "reason": ""}

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    names = {"scan": 60, "ops": 60, "train": 180, "large": 90, "released": 900}
    chosen = [stand_in(name, seconds=s, late=name in ("large", "released")) for name, s in names.items()]
    done = run(chosen, tmp_path, 600)
    assert limits == {"scan": 120, "ops": round(590 / 4), "train": 490, "released": 290}
    assert done["large"]["reason"] == "290 s are left, its share is 26 s and it needs 30"


def test_a_later_call_keeps_other_results(tmp_path):
    scan, ops = writes("scan", {"n": 1}), writes("ops", {"n": 1})
    done = run([scan, ops], tmp_path)
    done = run([writes("ops", {"n": 2})], tmp_path, done=done)
    assert statuses(done) == {"scan": "done", "ops": "done"}
    done = run(
        [stand_in("scan", needs=("no_such_package",)), stand_in("ops", "raise SystemExit(3)")], tmp_path, done=done
    )
    assert statuses(done) == {"scan": "done", "ops": "failed"}
    assert json.loads((tmp_path / "scan.json").read_text()) == {"n": 1}
    assert not (tmp_path / "ops.json").exists()  # a result of the earlier call


CHECK = """
import sys
from pathlib import Path
from benchmarks import gpu_check
from util import cli
from util.files import write_json

def main(args):
    part, folder, done = gpu_check.Part("scan", 9.0, ("-c", {code!r}), "scan.json"), Path({folder!r}), {{}}
    with gpu_check.no_part_outlives(folder):
        gpu_check.run_parts([part], folder, 60, done, lambda: write_json(folder / "done.json", done))

cli.run_main(main, cli.Parser("check"))
"""


def test_a_stopped_check_kills_its_part(tmp_path):
    script = CHECK.format(code=HANG, folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    child = tmp_path / "child"
    for _ in range(400):
        if child.exists() and child.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "SIGTERM: what was measured is in" in out
    (part,) = json.loads((tmp_path / "done.json").read_text()).values()
    assert (part["status"], part["reason"]) == ("stopped", "this check was asked to stop")
    assert_gone(int(child.read_text()))


# ---- the command ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "it measures a GPU, and there is none: --toy rehearses it on a CPU"),
        ("--toy --device cuda", "finds no GPU"),
        ("--toy --parts scan everything", "invalid choice: 'everything'"),
        ("--toy --minutes 0", "argument --minutes: 0 is not at least 0.1 and at most 1440"),
        ("--toy --output /dev/null/x", "--output /dev/null/x/summary.json cannot be written"),
        ("--toy --output=", "argument --output: it is empty"),
    ],
)
def test_mistakes(run_script, capsys, words, message):
    with pytest.raises(SystemExit) as exit_info:
        run_script(gpu_check, *words.split())
    err = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("before", [{"gpu": "NVIDIA H100"}, {"toy": False}])
def test_results_of_another_machine(before, run_script, tmp_path, capsys):
    content = {"date": "", "parts": {}, "table": [], "toy": True} | before
    (tmp_path / "summary.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        run_script(gpu_check, "--toy", "--device", "cpu", "--parts", "scan", "--output", tmp_path)
    assert "holds results of" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text()) == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal on a CPU")
def test_rehearsal(run_script, tmp_path, capsys, monkeypatch):
    """Run two real parts at toy size; the others are rehearsed by hand and in test_benchmarks.py."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def popen(words: list[str], **how: object) -> subprocess.Popen:
        return (ForkedScript if words[0] == sys.executable else subprocess.Popen)(words, **how)

    monkeypatch.setattr(gpu_check, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
    run_script(gpu_check, "--toy", "--parts", "scan", "augment", "--minutes", 2, "--output", tmp_path)
    report, printed = json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out
    assert {name: part["status"] for name, part in report["parts"].items()} == {"scan": "done", "augment": "done"}
    assert "A rehearsal at toy size: its decisions mean nothing." in printed
    assert "| augmentation with erasing, ms an image | torch " in printed
    assert report["entries"] == []
    assert {"scan.json", "scan.log", "augment.json", "augment.log"} <= {path.name for path in tmp_path.iterdir()}


def test_every_part_has_a_table_and_a_script():
    for toy in (False, True):
        found = gpu_check.parts(toy)
        assert [part.name for part in found] == list(gpu_tables.TABLES) == gpu_check.PARTS
        for part in found:
            assert part.command[0] == "-m" or (REPOSITORY / part.command[0]).is_file()
            assert any(part.result in word for word in (*part.command, *part.program))
    files = [REPOSITORY / word for word in gpu_check.parts(False)[0].command if word.startswith("tests/")]
    of_gpus = {*REPOSITORY.glob("tests/**/test_*_gpu.py")}
    assert of_gpus
    assert of_gpus <= {*files}
    assert all(file.is_file() for file in files)


WITHOUT = """
import sys
sys.modules |= dict.fromkeys(("simplejpeg", "mlxtend"))
sys.path.insert(0, "tests")
from benchmarks import bench_augment, bench_losses, bench_ops, bench_scan, bench_tokens, bench_train, gpu_check
"""


def test_benchmarks_where_only_some_packages_are_installed():
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=REPOSITORY, check=True)


def test_busy_time(monkeypatch):
    """Overlapping kernels and copies count once; annotations, which span gaps, and host events do not count."""
    events = [
        {"cat": "kernel", "ts": 10.0, "dur": 20.0}, {"cat": "gpu_memcpy", "ts": 20.0, "dur": 20.0},
        {"cat": "gpu_memset", "ts": 100.0, "dur": 1.0}, {"cat": "gpu_user_annotation", "ts": 0.0, "dur": 500.0},
        {"cat": "cuda_runtime", "ts": 200.0, "dur": 9.0}, {"ph": "M", "name": "process_name"},
    ]  # fmt: skip

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def export_chrome_trace(self, path):
            Path(path).write_text(json.dumps({"traceEvents": events}))

    ran = []
    monkeypatch.setattr(bench_train, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append("waited"))
    assert bench_train.busy_seconds(lambda: ran.append("ran")) == pytest.approx(31e-6)
    assert ran == ["ran", "waited"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_busy_time_on_a_gpu():
    """During 50 products of 0.1 to 10 ms each, the GPU is busy nearly all of the time."""
    from util import hardware

    x = torch.randn(4096, 4096, device="cuda")

    def products():
        for _ in range(50):
            x @ x

    products()
    wall = hardware.time_once(products, x.device)[0]
    assert 0.7 * wall < bench_train.busy_seconds(products) < 1.2 * wall


def test_union_of_intervals():
    assert bench_train.union([]) == 0
    assert bench_train.union([(5, 7), (0, 2), (1, 3), (1, 2), (6, 6.5)]) == 5
