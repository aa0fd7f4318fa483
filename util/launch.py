"""Start the scripts by the commands that a user would type: as one process, or as several under torchrun."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command_line(script: str, arguments: str, processes: int) -> str:
    """The command that runs a script in the repository with some processes; one needs no torchrun."""
    launcher = f"torchrun --standalone --nproc_per_node {processes}" if processes > 1 else "python"
    return f"{launcher} {script} {arguments}"


def start(command: str, environment: dict[str, str], **options: object) -> subprocess.Popen:
    """Start a command that begins with python or torchrun, in the repository and with the Python of this process.

    Args:
        command: see `command_line`.
        environment: variables beside those of this process.
        **options: of `subprocess.Popen`.
    """
    launcher, *words = shlex.split(command)
    module = ["-m", "torch.distributed.run"] if launcher == "torchrun" else []
    return subprocess.Popen([sys.executable, *module, *words], cwd=ROOT, env={**os.environ, **environment}, **options)
