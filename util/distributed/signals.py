"""Signals that ask a run to stop: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType

import torch
import torch.distributed as dist

from util.distributed.processes import control_group, is_main, world_size

SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
# torchrun and Slurm send a signal to all processes of a group, and torchrun also forwards the one that it received:
# signals within this time count once
SAME_SIGNAL = 2.0  # seconds


class StopRequest:
    """Context in which a signal asks the run to stop; a second one, `SAME_SIGNAL` later, ends the process at once."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.before: dict = {}
        self.pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.pending is not None:
            self.pending[0].wait()  # if this process ended earlier, the others' all-reduce would fail
        self.pending = None
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, _: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            if is_main():  # os.write, since the signal may have interrupted a print
                with suppress(OSError):  # the output may be closed or full
                    os.write(1, f"\n{name}: the run stops after this update and writes a checkpoint\n".encode())
        elif now - self.asked_at > SAME_SIGNAL:
            with suppress(OSError):
                os.write(2, f"\n{name} again: the process ends at once, without a checkpoint\n".encode())
            os._exit(128 + number)

    @property
    def asked(self) -> bool:
        """Return whether this process was asked to stop."""
        return self.asked_at is not None

    def agreed(self) -> bool:
        """Return whether any process was asked to stop, the same on all processes. All call it after every update.

        The result is that of the update before, whose all-reduce ran on the CPU in the meantime: no process waits,
        unless another one is stuck.

        Raises:
            RuntimeError: a process did not answer within `--dist_timeout`.
        """
        if world_size() == 1:
            return self.asked
        answer = False
        if self.pending is not None:
            work, asked = self.pending
            work.wait()
            answer = bool(asked)
        asked = torch.tensor(float(self.asked))
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, group=control_group(), async_op=True)
        self.pending = None if answer else (work, asked)
        return answer
