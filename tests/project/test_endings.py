"""How scripts end: outputs that cannot be written, memory that runs out, errors of ours, a mistake under torchrun."""

import argparse
import errno
import os
import re
import subprocess
import sys

import pytest
import torch
from fork_server import run_forked
from helpers import REPOSITORY, TINY_PRETRAIN, end_of_torchrun

import main_pretrain
from util import cli


def ended(code: str, *argv: object, redirection: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run a script of Python with `cli` imported, in a shell that redirects its output."""
    command = f'"$0" "$@" {redirection}'
    words = ["bash", "-c", command, sys.executable, "-c", f"from util import cli\n{code}", *map(str, argv)]
    return subprocess.run(
        words,
        cwd=REPOSITORY,
        capture_output=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


PRINTS = """
parser = cli.Parser("script")
parser.add_argument("path", nargs="?")
def main(args):
    for _ in range(100_000): print(args.path, "a name", flush=True)
cli.run_main(main, parser)
"""


def test_outputs_that_end_early():
    """A reader that has gone ends a script quietly, a full disk in one line, and no output at all is not missed."""
    done = ended(PRINTS, redirection="| head -1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"None a name\n", b"")
    code = f"from util import cli\n{PRINTS}"
    with open("/dev/full", "w") as full:
        done = run_forked(["-c", code], stdout=full, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (1, "script: [Errno 28] No space left on device\n")
    done = ended(PRINTS, redirection=">&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        done = run_forked(["-c", code, "--help"], stdout=nobody, cwd=REPOSITORY)
    assert done.stderr == ""


def test_names_that_an_output_cannot_show():
    """Bytes that are not UTF-8, and an output that is ASCII."""
    each = (
        "import sys\n*names, flag, other = sys.argv[1:]\nfor sys.argv[1:] in [*zip(names), (flag, other)]: cli.run_main"
    )
    code = PRINTS.replace("100_000", "1").replace("cli.run_main", each)
    paths = {b"caf\xe9": rb"caf\udce9", "Käse": rb"K\xe4se", "日本": rb"\u65e5\u672c"}
    words = [*map(os.fsdecode, paths), "--flag", os.fsdecode(b"caf\xe9\n\x1b[31m")]
    done = ended(code, *words, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (done.returncode, done.stdout) == (2, b"".join(shown + b" a name\n" for shown in paths.values()))
    assert done.stderr == rb"script: error: unrecognized arguments: --flag" + b"\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("CUDA error: out of memory\nCompile with ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
        RuntimeError("unable to mmap 9 bytes from file </torch_1>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_memory_that_runs_out(monkeypatch, capsys, error):
    def main(args: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["script", "--data_path", "x"])
    with pytest.raises(SystemExit) as exit_info:
        cli.run_main(main, main_pretrain.get_args_parser())
    assert exit_info.value.code == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"main_pretrain.py: rank 0: out of memory: .+; a smaller --batch_size or .+ needs less\n", err)


def test_other_errors_keep_their_traceback(monkeypatch):
    """A fault of ours is not hidden behind a line."""
    monkeypatch.setattr(sys, "argv", ["script"])
    for error in (RuntimeError("shapes differ"), OSError(errno.EBADF, "bad"), BrokenPipeError(), ValueError("x")):
        with pytest.raises(type(error)):
            cli.run_main(lambda args, error=error: (_ for _ in ()).throw(error), cli.Parser("script"))


LIMITED = """
import resource, main_pretrain
from util import cli
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 2**29, resource.RLIM_INFINITY))
cli.run_main(main_pretrain.main, main_pretrain.get_args_parser())
"""


def test_a_memory_limit(image_folder, tmp_path):
    """As `ulimit -v` sets it: weights of a decoder of 16,384 channels do not fit into 512 MB."""
    words = [*TINY_PRETRAIN, "--dec_embed_dim", 16384, "--data_path", image_folder, "--output_dir", tmp_path]
    done = run_forked(["-c", LIMITED, *words, "--batch_size", 4], cwd=REPOSITORY)
    assert done.returncode == 1
    assert re.fullmatch(r"main_pretrain.py: rank 0: out of memory: .*memory.*needs less\n", done.stderr), done.stderr


def test_under_torchrun_one_process_speaks(image_folder, tmp_path):
    """Several processes find the same mistake; it is stated once, and they all end with status 2."""
    words = [*TINY_PRETRAIN, "--data_path", image_folder, "--output_dir", tmp_path]
    done = end_of_torchrun("main_pretrain.py", *words, "--dec_depth", 4, "--batch_size", 4)
    assert done.returncode != 0
    assert done.stderr.count("main_pretrain.py: error: depth 4 is too small") == 1
    assert re.search(r"exitcode\s*: 2 ", done.stderr)
    assert not re.search(r"^\[rank\d\]: Traceback", done.stderr, re.MULTILINE)
