"""What the images of a test say of its scores: intervals and differences."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from common.errors import UserError
from common.runs import NATIVE, load_config, read_results
from common.text import from_cell
from lightning_modules.metrics import classification_scores, positive_class

__all__ = [
    "Predictions",
    "bootstrap_interval",
    "compare_predictions",
    "compare_scores",
    "join_predictions",
    "mean_images",
    "percentile_interval",
    "pooled_scores",
    "read_images",
    "read_predictions",
    "read_scores",
    "resampled_scores",
]

LEVEL = 0.95
RESAMPLES = 2000
# Bootstrap means are drawn in blocks of about that many numbers, which bounds the memory.
BLOCK = 1 << 22
# Columns of test_images.csv that are no scores.
_SIZES = ("lesion_pixels", "predicted_pixels")
_NOT_SCORES = {"id", "finite", *_SIZES, *(NATIVE + name for name in _SIZES)}
# How reading a damaged table fails.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error)
# Columns of predictions.csv that are no classes.
FIXED_COLUMNS = ("id", "label", "predicted", "correct", "confidence")


@dataclass
class Predictions:
    """What a run predicted for the photographs of its test.

    Attributes:
        ids: of the photographs.
        labels: their classes as numbers, `(N,)`.
        probability: of each class, `(N, C)`.
        classes: their names.
    """

    ids: list[str]
    labels: np.ndarray
    probability: np.ndarray
    classes: tuple[str, ...]

    def of(self, ids: list[str]) -> "Predictions":
        """Return those of some photographs, in their order."""
        places = {key: place for place, key in enumerate(self.ids)}
        rows = [places[key] for key in ids]
        return Predictions(ids, self.labels[rows], self.probability[rows], self.classes)

    def of_truth(self) -> dict[str, dict[str, float]]:
        """Return the probability of the true class of each photograph, by its id.

        It is 0 where the probabilities are not finite.
        """
        true = self.probability[np.arange(len(self.ids)), self.labels]
        true = np.where(np.isfinite(self.probability).all(1), true, 0.0)
        return {
            key: {"probability_of_truth": float(chance)}
            for key, chance in zip(self.ids, true, strict=True)
        }


def read_predictions(folder: Path) -> Predictions:
    """Return the diagnoses of a run's test.

    Raises:
        UserError: the run has no `predictions.csv`, or it is damaged.
    """
    path = folder / "predictions.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows = list(table)
            classes = tuple(name for name in _columns(table) if name not in FIXED_COLUMNS)
        return Predictions(
            [from_cell(row["id"]) for row in rows],
            np.array([classes.index(row["label"]) for row in rows]),
            np.array([[float(row[name]) for name in classes] for row in rows]),
            classes,
        )
    except _DAMAGE as error:
        raise UserError(_unreadable(path, folder, error)) from error


def resampled_scores(
    predictions: Predictions, settings: Mapping[str, Any], seed: int = 0
) -> dict[str, np.ndarray]:
    """Return every score of diagnoses for 2000 draws of as many photographs as there are.

    Args:
        predictions: of at least one photograph.
        settings: arguments of `ClassificationScores`.
        seed: of the draws, which are the same for all predictions of as many photographs.
    """
    count = len(predictions.ids)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return _scores(predictions, settings, draws)


def _scores(
    predictions: Predictions, settings: Mapping[str, Any], weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    known = dict(settings)
    known["positive"] = positive_class(known.get("positive"), predictions.classes)
    return classification_scores(
        predictions.probability,
        predictions.labels,
        weights,
        classes=predictions.classes,
        **known,
    )


def read_images(folder: Path) -> dict[str, dict[str, float]]:
    """Return the scores of each image that a run tested, by its id.

    Names are as in `read_results`.

    Raises:
        UserError: the run has no `test_images.csv`, or it is damaged.
    """
    path = folder / "test_images.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            plain = f"{NATIVE}dice" not in _columns(table)
            images = {
                from_cell(row["id"]): {k: float(v) for k, v in row.items() if k not in _NOT_SCORES}
                for row in table
            }
    except _DAMAGE as error:
        raise UserError(_unreadable(path, folder, error)) from error
    if plain and (read_results(folder) or {}).get("resolution") == "native":
        return {
            image: {NATIVE + name: value for name, value in scores.items()}
            for image, scores in images.items()
        }
    return images


def _columns(table: csv.DictReader) -> list[str]:
    columns = list(table.fieldnames or ())
    if "id" not in columns:
        raise KeyError("id")
    return columns


def _unreadable(path: Path, folder: Path, error: Exception) -> str:
    return (
        f"{path} cannot be read ({type(error).__name__}); test the run again with "
        f"`python run.py task=test checkpoint={folder}/checkpoints/best.ckpt`."
    )


def mean_images(
    runs: Sequence[Mapping[str, Mapping[str, float]]], pooled: bool = False
) -> dict[str, dict[str, float]]:
    """Return the scores of each image that all runs have, each the mean over the runs.

    Args:
        runs: scores by image, as `read_images` returns; at least one.
        pooled: also take images that only some runs have, each with the mean over those: the runs
            are folds of a cross-validation.
    """
    # An interval depends on the order of the images, and must not on that of the folds.
    ids = sorted({image for run in runs for image in run}) if pooled else runs[0]
    having = {image: [run[image] for run in runs if image in run] for image in ids}
    return {
        image: {
            name: float(np.mean([scores[name] for scores in found]))
            for name in found[0]
            if all(name in scores for scores in found)
        }
        for image, found in having.items()
        if pooled or len(found) == len(runs)
    }


def pooled_scores(
    repeats: Sequence[Sequence[Path]],
) -> tuple[int, dict[str, tuple[float, list[float]]]]:
    """Return the scores over the test images of all folds of a cross-validation.

    Those of masks are means over images. Those of diagnoses are computed from all predictions
    together, as a single test would.

    Args:
        repeats: the run folders of the folds for each seed. A score is the mean over the seeds, on
            the images that all of them have tested.

    Returns:
        The number of images, and the value and the 95 % bootstrap interval of each score. There are
        none where a run has no test.
    """
    runs = [run for folds in repeats for run in folds]
    if all((run / "predictions.csv").is_file() for run in runs):
        return _pooled_diagnoses(repeats)
    if not all((run / "test_images.csv").is_file() for run in runs):
        return 0, {}
    pools = [mean_images([read_images(run) for run in folds], pooled=True) for folds in repeats]
    images = list(mean_images(pools).values())
    shared = [name for name in images[0] if all(name in row for row in images)] if images else []
    columns = {name: np.array([row[name] for row in images]) for name in shared}
    scores = {name: (float(v.mean()), bootstrap_interval(v)) for name, v in columns.items()}
    return len(images), scores


def _pooled_diagnoses(
    repeats: Sequence[Sequence[Path]],
) -> tuple[int, dict[str, tuple[float, list[float]]]]:
    pools = [join_predictions([read_predictions(run) for run in folds]) for folds in repeats]
    shared = set(pools[0].ids).intersection(*(pool.ids for pool in pools))
    ids = [image for image in pools[0].ids if image in shared]
    config = load_config(repeats[0][0])
    if not isinstance(config.get("metrics"), dict):
        raise UserError(f"{repeats[0][0] / 'config.yaml'} has no metrics; test the run again.")
    both = [pool.of(ids) for pool in pools]
    values = [_scores(pool, config["metrics"]) for pool in both]
    drawn = [resampled_scores(pool, config["metrics"]) for pool in both]
    scores = {
        name: (
            float(np.mean([one[name] for one in values])),
            percentile_interval(np.mean([one[name] for one in drawn], axis=0)),
        )
        for name in values[0]
    }
    return len(ids), {name: score for name, score in scores.items() if np.isfinite(score[0])}


def join_predictions(runs: Sequence[Predictions]) -> Predictions:
    """Return the predictions of several runs for other photographs each as those of one run.

    Raises:
        UserError: the runs have other classes.
    """
    for run in runs:
        _require_same_classes(runs[0], run)
    return Predictions(
        [image for run in runs for image in run.ids],
        np.concatenate([run.labels for run in runs]),
        np.concatenate([run.probability for run in runs]),
        runs[0].classes,
    )


def _require_same_classes(first: Predictions, second: Predictions) -> None:
    if first.classes != second.classes:
        raise UserError(
            f"The runs tell other classes apart, {', '.join(first.classes)} and "
            f"{', '.join(second.classes)}; compare runs on the same data."
        )


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """Return each score of a test as one number an image, in the order of the images' ids."""
    rows = list(read_images(folder).values()) if (folder / "test_images.csv").is_file() else []
    return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """Return the 95 % percentile interval of a mean over images, drawn from them 2000 times."""
    return percentile_interval(_resampled_means(values, seed))


def percentile_interval(resampled: np.ndarray) -> list[float]:
    """Return what 95 % of resampled values lie between; values that are nan are left out."""
    if np.isnan(resampled).all():
        return [float("nan"), float("nan")]
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    at_once = max(1, BLOCK // len(values))
    means = [
        values[rng.integers(len(values), size=(min(at_once, RESAMPLES - first), len(values)))].mean(
            1
        )
        for first in range(0, RESAMPLES, at_once)
    ]
    return np.concatenate(means)


def compare_scores(
    first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Compare two runs image by image.

    Args:
        first, second: scores by image, as `read_images` returns; images that only one has are left
            out.

    Returns:
        For each score that both have: `first` and `second` (means), `difference` (second minus
        first), `interval` (95 %, bootstrap over images), `p` (Wilcoxon's signed-rank test, two
        sides, 1 where no image differs), `images`.

    Raises:
        UserError: they share no image.
    """
    ids = _shared(first, second)
    shared = [name for name in first[ids[0]] if name in second[ids[0]]]
    result = {}
    for name in shared:
        one, other = (np.array([run[i][name] for i in ids]) for run in (first, second))
        change = other - one
        result[name] = {
            "first": float(one.mean()),
            "second": float(other.mean()),
            "difference": float(change.mean()),
            "interval": bootstrap_interval(change),
            "p": float(stats.wilcoxon(change).pvalue) if change.any() else 1.0,
            "images": len(ids),
        }
    return result


def compare_predictions(
    first: Predictions, second: Predictions, settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Compare the diagnoses of two runs on the photographs that both have.

    Args:
        first, second: as `read_predictions` returns.
        settings: arguments of `ClassificationScores`.

    Returns:
        As `compare_scores`, with `p` of a bootstrap test: twice the share of draws in which the
        difference has the rarer sign.

    Raises:
        UserError: they share no photograph, or tell other classes apart.
    """
    _require_same_classes(first, second)
    ids = _shared(first.ids, second.ids)
    both = [run.of(ids) for run in (first, second)]
    values = [_scores(run, settings) for run in both]
    drawn = [resampled_scores(run, settings) for run in both]
    result = {}
    for name in values[0]:
        one, other = (float(scores[name]) for scores in values)
        if np.isnan(one) or np.isnan(other):
            continue
        changes = drawn[1][name] - drawn[0][name]
        changes = changes[~np.isnan(changes)]
        rarer = min((changes <= 0).sum(), (changes >= 0).sum())
        result[name] = {
            "first": one,
            "second": other,
            "difference": other - one,
            "interval": percentile_interval(changes),
            "p": float(min(1.0, 2 * (rarer + 1) / (len(changes) + 1))),
            "images": len(ids),
        }
    return result


def _shared(first: Iterable[str], second: Iterable[str]) -> list[str]:
    ids = sorted(set(first) & set(second))
    if not ids:
        raise UserError(
            "The runs have no test image in common; compare runs on the same data and split."
        )
    return ids
