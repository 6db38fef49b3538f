"""Paths on the command line, quoted so that Hydra reads them as they are."""

import os
import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

__all__ = ["hydra_string", "multirun", "quoted", "suggest_quotes"]

# Keys whose values are paths, as those of all keys under `paths`.
_PATHS = (
    *("input", "output", "source", "resume", "checkpoint", "runs", "reference_config", "against"),
    *("teacher.checkpoint", "datamodule.root", "datamodule.split_file", "datamodule.table"),
)
# Those that may be lists.
_LISTS = ("checkpoint", "runs", "teacher.checkpoint")
# Those that may be true or false too.
_SWITCHES = ("datamodule.table",)
_SWEEPS = re.compile(r"(choice|glob|range|interval|shuffle|sort|tag)\(.*\)", re.DOTALL)


def quoted(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command line with its paths in the quotes of Hydra's grammar.

    Hydra reads spaces, commas, brackets, `=` and most other alphabets as grammar, and a folder
    called 2024 as a number. Left as they are: `null`, what is quoted already, interpolations, lists
    for the keys that take them and, in a multirun, commas between values and sweeps such as
    `choice(a,b)`. A path that exists is never one of these. `~` is the home folder.

    Args:
        arguments: of the command line, without the program.
    """
    sweeps = multirun(arguments)
    result = []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        name = key.lstrip("+")
        switch = name in _SWITCHES and value.lower() in ("true", "false")
        if switch and not os.path.lexists(value):
            result.append(argument)
            continue
        if sign and value and (name in _PATHS or name.startswith("paths.")):
            argument = f"{key}={_quoted(value, name in _LISTS, sweeps)}"
        result.append(argument)
    return result


def multirun(arguments: Sequence[str]) -> bool:
    """Tell whether a command line starts a multirun, in which commas separate values."""
    modes = [a.partition("=")[2] for a in arguments if a.lstrip("+").startswith("hydra.mode=")]
    if modes:
        return modes[-1].upper() == "MULTIRUN"
    # A file of the group `sweep` makes a multirun of its command, and so does a cross-validation.
    swept = [a.partition("=")[2] for a in arguments if a.lstrip("+").startswith("sweep=")]
    flags = {"-m", "--multirun"}.intersection(arguments)
    crossed = [a.partition("=")[2] for a in arguments if a.startswith("cross_validation=")]
    folds = crossed[-1:] not in ([], ["null"]) and not any(
        a.lstrip("+").startswith("datamodule.fold=") for a in arguments
    )
    return bool(flags) or swept[-1:] not in ([], ["null"]) or folds


def hydra_string(text: str) -> str:
    """Return a text in single quotes, as a value that Hydra reads as this text."""
    return QuotedString(text.replace("${", "\\${"), Quote.single).with_quotes()


def suggest_quotes(argument: str) -> str:
    """Return `key=value` as a shell takes it, with the value in the quotes of Hydra's grammar."""
    key, _, value = argument.partition("=")
    return shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")


def _quoted(value: str, takes_list: bool, sweeps: bool) -> str:
    if os.path.lexists(value):
        return hydra_string(value) if "${" in value else _plain(value) or hydra_string(value)
    if value.lower() == "null" or _is_quoted(value):
        return value
    if sweeps:
        if _SWEEPS.fullmatch(value):
            return value
        parts = _split(value)
        if len(parts) > 1:
            return ",".join(_quoted(part, takes_list, sweeps=False) for part in parts)
    if takes_list and value.startswith("[") and value.endswith("]"):
        parts = [part for part in _split(value[1:-1]) if part]
        return f"[{','.join(_quoted(part, False, sweeps=False) for part in parts)}]"
    text = os.path.expanduser(value)
    if "${" in text:
        # Interpolations are read within quotes too.
        return _plain(text) or QuotedString(text, Quote.single).with_quotes()
    return _plain(text) or hydra_string(text)


def _plain(text: str) -> str | None:
    """Return a text that Hydra reads as itself without quotes, none if it does not."""
    return text if _read(text) == text else None


def _is_quoted(value: str) -> bool:
    return value[0] in "'\"" and isinstance(_read(value), str)


def _read(value: str) -> object:
    """Return what Hydra reads as a value, none where it reads nothing."""
    try:
        return OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:
        return None


def _split(value: str) -> list[str]:
    """Return the parts between commas that are neither in quotes, lists nor interpolations."""
    item = (
        r"""\s*(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\[[^\]]*\])\s*(?=,|$)|(?:\$\{[^}]*\}|[^,])*"""
    )
    parts, start = [], 0
    while start <= len(value):
        match = re.compile(item, re.DOTALL).match(value, start)
        parts.append(match.group().strip())
        start = match.end() + 1
    return parts
