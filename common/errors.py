"""What ends a run apart from success: a user's mistake, or a signal."""

import signal

__all__ = ["Interrupted", "UserError"]


class UserError(ValueError):
    """A mistake in input, configuration or files, explained in one or two sentences.

    The message names the file or key, what was expected and how to fix it. `run.py` prints it
    without a traceback and exits with code 2.
    """


class Interrupted(BaseException):
    """The run was told to stop by a signal and has stopped at a point from which it can resume.

    No `Exception`, so that nothing which handles errors takes it for one.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
