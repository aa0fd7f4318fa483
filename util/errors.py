"""Exceptions that end a run with a message instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 75  # exit status of a run that was asked to stop and can be resumed: EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """A user's mistake: the scripts print it as one line and exit with status 2."""


class RunError(Exception):
    """A failure of a run that has started: the process that meets it prints it and exits with status 1."""


class Interrupted(Exception):
    """The run was asked to stop, and everything needed to resume is written: exit status `INTERRUPTED`."""


@contextmanager
def as_user_error(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn exceptions of these kinds, whose message is fit for the user, into `UserError`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error
