"""The checkpoints that predict together: a list of files, or the runs of a multirun."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from common.errors import UserError
from lightning_modules.ensemble import Ensemble
from tasks.configuration import split_override
from tasks.sweep import read_jobs
from tasks.sweep_table import FOLD, REPEATED, SEED

__all__ = ["find_checkpoints", "load_ensemble"]

# A config, its module, and how that wants its photographs.
Loaded = tuple[dict[str, Any], L.LightningModule, dict[str, Any]]


def load_ensemble(config: dict[str, Any], load: Callable[[dict[str, Any]], Loaded]) -> Loaded:
    """Load the checkpoints of a config as one module that predicts their mean.

    Args:
        config: with `checkpoint`, see `find_checkpoints`.
        load: loads a config's single checkpoint.

    Returns:
        As `load` for a single checkpoint. For several, the config is that of the first, with all of
        them as its `checkpoint`.

    Raises:
        UserError: a checkpoint cannot be used, some are exported and others not, or they need
            other photographs or have other classes.
    """
    paths = find_checkpoints(config["checkpoint"])
    exported = [path for path in paths if path.suffix == ".onnx"]
    if exported and len(exported) < len(paths):
        trained = next(path for path in paths if path not in exported)
        raise UserError(
            f"checkpoint has the exported {exported[0]} and the trained {trained}; give the .ckpt "
            "files of all, or the .onnx files of all."
        )
    loaded = [load({**config, "checkpoint": str(path)}) for path in paths]
    if len(loaded) == 1:
        return loaded[0]
    first, _, settings = loaded[0]
    described = [_describe(*member[1:]) for member in loaded]
    for path, description in zip(paths, described, strict=True):
        for key, value in description.items():
            if value != described[0][key]:
                raise UserError(
                    f"The checkpoints do not fit together: {path} has {key}={value}, and "
                    f"{paths[0]} has {described[0][key]}. Give checkpoints that agree in it."
                )
    members = [member for _, member, _ in loaded]
    return first | {"checkpoint": [str(path) for path in paths]}, Ensemble(members), settings


def _describe(module: L.LightningModule, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the members of an ensemble must agree in."""
    classes = list(getattr(module, "classes", None) or ())
    # A switch that is off need not be in an older checkpoint.
    return {"classes": classes, **{key: value or None for key, value in settings.items()}}


def find_checkpoints(given: str | Sequence[str]) -> list[Path]:
    """Return the files that `checkpoint` stands for.

    Args:
        given: a file, the folder of a multirun such as `runs/sweeps/<time>`, or several of them.
            The runs of a multirun may differ in seed and fold alone.

    Raises:
        UserError: a multirun has not finished, or has runs of several settings.
    """
    values = [given] if isinstance(given, str) else list(given)
    found: list[Path] = []
    for value in values:
        if not isinstance(value, str) or not value:
            raise UserError(f"checkpoint has the entry {value!r}; give names of files.")
        path = Path(value)
        found += _find_best(path) if (path / "jobs").is_dir() else [path]
    return found


def _find_best(multirun: Path) -> list[Path]:
    """Return the best checkpoint of every run of a multirun."""
    jobs = read_jobs(multirun)
    settings = [dict(map(split_override, job["overrides"])) for job in jobs]
    keys = {key for setting in settings for key in setting} - set(REPEATED)
    varied = sorted(k for k in keys if len({setting.get(k) for setting in settings}) > 1)
    if varied:
        raise UserError(
            f"The runs of checkpoint={multirun} differ in {', '.join(varied)}; give the "
            "checkpoints of one setting as checkpoint=[<file>,<file>]."
        )
    done = [job for job in jobs if job["status"] == "finished"]
    expected = len(jobs)
    if settings and FOLD in settings[0]:
        seeds = {setting.get(SEED) for setting in settings}
        folds = int(settings[0].get("cross_validation") or 0)
        expected = max(expected, len(seeds) * folds)
    if len(done) < max(expected, 1):
        raise UserError(
            f"{len(done)} of {expected} runs of checkpoint={multirun} have finished; complete them "
            "by the command that started it with skip_finished=true, or give checkpoints as "
            "checkpoint=[<file>,<file>]."
        )
    runs = multirun.resolve().parent.parent
    return [runs / job["folder"] / "checkpoints" / "best.ckpt" for job in done]
