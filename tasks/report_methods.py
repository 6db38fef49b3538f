"""Runs of one method together: scores over seeds, and what a mask costs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.runs import mask_gmac, read_config
from common.text import printable, skip
from tasks.configuration import get_value
from tasks.statistics import bootstrap_interval, mean_images, read_images

__all__ = [
    "METHOD_HEADER",
    "Column",
    "Method",
    "Timings",
    "dataset_name",
    "group_runs",
    "method_row",
    "sampler_words",
]

Run = tuple[Path, dict[str, Any]]
# Heading, name of the score without `test/`, digits.
Column = tuple[str, str, int]

METHOD_HEADER = (
    "experiment",
    "data",
    "px",
    "objective",
    "runs",
    "parameters",
    "GMAC a call",
    "sampler",
    "calls an image",
    "GMAC an image",
    "s a mask, PyTorch",
    "s a mask, ONNX",
)
# Groups of a config that say how a run learns.
_RECIPE = ("network", "lightning_module", "schedule", "augmentation", "teacher")


@dataclass(frozen=True)
class Method:
    """Runs that differ in nothing but their seed and the fold of a cross-validation.

    Attributes:
        name: the experiment that trained them, with a run's folder where two share it.
        data: name of the dataset on which they were tested.
        objective: what a diffusion network predicts, empty for others.
        runs: folders and results.
    """

    name: str
    data: str
    objective: str
    runs: tuple[Run, ...]

    @property
    def results(self) -> dict[str, Any]:
        """Those of one of the runs, for what all have in common."""
        return self.runs[0][1]

    def score(self, key: str) -> tuple[float | None, list[float] | None, float | None]:
        """Return the mean over the runs, its 95 % interval and the runs' standard deviation.

        There is none of a score that only some of the runs have. The interval is the bootstrap over
        images of each one's mean over the runs. For scores that are no means over images it is the
        interval of a single run as it was tested.

        Args:
            key: without `test/`.
        """
        values = [results["test"].get(f"test/{key}") for _, results in self.runs]
        values = [value for value in values if value is not None]
        if len(values) < len(self.runs):
            return None, None, None
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return float(np.mean(values)), self._interval(key), spread

    def _interval(self, key: str) -> list[float] | None:
        if len(self.runs) == 1:
            return (self.results.get("test_intervals") or {}).get(f"test/{key}")
        folders = [folder for folder, _ in self.runs]
        if not all((folder / "test_images.csv").is_file() for folder in folders):
            return None
        scores = [read_images(folder) for folder in folders]
        images = mean_images(scores, pooled=bool(self.results["data"].get("folds")))
        if key not in next(iter(images.values()), {}):
            return None
        return bootstrap_interval(np.array([row[key] for row in images.values()]))


def group_runs(runs: Iterable[Run]) -> list[Method]:
    """Put runs together that differ in nothing but their seed or fold, in the order of their data.

    Those of a sweep over anything else stay apart and have a run's folder in their name. Of several
    tests of one checkpoint on the same data the first counts.
    """
    groups: dict[tuple[str, ...], dict[Path, Run]] = {}
    for path, results in runs:
        checkpoint = results.get("checkpoint")
        origin = Path(checkpoint).resolve().parent.parent if checkpoint else path.resolve()
        data = results["data"]
        # Two folders of one's own may share a name; the folds of one have a split each.
        split = "" if data.get("folds") or not _is_own(data) else str(data.get("split_sha"))
        key = (
            dataset_name(results),
            str(data["image_size"]),
            split,
            sampler_words(results),
            _name(results),
            _recipe(origin) or _recipe(path),
        )
        groups.setdefault(key, {}).setdefault(origin, (path, results))
    shown = [key[:-1] for key in groups]
    methods = []
    for key, members in groups.items():
        rows = tuple(members.values())
        own = "" if shown.count(key[:-1]) == 1 else f" {printable(rows[0][0].name)}"
        objective = rows[0][1].get("objective") or ""
        methods.append(Method(_name(rows[0][1]) + own, key[0], objective, rows))
    return sorted(methods, key=lambda method: method.data)


def dataset_name(results: Mapping[str, Any]) -> str:
    """Return the name of the dataset of a test: of one's own data that of its folder."""
    data = results["data"]
    return (data.get("label") if _is_own(data) else None) or data["name"]


def _is_own(data: Mapping[str, Any]) -> bool:
    return data["name"].startswith("Folder")


def _name(results: Mapping[str, Any]) -> str:
    """Return the experiment that trained what a run tested, and the folds of a cross-validation."""
    folds = results["data"].get("folds")
    name = printable(results.get("trained_as") or results["experiment"])
    return f"{name}, {folds} folds" if folds else name


def _recipe(folder: Path) -> str:
    """Return what decides how a run learns but its seed, empty where its config is not there."""
    config = read_config(folder)
    if config is None:
        return ""
    chosen = {key: config.get(key) for key in _RECIPE} | {
        "epochs": get_value(config, "trainer.max_epochs"),
        "batch": get_value(config, "datamodule.batch_size"),
    }
    return json.dumps(_without(chosen, {"seed", "checkpoint"}), sort_keys=True)


def _without(value: Any, keys: set[str]) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without(item, keys) for key, item in value.items() if key not in keys}


def sampler_words(results: dict[str, Any]) -> str:
    """Return how a run samples, such as `5 DDIM x 3`, or `none`."""
    sampler = results.get("sampler")
    if not sampler:
        return "none"
    return f"{sampler['num_steps']} {sampler['name']} x {sampler['ensemble']}"


class Timings:
    """What `task=benchmark` measured under a folder of runs; the newest counts.

    Args:
        folder: `paths.runs`.
    """

    def __init__(self, folder: Path) -> None:
        self._rows: list[dict[str, Any]] = []
        files = sorted(folder.glob("*/*/benchmark.json"), key=lambda path: path.stat().st_mtime)
        for path in reversed(files):
            try:
                self._rows += _measurements(path)
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                skip(f"{path} is damaged ({type(error).__name__}); measure again.")

    def of(self, run: Run) -> dict[str, Any] | None:
        """Return the measurement of a network and sampler like a run's, none where there is none.

        Only float32 counts, which the scores are of.
        """
        path, results = run
        config = read_config(path)
        if config is None:
            return None
        network = {key: get_value(config, f"network.{key}") for key in ("name", "kwargs")}
        for row in self._rows:
            if (
                row.get("network") == network
                and row.get("precision") == "32-true"
                and row.get("image_size") == results["data"]["image_size"]
                and sampler_words(row) == sampler_words(results)
            ):
                return row
        return None

    def machines(self, methods: Iterable[Method]) -> set[str]:
        """Return on what the measurements of some methods were made."""
        found = (self.of(method.runs[0]) for method in methods)
        return {row["machine"] for row in found if row}


def _measurements(path: Path) -> list[dict[str, Any]]:
    report = json.loads(path.read_text(encoding="utf-8"))
    machine = f"{report['threads']} threads of {report['device']}"
    rows = [{**row, "machine": machine} for row in report["networks"]]
    for row in rows:
        sampler_words(row)
        for key in ("mask_s", "onnx_mask_s"):
            # Raises where it is no number.
            f"{row.get(key) or 0:.3f}"
    return rows


def method_row(
    method: Method, columns: Sequence[Column], compared: Column, timings: Timings
) -> list[str]:
    """Return the cells of a method under `METHOD_HEADER`, its scores and the spread of one.

    Args:
        method: of at least one run.
        columns: heading, score and digits of each score.
        compared: the column whose spread over the runs comes last.
        timings: where the seconds come from.
    """
    results = method.results
    network, calls = results["network"], results.get("calls_per_mask")
    timed = timings.of(method.runs[0]) or {}

    def seconds(key: str, reckoned: str) -> str:
        value = timed.get(key)
        return "" if value is None else f"{value:.3f}{' (reckoned)' if timed.get(reckoned) else ''}"

    scores = []
    for _, key, digits in columns:
        value, interval, _ = method.score(key)
        between = interval and f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
        scores.append("" if value is None else f"{value:.{digits}f}{between or ''}")
    _, key, digits = compared
    spread = method.score(key)[2]
    return [
        method.name,
        method.data,
        str(results["data"]["image_size"]),
        method.objective,
        str(len(method.runs)),
        f"{network['params']:,}",
        f"{network['gmac']:.3f}",
        sampler_words(results),
        "" if calls is None else str(calls),
        "" if calls is None else f"{mask_gmac(results):.2f}",
        seconds("mask_s", "mask_s_reckoned"),
        seconds("onnx_mask_s", "onnx_reckoned"),
        *scores,
        "" if spread is None else f"{spread:.{digits}f}",
    ]
