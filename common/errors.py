"""What ends a run apart from success: a user's mistake, or a signal."""

import math
import signal
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from rich.console import Console

from common.text import plain_text

__all__ = [
    "STOPS",
    "WARNINGS",
    "Interrupted",
    "UserError",
    "check_choice",
    "check_number",
    "exit_with",
]

# What SLURM and submitit send before the time is up or a job must make room.
WARNINGS = tuple(s for s in signal.Signals if s.name in ("SIGUSR1", "SIGUSR2"))
# On these a run saves and ends, as on an interrupt from the terminal.
STOPS = (signal.SIGTERM, *WARNINGS)


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


def check_number(
    key: str,
    value: Any,
    least: float,
    below: float = math.inf,
    whole: bool = False,
    exclusive: bool = False,
) -> None:
    """Refuse a config value that is no number from `least` up to but not including `below`.

    Args:
        key, value: of the config.
        least, below: the range.
        whole: the number must be an int.
        exclusive: it must be above `least`.

    Raises:
        UserError: with the key, the value and the range.
    """
    kind = int if whole else int | float
    number = isinstance(value, kind) and not isinstance(value, bool)
    # Comparisons with nan are false.
    if not number or not least <= value < below or (exclusive and value == least):
        what = "whole number" if whole else "number"
        low = f"{'above' if exclusive else 'at least'} {least:g}"
        high = "" if math.isinf(below) else f" and below {below:g}"
        raise UserError(f"{key}={value} must be a {what}, {low}{high}.")


class Interrupted(BaseException):
    """The run was told to stop by a signal and has stopped at a point from which it can resume.

    No `Exception`, so that nothing which handles errors takes it for one.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def exit_with(message: str, code: int = 2) -> NoReturn:
    """Print why the program ends, as an error where the user can mend it, and end it.

    Args:
        message: printed on one line, without control characters.
        code: exit code; 2 is that of a user's mistake.
    """
    text = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        plain_text(f"error: {text}" if code == 2 else text), style="red"
    )
    sys.exit(code)
