"""Start the scripts by the commands that a user would type: as one process, or as several under torchrun."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Linux sends SIGTERM to a process whose parent dies, even by SIGKILL, if the process has asked for it. A program of its
# own does so because Popen's preexec_fn may deadlock in a process with threads.
_END_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that started this one has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


def commit() -> str | None:
    """Return the commit of this repository, with "-dirty" if files differ from it; None if git fails."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--match="]
    within = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}  # not of a repository around an installation
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, env=within).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line(script: str, arguments: str, processes: int) -> str:
    """The command that runs a script in the repository with some processes; one needs no torchrun."""
    launcher = f"torchrun --standalone --nproc_per_node {processes}" if processes > 1 else "python"
    return f"{launcher} {script} {arguments}"


def start(command: str, environment: dict[str, str], **options: Any) -> subprocess.Popen:
    """Start a command that begins with python or torchrun, in the repository and with the Python of this process.

    On Linux, it is asked to stop (SIGTERM) when the thread that started it ends, in whatever way.

    Args:
        command: see `command_line`.
        environment: variables beside those of this process.
        **options: of `subprocess.Popen`.
    """
    launcher, *words = shlex.split(command)
    module = ["-m", "torch.distributed.run"] if launcher == "torchrun" else []
    first = [sys.executable, "-ISc", _END_WITH_PARENT, str(os.getpid())]
    words = [*first, sys.executable, *module, *words]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **environment}, **options)
