"""The job script for real: two agents of torchrun as two nodes of one machine, and stand-ins for Slurm's commands."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fault_helpers import PRETRAIN, Process, written
from helpers import REPOSITORY, read_log

from util.checkpoints import checkpoint_file
from util.training import resume

ENDLESS = ["--save_every_steps", 1, "--epochs", 10_000]
STUBS = {
    # starts the task on every node, passes on signals, fails if one of them does
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((i = 0; i < SLURM_NNODES; i++)); do SLURM_PROCID=$i "$@" & tasks+=($!); done
        # as where cgroup.conf says SignalChildrenProcesses: torchrun gets it too, and so does pkill below
        trap 'for task in "${tasks[@]}"; do kill -USR1 "$task"; command -p pkill -USR1 -P "$task"; done' USR1
        trap : TERM
        status=0
        for task in "${tasks[@]}"; do
          while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
          ((code)) && status=$code
        done
        exit "$status"
    """,
    "pkill": """
        kill -USR1 $$
        command -p pkill "$@"
    """,
    "scontrol": """
        if [[ $1 == show ]]; then echo localhost; echo second; else echo "$@" >>"$STUBS/requeued"; fi
    """,
}


@pytest.fixture
def job(tmp_path, images):
    """Start the job script; what is still running at the end of the test is killed."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}")
        (stubs / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "STUBS": str(stubs),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "NPROC": "1",
        "SLURM_SUBMIT_DIR": str(REPOSITORY), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = []

    def start(*argv: object, nodes: int = 2) -> Process:
        words = ["bash", REPOSITORY / "slurm" / "train.sbatch", *argv, "--data_path", images]
        how = {"env": environment | {"SLURM_NNODES": str(nodes)}, "start_new_session": True}
        started.append(Process(tmp_path / f"job-{len(started)}.txt", *words, **how))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


def test_a_job_on_two_nodes_that_runs_out_of_time(job, tmp_path):
    """The job writes a checkpoint and is queued again; then it resumes and finishes the run."""
    out, requeued = tmp_path / "out", tmp_path / "stubs" / "requeued"
    argv = [*PRETRAIN, "--batch_size", 4, "--resume", "auto", "--output_dir", out]
    running = job(*argv, *ENDLESS).until(lambda: written(out / "checkpoint-last.pth"))
    assert running.signal(signal.SIGUSR1).status(60) == 1, running.text
    assert "stopped in epoch" in running.text
    assert requeued.read_text() == f"requeue {os.getpid()}\n"
    epoch, _ = resume.position(checkpoint_file.read(out / "checkpoint-last.pth"))
    running = job(*argv, "--epochs", epoch + 2, "--allow_changed_args")
    assert running.status() == 0, running.text
    assert "2 x cpu" in running.text
    assert f"resuming from {out}/checkpoint-last.pth" in running.text
    assert [row["epoch"] for row in read_log(out)] == [*range(epoch + 2)]
    assert requeued.read_text().count("requeue") == 1


def test_a_job_that_is_preempted(job, tmp_path):
    """Every process of it is terminated: it writes a checkpoint, and Slurm, not the job, queues it up again."""
    out = tmp_path / "out"
    argv = [*PRETRAIN, "--batch_size", 4, "--output_dir", out]
    running = job(*argv, *ENDLESS).until(lambda: written(out / "checkpoint-last.pth"))
    os.killpg(running.process.pid, signal.SIGTERM)
    assert running.status(60) == 1, running.text
    assert "stopped in epoch" in running.text
    assert not (tmp_path / "stubs" / "requeued").exists()


def test_a_mistake_on_one_node_does_not_queue_up_again(job, tmp_path):
    running = job("main_pretrain.py", "--output_dir", tmp_path / "out", "--batch_size", 0, nodes=1)
    assert running.status(60) == 1
    assert "main_pretrain.py: error: argument --batch_size: 0 is not at least 1" in running.text
    assert not (tmp_path / "stubs" / "requeued").exists()


SCRIPTS = sorted(path for folder in ("slurm", "recipes") for path in (REPOSITORY / folder).iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts(script):
    """They parse, and where shellcheck is installed it finds nothing in them."""
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "--severity", "style", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
