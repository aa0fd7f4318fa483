"""The exceptions that end a run with a message instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 75  # exit status of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """A user's mistake: the scripts show it as one line, without a traceback, and exit with status 2."""


class RunError(Exception):
    """What ends a run that had begun: stated without a traceback by the process that met it, exit status 1."""


class Interrupted(Exception):
    """The run was asked to stop, and everything needed to go on is written: exit status `INTERRUPTED`."""


@contextmanager
def as_user_error(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn exceptions of these kinds, whose message is meant for the user, into `UserError`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error
