"""Start Python scripts by forking one process that has imported them once.

A start of Python that imports torch, timm and our scripts takes 5 s of CPU time; a fork of a process that has done so
takes a few milliseconds. A forked script is a process of its own, with the given command line, environment, folder,
streams and session, Python's own signal handlers, a single thread, and Python's usual end. Signals, kills, exit codes,
locks and timeouts therefore behave as for a started one. A forked torchrun is torch's own agent; it forks its workers
from itself, so that they are its children.

What differs is what Python does before a script's first line: modules are imported already, with the environment of
the test session (huggingface_hub with the script's own), and all processes share one seed for the hashes of strings.
Tests of the start itself (of imports, job scripts, standard streams) start a new Python.
"""

import atexit
import ctypes
import gc
import importlib
import io
import math
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = "main_pretrain", "Finetuning.main_finetune", "Evaluation.probe", "Evaluation.robustness"
# imported by runs or by torchrun when they first need them
LATER = "matplotlib.pyplot", "torch.utils.tensorboard", "torch.distributed.run", "torch._dynamo", "fault_helpers"
ELASTIC = "torch.distributed.elastic"
LATER += f"{ELASTIC}.agent.server.local_elastic_agent", f"{ELASTIC}.rendezvous.c10d_rendezvous_backend"
SYSTEM_PATH: list[str] = []  # of `sys.path`, what PYTHONPATH has no part in


def become(words: list[str], environment: dict[str, str], folder: str, files: list[int], new_session: bool) -> None:
    """Turn a process that has just been forked into `python *words`, and end it. `files` become its streams."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) or number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if new_session:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    added = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = dict.fromkeys(["", *added, *SYSTEM_PATH])
    sys.modules["numpy"].random.seed()
    if any(name.startswith("HF_") for name in environment):  # read by huggingface_hub at its import
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
    if "RANK" in environment:
        Path("/proc/self/comm").write_text(f"rank {environment['RANK']}")  # for `Started.ranks`
    unbuffered = words[0] == "-u"
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        file = open(number, "wb" if number else "rb", 0 if unbuffered and number else -1, closefd=False)  # noqa: SIM115
        how = {"line_buffering": number == 2, "write_through": unbuffered and number > 0}
        stream = io.TextIOWrapper(file, old.encoding, old.errors, **how)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    status = 1
    try:
        _execute(words[unbuffered:])
        status = 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            status = error.code or 0
        else:
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    ctypes.pythonapi.Py_Exit(status)  # as Python does: threads, atexit, buffers, destructors


def _execute(words: list[str]) -> None:
    """Do what Python does with its command line: a script, `-m` and a module, or `-c` and code."""
    first, *sys.argv = words
    if first == "-m":
        sys.path[0] = os.getcwd()
        sys.modules.pop(sys.argv[0], None)
        runpy._run_module_as_main(sys.argv[0])
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if first == "-c":
        code, sys.argv[0], sys.path[0] = compile(sys.argv[0], "<string>", "exec"), "-c", ""
    else:
        sys.argv.insert(0, first)
        main.__file__, sys.path[0] = first, str(Path(first).resolve().parent)
        code = compile(Path(first).read_bytes(), first, "exec")
    exec(code, main.__dict__)


def fork(*how: object) -> int:
    """Fork this process; the child becomes a script. Signals wait until it has Python's handlers."""
    sys.stdout.flush()  # the child would write it again
    sys.stderr.flush()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid == 0:
        become(*how)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


class _Popen(subprocess.Popen):
    """A `Popen` of `[sys.executable, ...]` that forks this process instead of starting Python."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, *_,
    ):  # fmt: skip
        python, *words = map(os.fsdecode, args)
        assert python == sys.executable, args
        files = [own if file == -1 else file for own, file in enumerate((p2cread, c2pwrite, errwrite))]
        environment = dict(os.environ if env is None else env)
        self.pid = self._fork(words, environment, os.fspath(cwd or os.getcwd()), files, start_new_session)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    _fork = staticmethod(fork)


def serve(number: int) -> None:
    """Fork a process for each request that comes through a socket; tell its number, and its exit status later."""
    SYSTEM_PATH[:] = sys.path[1 + len(os.environ["PYTHONPATH"].split(os.pathsep)) :]
    for name in (*SCRIPTS, *LATER):
        importlib.import_module(name)
    handlers = importlib.import_module(
        "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    )
    handlers.Popen = _Popen
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal it reaches all processes
    gc.collect()
    gc.freeze()  # pages stay shared
    gc.set_threshold(20_000, 20, 20)  # as in conftest.py
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    requests, children = socket.socket(fileno=number), {}
    while True:
        for ready in select.select([requests, *children], [], [])[0]:
            if ready is not requests:
                pid = children.pop(ready)
                os.close(ready)
                requests.send(pickle.dumps((pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))))
                continue
            message, files, *_ = socket.recv_fds(requests, 2**20, 3)
            if not message:
                os._exit(0)  # without a word: nothing of it is used any more
            words, environment, folder, new_session = pickle.loads(message)
            pid = fork(words, environment, folder, files, new_session)
            for file in files:
                os.close(file)
            children[os.pidfd_open(pid)] = pid
            requests.send(pickle.dumps((pid, None)))


class ForkServer:
    """The process that forks, of one test session: started at the first request, ended with this process."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ended: dict[int, int] = {}
        self.lock = threading.Lock()
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"import fork_server; fork_server.serve({theirs.fileno()})"],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
                pass_fds=[theirs.fileno()],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
            )
        atexit.register(self.close)

    def close(self) -> None:
        self.socket.close()
        self.process.wait()

    def fork(self, words: list[str], environment: dict, folder: str, files: list[int], new_session: bool) -> int:
        with self.lock:
            socket.send_fds(self.socket, [pickle.dumps((words, environment, folder, new_session))], files)
            while True:
                pid, status = pickle.loads(self.socket.recv(1000))
                if status is None:
                    self.ended.pop(pid, None)  # an earlier process of this number
                    return pid
                self.ended[pid] = status

    def status(self, pid: int) -> int | None:
        """Return the exit status of a process, None while it runs."""
        with self.lock:
            while select.select([self.socket], [], [], 0)[0]:
                ended, status = pickle.loads(self.socket.recv(1000))
                self.ended[ended] = status
        return self.ended.get(pid)


_SERVER: list[ForkServer] = []


class ForkedScript(_Popen):
    """`subprocess.Popen([sys.executable, ...])`, forked by the fork server of this session."""

    def _fork(self, *how):
        if not _SERVER:
            _SERVER.append(ForkServer())
        return _SERVER[0].fork(*how)

    def _internal_poll(self, *_, **__):
        if self.returncode is None:
            self.returncode = _SERVER[0].status(self.pid)
        return self.returncode

    def _wait(self, timeout):
        end = math.inf if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            select.select([_SERVER[0].socket], [], [], max(0, min(end - time.monotonic(), 0.05)))
        return self.returncode


def run_forked(words: list[object], **how: object) -> subprocess.CompletedProcess:
    """Run `python *words` as `subprocess.run(..., capture_output=True)` does, forked."""
    timeout = how.pop("timeout", 300)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    with ForkedScript([sys.executable, *map(str, words)], **how) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
