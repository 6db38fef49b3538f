"""What ends a run apart from success: a user's mistake, or a signal."""

import signal
from collections.abc import Iterable
from typing import Any

__all__ = ["Interrupted", "UserError", "check_choice"]


class UserError(ValueError):
    """A mistake in input, configuration or files, explained in one or two sentences.

    The message names the file or key, what was expected and how to fix it. `run.py` prints it
    without a traceback and exits with code 2.
    """


def check_choice(key: str, value: Any, choices: Iterable[str | bool | None]) -> None:
    """Refuse a config value that is not among the choices.

    Raises:
        UserError: with the key, the value and the choices, written as in YAML.
    """
    choices = list(choices)
    if value not in choices:
        spelt = {None: "null", True: "true", False: "false"}
        names = ", ".join(spelt.get(choice, str(choice)) for choice in choices)
        raise UserError(f"{key}={value} does not exist; choose one of {names}.")


class Interrupted(BaseException):
    """The run was told to stop by a signal and has stopped at a point from which it can resume.

    No `Exception`, so that nothing which handles errors takes it for one.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
