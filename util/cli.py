"""Shared by the command lines of all scripts: arguments, checks before any work, the end of a run."""

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


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s, shown by `run`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run_main(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line and run a script; a `UserError` becomes one line and exit status 2, a `RunError` 1.

    `Interrupted` becomes exit status 75, on which a job script can begin the same command again. Where memory runs out,
    one line says what needs less of it, and the exit status is 1.

    torchrun ends every process as soon as one has failed: so the first process of each machine states the mistake,
    and the others, which found the same one, leave it the time to.
    """
    args = argparse.Namespace()
    logging.raiseExceptions = False  # a line that cannot be logged shows no traceback
    with _robust_output(parser.prog):
        logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.INFO if is_main() else logging.ERROR)
        try:
            main(parser.parse_args(namespace=args))
        except UserError as error:
            if local_rank() == 0:
                print(f"{parser.prog}: error: {_one_line(error)}", file=sys.stderr, flush=True)
            else:
                time.sleep(5)  # by then torchrun has ended it, unless it is alone with this mistake
                print(f"{parser.prog}: rank {rank()}: error: {_one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(2)
        except Interrupted as error:
            if is_main():
                print(f"{parser.prog}: {error}", flush=True)
            _kill_workers()
            barrier()  # torchrun ends all as soon as one has: also the one that has not yet said why
            end_groups()
            sys.exit(INTERRUPTED)
        except (RunError, RuntimeError, MemoryError, OSError) as error:
            # a worker that was killed, or is silent for too long
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


MEMORY = "batch_size", "num_workers", "input_size"  # the arguments that memory grows with


def _out_of_memory(error: Exception) -> bool:
    """Return whether an exception says that memory, on the host or on the device, or the room for threads is used up.

    torch says so on a GPU by a class of its own, on the CPU by a `RuntimeError` with one of several messages.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = "out of memory|can(no|')t allocate memory|not enough memory|can't start new thread"
    return re.search(words, str(error), re.IGNORECASE) is not None


def _one_line(message: object) -> str:
    """Return a message with its control characters escaped and its longest words, paths as a rule, cut short."""
    return re.sub(r"\S{400,}", lambda word: f"{word[0][:100]}...{word[0][-100:]}", printable(str(message)))


def _first_line(error: Exception) -> str:
    return _one_line(next(iter(str(error).splitlines()), type(error).__name__))


@contextmanager
def _robust_output(program: str) -> Iterator[None]:
    """Escape the characters that a stream cannot encode; end without a traceback where stdout cannot be written.

    The exit status is then 1: quietly where the reader of a pipe has gone, in one line where the disk is full. Without
    a stdout or stderr, nothing is shown.
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
    """Return whether a descriptor is the end of a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _kill_workers() -> None:
    """End the processes that load images: one that hangs would not let this process end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each that is killed now
    for process in multiprocessing.active_children():
        process.kill()
