"""Scripts work without what only Linux has, as on macOS; libraries and kernels of Apple's are not tried."""

import os
import subprocess
import sys

import pytest
from helpers import REPOSITORY, SCRIPTS_BY_PATH, TINY_PRETRAIN

# Python imports sitecustomize when it starts, in the processes that load images, too.
HIDE = f"""
import errno, fcntl, multiprocessing, os, runpy, select, signal, socket, sys

runpy.run_path({str(REPOSITORY / "tests" / "sitecustomize.py")!r})  # no network
ONLY_LINUX = {{
    os: "sched_getaffinity sched_setaffinity pidfd_open posix_fadvise posix_fallocate memfd_create copy_file_range "
    "splice eventfd getrandom unshare",
    signal: "sigwaitinfo sigtimedwait pidfd_send_signal SIGRTMIN SIGRTMAX SIGPOLL SIGPWR SIGSTKFLT",
    select: "epoll",
    fcntl: "F_SETPIPE_SZ F_GETPIPE_SZ F_ADD_SEALS",
    socket: "AF_NETLINK SO_PEERCRED",
}}
for module, names in ONLY_LINUX.items():
    for name in names.split():
        vars(module).pop(name, None)
sys.modules |= dict.fromkeys(("triton", "cuda", "mamba_ssm", "causal_conv1d"))  # have no wheels there
multiprocessing.set_start_method("spawn")


def no_proc(event, arguments):
    if event in ("open", "os.listdir") and str(arguments[0]).startswith("/proc/"):
        raise FileNotFoundError(errno.ENOENT, "there is no /proc", arguments[0])


sys.addaudithook(no_proc)
"""

# One process for all: each script imports only what those before it have not.
HELP = """
import runpy, sys

for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(script, "ended with", end.code or 0)
"""


@pytest.fixture
def run(tmp_path):
    """Run Python without what only Linux has; return what it prints."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE)

    def run(*words: object) -> str:
        variables = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr  # a thread may raise it, too
        return done.stdout

    return run


def test_help_without_linux(run):
    scripts = [*SCRIPTS_BY_PATH, "studies/run.py", "demo/demo.py", "benchmarks/bench_data.py"]
    printed = run("-c", HELP, *scripts)
    assert [script for script in scripts if f"\n{script} ended with 0\n" not in printed] == []


def test_training_and_a_probe_without_linux(run, image_folder, tmp_path):
    """Images are loaded by a process that is spawned, as there; features go to a cache of memory maps."""
    common = ["--data_path", image_folder, "--batch_size", 8, "--num_workers", 1, "--device", "cpu"]
    common += ["--scan_backend", "torch"]
    run("main_pretrain.py", *TINY_PRETRAIN, *common, "--epochs", 1, "--output_dir", tmp_path)
    cache = tmp_path / "cache"
    probe = ["--probe", "knn", "--k", 1, "--cache", cache]
    run("Evaluation/probe.py", tmp_path / "checkpoint-0.pth", *common, *probe, "--num_workers", 0)
    assert len(list(cache.iterdir())) == 2
