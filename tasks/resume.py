"""Going on with a run that was stopped, in its own folder and with its own config."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from common.cluster import agree, job_name, restarted
from common.errors import UserError
from common.files import refuse_read_only
from common.runs import data_root, find_runs, load_config, read_results
from datamodules.splits import read_parts
from tasks.configuration import (
    check_targets,
    get_value,
    given_keys,
    modernise,
    relocate,
    set_value,
    split_override,
)

__all__ = ["check_same_data", "goes_on", "last_checkpoint", "resumed_config", "run_folder"]

# What may differ from the command that started the run.
_FREE = (
    "trainer",
    "training",
    "paths",
    "logger",
    "resume",
    "teacher.checkpoint",
    "teacher.allow_leak",
    "datamodule.num_workers",
    "callbacks.non_finite",
    "callbacks.last.every_minutes",
)
# What a run has found for itself, and its command need not give.
_FOUND = (
    "datamodule.classes",
    "datamodule.skip_other_classes",
    "lightning_module.classes",
    "network.kwargs.num_classes",
    "network.kwargs.metadata",
)
# What follows from `paths`.
_PLACES = ("datamodule.root", "datamodule.cache")


def run_folder(
    resume: str | None, runs: str, experiment: str, stamp: str, num_nodes: int = 1
) -> str:
    """Return the folder of a run: a new one, or that of the run to resume.

    All processes of a run have the same one, however they were started, and so has a SLURM job
    that was queued again.

    Args:
        resume: a run folder, `latest`, or none.
        runs: the folder of all runs.
        experiment: the name under which this run's folder lies in `runs`.
        stamp: the time, which names a new folder.
        num_nodes: of a cluster, on each of which the command is given.

    Raises:
        UserError: there is no such run, it has no `last.ckpt`, or nothing can be written there.
    """
    return agree(lambda: _choose_folder(resume, Path(runs), experiment, stamp), num_nodes)


def _choose_folder(resume: str | None, runs: Path, experiment: str, stamp: str) -> str:
    if resume is None:
        folder = _requeued(runs / experiment) or runs / experiment / stamp
        refuse_read_only(folder)
        return str(folder)
    if resume != "latest":
        if not last_checkpoint(Path(resume)).is_file():
            raise UserError(
                f"resume={resume} has no checkpoints/last.ckpt to go on from; give the folder of a "
                "run that has, or leave resume out to start a new run."
            )
        refuse_read_only(Path(resume))
        return resume
    given, names = given_keys(), ["*"]
    if "experiment" in given and not {"datamodule", "datamodule.root"} & set(given):
        # On whatever data it was.
        names = [experiment, f"{experiment}-*"]
    elif not all(_is_free(key) or key in _FOUND for key in given):
        names = [experiment]
    patterns = [f"{name}/*" for name in names]
    found = [p for name in patterns for p in runs.glob(name) if last_checkpoint(p).is_file()]
    if not found:
        places = " or ".join(str(runs / pattern) for pattern in patterns)
        raise UserError(
            f"resume=latest finds no run with a checkpoints/last.ckpt in {places}; leave resume "
            "out to start a new run."
        )
    given = _given_root()
    # Of folders of one name the one that is given comes first.
    own = [folder for folder in found if data_root(folder) == given]
    newest = max((given and own) or found, key=lambda folder: folder.name)
    refuse_read_only(newest)
    return str(newest)


def _given_root() -> Path | None:
    """Return the data folder that the command line gives, if it does."""
    for override in HydraConfig.get().overrides.task:
        key, value = split_override(override)
        if key == "datamodule.root":
            return Path(value.strip("'\"")).resolve()
    return None


def _requeued(folder: Path) -> Path | None:
    """Return the newest run that this job had begun before it was started again."""
    job = job_name()
    if job is None or not restarted():
        return None
    return next((run for run, results in find_runs(folder) if results.get("job") == job), None)


OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)


def last_checkpoint(folder: Path) -> Path:
    """Return where a run folder has the checkpoint to go on from."""
    return folder / "checkpoints" / "last.ckpt"


def goes_on(config: dict[str, Any]) -> bool:
    """Say whether a run goes on with an earlier one; a job that was started again does so unasked.

    Args:
        config: as composed from the command line; `resume` is set where it goes on.
    """
    folder = Path(config["paths"]["run"])
    if config["resume"] is None and restarted() and last_checkpoint(folder).is_file():
        config["resume"] = str(folder)
    return config["resume"] is not None


def resumed_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with which the run in `paths.run` goes on: its own.

    Trainer, paths, logger, loader processes and the teacher's place may be given anew on the
    command line. Everything else given there must be what the run has, so that the command that
    started a run, with `resume=latest` at its end, goes on with it.

    Args:
        config: as composed from the command line, resolved.

    Raises:
        UserError: the folder has no readable config, that names foreign classes, or the command
            line contradicts it.
    """
    folder = Path(config["paths"]["run"])
    stored = _read_config(folder, config)
    merged = _moved(copy.deepcopy(stored), stored["paths"]["run"], str(folder))
    # What there was not yet when the run was started.
    merged = {
        key: copy.deepcopy(value) for key, value in config.items() if key not in stored
    } | merged
    merged["resume"] = config["resume"]
    given = given_keys()
    for key in given:
        key = key.replace("/", ".").split("@")[0]
        if key in ("experiment", "debug"):
            _check_equal(folder, key, *(_choices(c)[key] for c in (stored, config)))
        elif _is_free(key):
            set_value(merged, key, copy.deepcopy(get_value(config, key)))
        else:
            theirs, ours = get_value(stored, key), get_value(config, key)
            if key in _PLACES:
                set_value(merged, key, ours)
            for part in _differing(theirs, ours, key):
                found = part in _FOUND and get_value(config, part) is None
                if not found and part not in _PLACES and not _is_free(part):
                    _check_equal(folder, part, get_value(stored, part), get_value(config, part))
    _follow_paths(merged, stored, config, given)
    identity = get_value(stored, "logger.wandb.id")
    if identity and get_value(merged, "logger.wandb"):
        merged["logger"]["wandb"]["id"] = identity
    check_targets(merged, config, folder / "config.yaml")
    return merged


def check_same_data(folder: Path, split_sha: str, digests: Mapping[str, str]) -> None:
    """Refuse to go on with a run whose images or split have changed since.

    Args:
        folder: of the run.
        split_sha, digests: of the datamodule now.

    Raises:
        UserError: the digest of the split is not the one in the run's `results.json`, or images
            are not those in its `splits.csv`.
    """
    before = get_value(read_results(folder) or {}, "data.split_sha")
    if before not in (None, split_sha):
        raise UserError(
            f"The data is not what the run {folder} was started with (split {split_sha}, then "
            f"{before}); restore the images or start a new run."
        )
    try:
        known = read_parts(folder / "splits.csv")[1] or {}
    except UserError:
        return  # The digest of the split has told that ids and parts are the same.
    other = [key for key, digest in known.items() if digests.get(key) != digest]
    if other:
        raise UserError(
            f"{len(other)} images, first {other[0]}, are not those that the run {folder} was "
            "started with; restore them or start a new run."
        )


def _read_config(folder: Path, composed: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a training run.

    Args:
        folder: of the run.
        composed: the config of the command line, whose groups are the ones that are needed.
    """
    stored = load_config(folder)
    if stored.get("task") != "fit":
        raise UserError(f"{folder} is no training run; resume=<folder> needs one.")
    for group, ours in composed.items():
        theirs = stored.get(group)
        # Callbacks and loggers are groups of groups, each of which may be none.
        groups = {group: theirs} if isinstance(ours, dict) else {}
        if group in ("callbacks", "logger") and isinstance(theirs, dict):
            groups |= {f"{group}.{name}": part for name, part in theirs.items()}
        for name, content in groups.items():
            if content is not None and not isinstance(content, dict):
                _refuse_damaged(folder, f"{name} is no group of keys")
    for key in ("run_name", "paths.run", "paths.data", "paths.cache"):
        if not isinstance(get_value(stored, key), str):
            _refuse_damaged(folder, f"{key} is no text")
    for key in ("datamodule", "trainer", "lightning_module", "network"):
        if not stored.get(key):
            _refuse_damaged(folder, f"{key} is missing")
    modernise(stored)
    return stored


def _refuse_damaged(folder: Path, why: str) -> NoReturn:
    raise UserError(
        f"{folder / 'config.yaml'} is damaged ({why}), so the run cannot be resumed; give the "
        "folder of another run or start a new one."
    )


def _choices(config: dict[str, Any]) -> dict[str, Any]:
    # A run that goes on keeps its dataset, so the command need not name it.
    experiment = config["run_name"].removesuffix(f"-{config.get('data_label')}")
    return {"experiment": experiment, "debug": config.get("debug_mode")}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _differing(theirs: Any, ours: Any, key: str) -> list[str]:
    """Return the dotted keys of the leaves in which two values differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [*theirs, *(name for name in ours if name not in theirs)]
        return [
            part
            for name in names
            for part in _differing(theirs.get(name), ours.get(name), f"{key}.{name}")
        ]
    return [] if theirs == ours else [key]


def _check_equal(folder: Path, key: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise UserError(
            f"{key}={ours} cannot change the run {folder}, which has {theirs}; leave it out, or "
            "leave resume out to start a new run."
        )


def _moved(value: Any, old: str, new: str) -> Any:
    """Replace the run folder at the start of every path in a config."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value


def _follow_paths(
    merged: dict[str, Any], stored: dict[str, Any], config: dict[str, Any], given: list[str]
) -> None:
    """Let the dataset follow `paths.data` and `paths.cache` where the command line gives them."""
    data, old, new = merged["datamodule"], stored["paths"], config["paths"]
    if "paths.data" in given and data.get("root"):
        data["root"] = relocate(data["root"], old["data"], new["data"])
    if "paths.cache" in given:
        data["cache"] = relocate(data["cache"], old["cache"], new["cache"])
