"""The one exception for a user's mistake."""


class UserError(Exception):
    """A user's mistake: the scripts show it as one line, without a traceback, and exit with status 2."""
