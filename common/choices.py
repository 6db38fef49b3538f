"""Choices of config groups on the command line: unknown ones are refused before anything starts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from common.errors import UserError

__all__ = ["check_choices", "explain_key", "leave_to_jobs"]

# Options that a message lists whole.
_FEW = 30
# Keys of earlier versions, with what to write now.
_RENAMED = {
    "datamodule.soft_masks": "datamodule.mask_resize, which is soft where that was true and area "
    "where it was false"
}
# With these there are options elsewhere too, which Hydra knows.
_ADDED = ("--config-dir", "-cd", "hydra.searchpath")


def check_choices(arguments: Sequence[str], conf: Path) -> list[str]:
    """Return the arguments of a command line with its choices of groups as Hydra takes them.

    `logger=null` and `~logger` become `logger=none` in groups that have such a file; in groups
    without a default they are left out.

    Args:
        arguments: of the command line, without the program.
        conf: the folder of the configs.

    Raises:
        UserError: a group has no such choice, also of those that a multirun lists, or needs one.
    """
    groups = {
        path.name: sorted(file.stem for file in path.glob("[!_]*.yaml"))
        for path in conf.iterdir()
        if path.is_dir() and path.name != "hydra"
    }
    entries = yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    empty = [key for entry in entries if entry != "_self_" for key in entry if entry[key] is None]
    own = re.compile(r"hydra(/\w+)*")
    added = any(argument.lstrip("+").startswith(_ADDED) for argument in arguments)
    result: list[str] = []
    for argument in arguments:
        group = argument.lstrip("+~").partition("=")[0]
        override = _parse(argument) if group in groups or own.fullmatch(group) else None
        names = _names(override) if override else []
        if None in names and group not in groups:
            raise UserError(f"{group}=null is no choice here; leave it out for the default.")
        options = groups.get(group)
        if override is None or options is None:
            result.append(argument)
            continue
        if None in names and "none" not in options:
            if group not in empty or len(names) > 1:
                raise UserError(
                    f"{group}=null is no choice here; choose one of {', '.join(options)}."
                    if group not in empty
                    else f"{group}=null cannot be one of several choices; give a run of its own."
                )
            # The default; an earlier choice of the same group is taken back.
            result = [other for other in result if other.partition("=")[0].lstrip("+") != group]
            continue
        for name in names:
            if not added and name not in (*options, None):
                raise UserError(_refusal(group, name, options))
        if None in names or argument.startswith("+"):
            argument = f"{group}={','.join(name or 'none' for name in names)}"
        result.append(argument)
    return result


def leave_to_jobs(arguments: Sequence[str], conf: Path) -> list[str]:
    """Return the arguments of a multirun with its keys as Hydra takes them where choices vary.

    Hydra checks single keys against the defaults, without choices of groups that vary. A key with
    one value among several is checked by each job: `network.kwargs.base_width=choice(8)`.

    Args:
        arguments: of the command line, without the program.
        conf: the folder of the configs.
    """
    groups = {path.name for path in conf.iterdir() if path.is_dir()} - {"hydra"}
    overrides = [_parse(argument) for argument in arguments]
    varied = {o.key_or_group for o in overrides if o is not None and o.is_sweep_override()}
    if not varied & groups:
        return list(arguments)
    # Those that a method or an experiment brings; others are checked before the first job.
    left = {*varied, "lightning_module", "network", "callbacks", "sampler", "teacher", "metrics"}
    result = []
    for argument, override in zip(arguments, overrides, strict=True):
        key, _, value = argument.partition("=")
        if override is not None and "." in key and key.split(".")[0] in left & groups:
            wrapped = _parse(f"{key}=choice({value})")
            if wrapped is not None and not override.is_sweep_override():
                argument = f"{key}=choice({value})"
        result.append(argument)
    return result


def explain_key(key: str, conf: Path) -> str:
    """Return why a key is not in the composed config: mistyped, renamed or of another choice.

    Args:
        key: dotted, as on the command line.
        conf: the folder of the configs.
    """
    if key in _RENAMED:
        return f"{key} is now {_RENAMED[key]}"
    owners, empty, targets = _keys(conf)
    above = next((part for part in empty if key.startswith(f"{part}.")), None)
    if above and (key in owners or not any(other.startswith(f"{above}.") for other in owners)):
        rest = key.removeprefix(f"{above}.")
        if above in targets:
            rest = f"_target_:{targets[above]},{rest}"
        return f"{key} has no place while {above} is null; give {above}={{{rest}:<value>}} whole"
    if owners.get(key):
        return f"{key} belongs to another choice, such as {owners[key]}"
    alike = [other for other in owners if ("." in other) == ("." in key)]
    near = get_close_matches(key, alike, n=3, cutoff=0.6)
    return f"{key} does not exist" + (f"; the nearest keys are {', '.join(near)}" if near else "")


def _parse(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _names(override: Override) -> list[str | None]:
    """Return what an override chooses, empty where only Hydra can tell."""
    if override.is_delete():
        return [None]
    if override.is_choice_sweep():
        values = [getattr(value, "text", value) for value in override.value().list]
    elif override.is_sweep_override():
        return []
    else:
        values = [override.value()]
    spelt = {"None": None, "True": "true", "False": "false"}
    return [spelt.get(str(value), str(value)) for value in values]


def _refusal(group: str, name: str, options: Sequence[str]) -> str:
    near = get_close_matches(name.lower(), options, n=5, cutoff=0.5)
    if len(options) > _FEW:
        return (
            f"{group}={name} does not exist. Choose a file of conf/{group}, such as "
            f"{', '.join(near or options[:5])}."
        )
    nearest = f"; the nearest is {near[0]}" if near else ""
    return f"{group}={name} does not exist{nearest}. Choose one of {', '.join(options)}."


def _keys(conf: Path) -> tuple[dict[str, str], set[str], dict[str, str]]:
    """Return every dotted key of the configs with a choice that has it, which may be null, classes.

    The choice is empty where all choices have the key; one of the key's own group comes before an
    experiment. A class is the `_target_` under a key.
    """
    owners = {path.name: "" for path in conf.iterdir() if path.is_dir()}
    empty: set[str] = set()
    targets: dict[str, str] = {}
    paths = sorted(conf.rglob("*.yaml"), key=lambda path: (_is_global(path), path))
    for path in paths:
        text = path.read_text(encoding="utf-8")
        group = path.relative_to(conf).parent.as_posix()
        prefix = "" if group == "." or _is_global(path) else group.replace("/", ".")
        owner = f"{group}={path.stem}"
        if group == "." or path.name.startswith("_"):
            owner = ""
        content = yaml.safe_load(text)
        for key, value in _flat(content if isinstance(content, dict) else {}, prefix):
            owners[key] = owners.get(key) or owner
            if value is None:
                empty.add(key)
            if key.endswith("._target_"):
                targets[key.removesuffix("._target_")] = value
    return owners, empty, targets


def _is_global(path: Path) -> bool:
    return "@package _global_" in path.read_text(encoding="utf-8")[:40]


def _flat(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if name == "defaults":
            continue
        key = f"{prefix}.{name}" if prefix else str(name)
        yield key, value
        if isinstance(value, dict):
            yield from _flat(value, key)
