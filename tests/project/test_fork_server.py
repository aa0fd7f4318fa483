"""A forked script is like one that a new Python runs: its end, streams, signals, place and process."""

import os
import signal
import subprocess
import sys

import pytest
from fork_server import ForkedScript, run_forked
from helpers import REPOSITORY

ENDS = {
    "the end": "print(1)",
    "a number": "import sys; sys.exit(7)",
    "a text": "import sys; sys.exit('text')",
    "an exception": "1 / 0",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "an interrupt": "import os, signal; signal.signal(signal.SIGINT, lambda *_: exit(5)); os.kill(os.getpid(), 2)",
    "a handler": "import atexit; atexit.register(print, 'late'); print(1)",
    "a thread": "import threading; threading.Timer(0.1, lambda: print('late')).start(); print(1)",
    "buffers": "import os, sys; print(1); sys.stderr.write('a'); os._exit(3)",
    "a module": "import __main__; print(__name__, __main__.__dict__ is globals())",
    "one thread": "import os; print(os.listdir('/proc/self/task') == [str(os.getpid())])",
    "handlers": "import signal; print([signal.getsignal(n) for n in (2, 10, 13, 15, 17)])",
    "place": "import os, sys; print(os.getcwd(), sys.argv, sys.path, os.environ['A'], os.getenv('B'))",
    "input": "import sys; print(sys.stdin.read(), sys.stdin.isatty(), sys.stdout.encoding, sys.stdout.errors)",
    "session": "import os; print(os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid())",
    "files": "import os; print(len(os.listdir('/proc/self/fd')))",
}


@pytest.mark.parametrize("unbuffered", [False, True], ids=["", "unbuffered"])
@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_it_is_like_a_new_python(code, unbuffered, tmp_path, monkeypatch):
    monkeypatch.setenv("B", "of the session")
    command = [sys.executable, *["-u"] * unbuffered, "-c", code, "--flag", "ä"]
    environment = {"A": "a", "PYTHONPATH": os.environ["PYTHONPATH"], "HOME": os.environ["HOME"]}
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path}
    ends = []
    for popen in (subprocess.Popen, ForkedScript):
        with popen(command, env=environment, start_new_session=unbuffered, **how) as process:
            out, err = process.communicate(b"input", timeout=60)
        ends.append((process.returncode, out, err.splitlines()[-1:]))
    assert ends[0] == ends[1]


def test_a_script_and_a_module(tmp_path):
    (tmp_path / "script.py").write_text("import neighbour, sys; print(neighbour.X, __file__, sys.argv)")
    (tmp_path / "neighbour.py").write_text("X = 1\nif __name__ == '__main__': print(2)")
    for words in ([tmp_path / "script.py", 5], ["-m", "neighbour"], [tmp_path / "none.py"]):
        command = [sys.executable, *map(str, words)]
        new = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        forked = run_forked(words, cwd=tmp_path)
        assert (forked.returncode != 0, forked.stdout) == (new.returncode != 0, new.stdout)


def test_waiting_and_signals(tmp_path):
    (tmp_path / "script.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    with ForkedScript([sys.executable, str(tmp_path / "script.py")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == process.poll() == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked([tmp_path / "script.py"], timeout=0.1)


def test_torchrun_forks_its_workers(tmp_path):
    """They are children of it, know their ranks, and have the environment that it sets."""
    (tmp_path / "script.py").write_text("import os; print(os.getppid(), os.environ['RANK'], os.environ['WORLD_SIZE'])")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "script.py")]
    with ForkedScript([sys.executable, *words], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == [f"{process.pid} {rank} 2" for rank in range(2)]
