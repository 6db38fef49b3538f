"""What a run leaves behind in its folder: `results.json` and its checkpoints."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_text_atomic

__all__ = [
    "NATIVE",
    "RESULTS_SCHEMA",
    "dataset_label",
    "find_runs",
    "main_score",
    "main_scores",
    "mask_gmac",
    "name_runs",
    "native_first",
    "read_results",
    "run_label",
    "write_results",
]

RESULTS_SCHEMA = 1
# Choices of the group `datamodule` that read any folder.
_OWN_DATA = ("folder", "folder_diagnosis")
# What the name of a score at the size of the original masks begins with.
NATIVE = "native_"


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json` of a run folder; numbers that are not finite become null."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False)
    write_text_atomic(folder / "results.json", text + "\n")


def read_results(folder: Path) -> dict[str, Any] | None:
    """Return the `results.json` of a run folder, or `None` where there is none to be read.

    Scores of a test at native resolution alone have native names, also where an earlier version
    gave them plain ones.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(results, dict) or "schema" not in results:
        return None
    native = results.get("resolution") == "native"
    for group in ("test", "test_intervals"):
        scores = results.get(group)
        if native and isinstance(scores, dict) and f"test/{NATIVE}dice" not in scores:
            results[group] = {_native_key(key): value for key, value in scores.items()}
    return results


def _native_key(key: str) -> str:
    name = key.removeprefix("test/")
    # Losses, counts and scores of whole batches were never at native resolution.
    if name.startswith(("loss", "not_finite", "batch_pooled_", "hard_dice_loss")):
        return key
    return f"test/{NATIVE}{name}"


def find_runs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the runs in a folder with their results, newest first."""
    if not folder.is_dir():
        return
    for run in sorted(folder.iterdir(), reverse=True):
        results = read_results(run)
        if results is not None:
            yield run, results


def name_runs(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[str]:
    """Return a name for each run of a folder with its results, for tables and plots.

    It is the experiment that trained what the run tested, with the run's folder where two share
    one.
    """
    names = [
        results.get("trained_as") or results.get("experiment") or folder.name
        for folder, results in runs
    ]
    return [
        name if names.count(name) == 1 else f"{name} {folder.name}"
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
    if not chosen or experiment.endswith(f"_{dataset}"):
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


def native_first(names: Iterable[str]) -> list[str]:
    """Return the names of scores in their order, those at the size of the original masks first."""
    return sorted(names, key=lambda name: not name.removeprefix("test/").startswith(NATIVE))


def mask_gmac(results: Mapping[str, Any]) -> float:
    """Return the multiply-adds of all network calls that a run makes for one image, in 10^9."""
    network, calls = results["network"], results.get("calls_per_mask") or 1
    # Runs of networks that share nothing between calls need not say so.
    return network["gmac"] * calls - network.get("guidance_gmac", 0) * (calls - 1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
