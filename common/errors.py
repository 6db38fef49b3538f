"""The one exception type that is meant to be read by a person."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Input that the user can correct.

    The message is one or two sentences that name the file or key, what was expected and how to fix
    it. `run.py` prints it without a traceback and exits with code 2.
    """
