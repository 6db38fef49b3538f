"""What a run leaves behind in its folder: its results, its config and its checkpoints."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import write_text_atomic
from common.text import printable, skip

__all__ = [
    "NATIVE",
    "RESULTS_SCHEMA",
    "class_sensitivities",
    "data_root",
    "dataset_label",
    "find_runs",
    "is_class_sensitivity",
    "load_config",
    "load_results",
    "main_score",
    "main_scores",
    "mask_gmac",
    "name_runs",
    "native_first",
    "read_config",
    "read_results",
    "run_label",
    "write_results",
]

RESULTS_SCHEMA = 1
# Choices of the group `datamodule` that read any folder.
_OWN_DATA = ("folder", "folder_diagnosis")
# What the name of a score at the size of the original masks begins with.
NATIVE = "native_"


def _is_number(value: Any) -> bool:
    # A whole number in JSON has as many digits as it likes.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


# What `results.json` may hold, by the name that a message gives it; null stands for nothing.
_KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "text": (
        _is_text,
        (
            *("status", "experiment", "trained_as", "checkpoint", "objective", "resolution"),
            *("job", "sweep", "network.name", "data.name", "data.label", "data.split_sha"),
            *("best.monitor", "best.mode", "sampler.name"),
        ),
    ),
    "number": (
        _is_number,
        (
            *("schema", "seconds", "test_seconds", "tested_images", "calls_per_mask"),
            *("network.params", "network.gmac", "network.guidance_gmac", "data.image_size"),
            *("data.n_train", "data.n_val", "data.n_test", "data.folds", "data.fold"),
            *("best.score", "batch.effective", "val.*", "test.*", "baselines.*"),
        ),
    ),
    "pair of numbers": (_is_interval, ("test_intervals.*",)),
}
# Parts of these groups that must be there where the group has anything.
_TOGETHER = ("sampler.name", "sampler.num_steps", "sampler.ensemble", "best.monitor")
_GROUPS = (
    *("network", "data", "sampler", "best", "batch", "val", "test", "test_intervals"),
    *("baselines", "teacher"),
)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json` of a run folder; numbers that are not finite become null."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False)
    write_text_atomic(folder / "results.json", text + "\n")


def read_results(folder: Path, needed: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return the `results.json` of a run folder, or `None` where there is none to be read.

    One that is damaged is named on the terminal.

    Args:
        folder: of the run.
        needed: as in `load_results`.
    """
    if not (folder / "results.json").is_file():
        return None
    try:
        return load_results(folder, needed)
    except UserError as error:
        skip(str(error))
        return None


def load_results(folder: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Return the `results.json` of a run folder.

    Scores of a test at native resolution alone have native names, also where an earlier version
    gave them plain ones. Numbers that are not finite are null; intervals of two nulls are left out.

    Args:
        folder: of the run.
        needed: dotted keys that a tested run must have.

    Raises:
        UserError: the file cannot be read, has a value of another kind than a run writes, or lacks
            one that is needed.
    """
    path = folder / "results.json"
    try:
        text = path.read_text(encoding="utf-8")
        results = json.loads(text, parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(_damaged(path, type(error).__name__)) from error
    fault = _fault(results, needed)
    if fault:
        raise UserError(_damaged(path, fault))
    native = results.get("resolution") == "native"
    for group in ("test", "test_intervals"):
        scores = results.get(group)
        if native and scores and f"test/{NATIVE}dice" not in scores:
            results[group] = {_native_key(key): value for key, value in scores.items()}
    return results


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}); test the run again, or give another."


def _fault(results: Any, needed: Sequence[str]) -> str:
    """Say what is wrong with the content of a `results.json`; empty where nothing is."""
    if not isinstance(results, dict) or "schema" not in results:
        return "no results with a schema"
    for group in _GROUPS:
        if not isinstance(results.get(group) or {}, dict):
            return f"{group} is no group of values"
    intervals = results.get("test_intervals") or {}
    for name in [name for name, pair in intervals.items() if pair in ([None, None], None)]:
        del intervals[name]
    for kind, (fits, keys) in _KINDS.items():
        for key in keys:
            group, _, name = key.rpartition(".")
            values = (results.get(group) or {}) if group else results
            for own in values if name == "*" else [name]:
                value = values.get(own)
                if value is not None and not fits(value):
                    return f"{group}.{own} is no {kind}" if group else f"{own} is no {kind}"
    wanted = [key for key in _TOGETHER if results.get(key.split(".")[0])]
    wanted += needed if results.get("test") else ()
    for key in wanted:
        group, _, name = key.rpartition(".")
        values = (results.get(group) or {}) if group else results
        if values.get(name) is None:
            return f"{key} is missing"
    return ""


def load_config(folder: Path) -> dict[str, Any]:
    """Return the `config.yaml` of a run folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}); give the folder of another run."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path} cannot be read (no keys); give the folder of another run.")
    return config


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the `config.yaml` of a run folder, or `None` where there is none to be read.

    One that is damaged is named on the terminal.
    """
    if not (folder / "config.yaml").is_file():
        return None
    try:
        return load_config(folder)
    except UserError as error:
        skip(str(error))
        return None


def data_root(folder: Path) -> Path | None:
    """Return the data folder of a run, or `None` where it has no config that tells."""
    data = (read_config(folder) or {}).get("datamodule")
    root = data.get("root") if isinstance(data, dict) else None
    return Path(root).resolve() if isinstance(root, str) else None


def _native_key(key: str) -> str:
    name = key.removeprefix("test/")
    # Losses, counts and scores of whole batches were never at native resolution.
    if name.startswith(("loss", "not_finite", "batch_pooled_", "hard_dice_loss")):
        return key
    return f"test/{NATIVE}{name}"


def find_runs(folder: Path, needed: Sequence[str] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the runs in a folder with their results, newest first; damaged ones are named.

    Args:
        folder: of an experiment.
        needed: as in `load_results`.
    """
    if not folder.is_dir():
        return
    for run in sorted(folder.iterdir(), reverse=True):
        results = read_results(run, needed)
        if results is not None:
            yield run, results


def name_runs(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[str]:
    """Return a name for each run of a folder with its results, for tables and plots.

    It is the experiment that trained what the run tested, with the run's folder where two share
    one.
    """
    names = [
        printable(results.get("trained_as") or results.get("experiment") or folder.name)
        for folder, results in runs
    ]
    return [
        name if names.count(name) == 1 else f"{name} {printable(folder.name)}"
        for name, (folder, _) in zip(names, runs, strict=True)
    ]


def dataset_label(datamodule: str, root: str | Path | None) -> str:
    """Return the name under which runs on a dataset are filed and reported.

    Args:
        datamodule: the choice of the group `datamodule`.
        root: its folder, whose name is the label of own data.

    Returns:
        Letters, digits, `.`, `_` and `-`.
    """
    if datamodule in _OWN_DATA and root is not None:
        # Not resolved: a link is named as its user names it.
        folder = os.path.basename(os.path.abspath(root))
        datamodule = re.sub(r"[^\w.-]+", "-", folder).strip("-.") or datamodule
    return datamodule


def run_label(
    experiment: str | None,
    lightning_module: str,
    datamodule: str,
    root: str | Path | None,
    given: Sequence[str],
) -> str:
    """Return the name of a run: its experiment, and its dataset where the command line chooses one.

    Args:
        experiment, lightning_module, datamodule: choices of the groups; without an experiment the
            method names the run, always with its dataset.
        root: the folder of the dataset, where it has one.
        given: keys of the command line.
    """
    dataset = dataset_label(datamodule, root)
    if experiment is None:
        return f"{lightning_module}-{dataset}"
    chosen = "datamodule" in given or "datamodule.root" in given
    named = datamodule not in _OWN_DATA and experiment.endswith(f"_{dataset}")
    if not chosen or named:
        return experiment
    return f"{experiment}-{dataset}"


def main_scores(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the scores by which a tested run is compared, by name, the first to be quoted first.

    It is `balanced_accuracy` of diagnoses; of masks `native_dice`, where the test has it, and
    `dice`. A run that was not tested has `dice` without a value.
    """
    test = results.get("test") or {}
    names = ("balanced_accuracy", f"{NATIVE}dice", "dice")
    found = {name: test[f"test/{name}"] for name in names if f"test/{name}" in test}
    return found or {"dice": None}


def main_score(results: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return the name and the value of the first of `main_scores`."""
    return next(iter(main_scores(results).items()))


def class_sensitivities(test: Mapping[str, Any]) -> list[str]:
    """Return the names of the sensitivities for one class among the scores of a test."""
    return [name for key in test if is_class_sensitivity(name := key.removeprefix("test/"))]


def is_class_sensitivity(name: str) -> bool:
    """Tell whether a score is the sensitivity for one class, such as `mel_sensitivity`."""
    return name.endswith("_sensitivity") and "pooled_" not in name


def native_first(names: Iterable[str]) -> list[str]:
    """Return the names of scores in their order, those at the size of the original masks first."""
    return sorted(names, key=lambda name: not name.removeprefix("test/").startswith(NATIVE))


def mask_gmac(results: Mapping[str, Any]) -> float:
    """Return the multiply-adds of all network calls that a run makes for one image, in 10^9."""
    network, calls = results["network"], results.get("calls_per_mask") or 1
    # Runs of networks that share nothing between calls need not say so.
    return network["gmac"] * calls - (network.get("guidance_gmac") or 0) * (calls - 1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
