"""Run a script: parse its command line, and turn its errors into messages and exit statuses."""

import argparse
import errno
import io
import logging
import multiprocessing
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist

from util.distributed.processes import barrier, end_groups, is_main, local_rank, missing_ranks, rank
from util.errors import INTERRUPTED, Interrupted, RunError, UserError
from util.files import printable

LOGGER = logging.getLogger(__name__)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Add the default to the help of every argument that takes a value, and has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shows_none = action.nargs == 0 or action.default in (None, []) or "default" in (action.help or "")
        return action.help if shows_none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, which `run_main` prints, and whose help names the defaults."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog, description=description, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run_main(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line and run a script; a `UserError` becomes one line and exit status 2, a `RunError` 1.

    `Interrupted` becomes exit status 75: a job script can then start the same command again. If memory runs out, one
    line names the flags that reduce it, and the exit status is 1.

    torchrun ends all processes as soon as one has failed. Therefore the first process of each machine prints a user's
    mistake at once; the others, which met the same mistake, wait.
    """
    args, prints_first = argparse.Namespace(), True
    logging.raiseExceptions = False  # a line that cannot be logged causes no traceback
    with _robust_output(parser.prog):
        try:
            level = logging.INFO if is_main() else logging.ERROR
            prints_first = local_rank() == 0
            logging.basicConfig(format="%(message)s", stream=sys.stdout, level=level)
            main(parser.parse_args(namespace=args))
        except UserError as error:
            if prints_first:
                print(f"{parser.prog}: error: {_one_line(error)}", file=sys.stderr, flush=True)
            else:
                time.sleep(5)  # by then torchrun has ended this process, unless only it met the mistake
                print(f"{parser.prog}: rank {rank()}: error: {_one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(2)
        except Interrupted as error:
            if is_main():
                print(f"{parser.prog}: {error}", flush=True)
            _kill_workers()
            barrier()  # torchrun ends all processes as soon as one ends, also before they print
            end_groups()
            sys.exit(INTERRUPTED)
        except (RunError, RuntimeError, MemoryError, OSError) as error:
            # DataLoader: a worker was killed, or gave no batch in time
            if isinstance(error, RunError) or (isinstance(error, RuntimeError) and str(error).startswith("DataLoader")):
                reason = str(error)
            elif _out_of_memory(error):
                smaller = " or ".join(f"--{name}" for name in MEMORY if getattr(args, name, 0))
                reason = f"out of memory: {_first_line(error)}" + (
                    f"; a smaller {smaller} needs less" if smaller else ""
                )
            elif dist.is_initialized() and re.search("timed out|closed by peer|reset by peer", str(error), re.I):
                missing = ", ".join(map(str, missing_ranks())) or "unknown"
                reason = f"no answer from rank {missing}, which is stuck or gone: {_first_line(error)}"
            else:
                raise
            _kill_workers()
            print(f"{parser.prog}: rank {rank()}: {reason}", file=sys.stderr, flush=True)
            sys.exit(1)
        end_groups()


MEMORY = "batch_size", "num_workers", "input_size"  # arguments that need less memory with smaller values


def _out_of_memory(error: Exception) -> bool:
    """Return whether an exception means that memory of the host or the device, or the number of threads, is used up.

    torch raises a class of its own on a GPU, and a `RuntimeError` with one of several messages on the CPU.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = "out of memory|can(no|')t allocate memory|not enough memory|can't start new thread"
    return re.search(words, str(error), re.IGNORECASE) is not None


def _one_line(message: object) -> str:
    """Return a message with control characters escaped and very long words, mostly paths, shortened."""
    return re.sub(r"\S{400,}", lambda word: f"{word[0][:100]}...{word[0][-100:]}", printable(str(message)))


def _first_line(error: Exception) -> str:
    return _one_line(next(iter(str(error).splitlines()), type(error).__name__))


@contextmanager
def _robust_output(program: str) -> Iterator[None]:
    """Escape characters that a stream cannot encode; if stdout cannot be written, exit with status 1 and no traceback.

    Nothing is printed if the reader of a pipe has ended, one line if the disk is full. A missing stdout or stderr is
    replaced by the null device.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until Python ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not (isinstance(error, BrokenPipeError) and _closed_by_reader(1)):
            raise
        _kill_workers()
        if full:
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still flushes when it ends
        sys.exit(1)


def _closed_by_reader(descriptor: int) -> bool:
    """Return whether a descriptor writes to a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _kill_workers() -> None:
    """Kill the processes that load images: this process could not end while one hangs."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each
    for process in multiprocessing.active_children():
        process.kill()
