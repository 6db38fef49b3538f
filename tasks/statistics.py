"""What the images of a test say of its scores: intervals and differences."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from common.errors import UserError

__all__ = ["bootstrap_interval", "compare_scores", "read_images", "read_scores"]

LEVEL = 0.95
RESAMPLES = 2000
# Bootstrap means are drawn in blocks of about that many numbers, which bounds the memory.
BLOCK = 1 << 22
# Columns of test_images.csv that are no scores.
_NOT_SCORES = {"id", "lesion_pixels", "predicted_pixels"}


def read_images(folder: Path) -> dict[str, dict[str, float]]:
    """Return the scores of each image that a run tested, by its id.

    Raises:
        UserError: the run has no `test_images.csv`, or it is damaged.
    """
    path = folder / "test_images.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {
                row["id"]: {k: float(v) for k, v in row.items() if k not in _NOT_SCORES}
                for row in csv.DictReader(file)
            }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}); test the run again with "
            f"`python run.py task=test checkpoint={folder}/checkpoints/best.ckpt`."
        ) from error


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """Return each score of a test as one number an image, in the order of the images' ids."""
    rows = list(read_images(folder).values()) if (folder / "test_images.csv").is_file() else []
    return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """Return the 95 % percentile interval of a mean over images, drawn from them 2000 times."""
    low, high = np.quantile(_resampled_means(values, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
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
    ids = sorted(first.keys() & second.keys())
    if not ids:
        raise UserError(
            "The runs have no test image in common; compare runs on the same data and split."
        )
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
