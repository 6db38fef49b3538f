"""How well class probabilities tell the diagnoses, over all images and for resampled ones."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from common.errors import UserError, check_number
from lightning_modules.metrics.exact import ExactMetric
from lightning_modules.metrics.overlap import finite_images

__all__ = [
    "ClassificationScores",
    "Reliability",
    "RocCurve",
    "classification_scores",
    "confusion_matrix",
    "positive_class",
    "reliability",
    "roc_curves",
]

# Replicates are scored in blocks of about that many counts, which bounds the memory.
BLOCK = 1 << 20
# Melanoma, the class that must not be missed. A list of classes may lack it, or have it under
# another name.
MELANOMA = "MEL"
MELANOMA_NAMES = (MELANOMA, "melanoma", "malignant")


def classification_scores(
    probability: ArrayLike,
    label: ArrayLike,
    weights: ArrayLike | None = None,
    bins: int = 15,
    classes: Sequence[str] | None = None,
    positive: str | None = None,
    specificity: float = 0.9,
) -> dict[str, np.ndarray]:
    """Score class probabilities, of all images once or of bootstrap replicates of them.

    The predicted class is that of the highest probability, the first of equals.

    - `accuracy`, `top2_accuracy`: share of images whose class is predicted, or among the two most
      probable;
    - `balanced_accuracy`: mean recall of the classes;
    - `precision`, `recall`, `f1`: of each class as `precision/<class>`, and their means; a class
      that is never predicted has precision 0;
    - `auc`: area under the ROC curve of each class against the others, as `auc/<class>`, and their
      mean; ties count half (Mann-Whitney);
    - `average_precision`: area under the stepwise precision-recall curve of each class against the
      others, as `average_precision/<class>`, and their mean;
    - `calibration_error`: mean over images of the absolute difference between the mean highest
      probability and the accuracy of its bin (Guo et al., "On Calibration of Modern Neural
      Networks", 2017);
    - `<positive>_sensitivity`, its name in lower case: the highest sensitivity for that class of
      all thresholds whose specificity is at least `specificity`.

    A class without images has nan for its scores and is left out of the means, whoever predicts
    it; so is the AUC of a class without images of others.

    An image with a probability that is not finite is wrong in every score: no class is predicted,
    its calibration error is 1, and in each ranking it lies below all others where it has the class
    and above all others where it does not.

    Args:
        probability: `(N, C)` in [0, 1], on the CPU.
        label: class indices `(N,)`.
        weights: `(R, N)`, how often each image was drawn in each of R replicates; by default there
            is one replicate in which each was drawn once.
        bins: number of bins of equal width, of the calibration error.
        classes: names of the C classes; by default `0`, `1`, ...
        positive: the class, in upper or lower case, of the sensitivity; none by default.
        specificity: that it is to have, in [0, 1].

    Returns:
        Each score by name in [0, 1] or nan, float64: scalars, or `(R,)` where there are weights.

    Raises:
        ValueError: shapes do not match, there are no images, a label or `positive` is no class.
    """
    chance, truth, finite = _checked(probability, label)
    count, num_classes = chance.shape
    classes = [str(index) for index in range(num_classes)] if classes is None else list(classes)
    if len(classes) != num_classes:
        raise ValueError(f"{num_classes} probabilities an image do not match {len(classes)} names")
    chosen = None if positive is None else _index(positive, classes)
    if positive is not None and chosen is None:
        raise ValueError(f"positive={positive} is none of {', '.join(classes)}")
    drawn = np.ones((1, count)) if weights is None else np.asarray(weights)
    if drawn.ndim != 2 or drawn.shape[1] != count:
        raise ValueError(f"weights of shape {drawn.shape} do not match {count} images")
    at_once = max(1, BLOCK // count)
    parts = [
        _score(
            # Images first: sums over them then run along whole rows of replicates.
            *(chance, truth, finite),
            np.ascontiguousarray(drawn[first : first + at_once].T, dtype=float),
            *(bins, classes, chosen, specificity),
        )
        for first in range(0, max(1, len(drawn)), at_once)
    ]
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: value[0] for name, value in scores.items()} if weights is None else scores


def confusion_matrix(predicted: ArrayLike, label: ArrayLike, num_classes: int) -> np.ndarray:
    """Count images by true class (rows) and predicted class (columns), int64 `(C, C)`.

    Args:
        predicted: class indices `(N,)`, or probabilities `(N, C)`, of which the highest counts.
            Images whose index is negative or whose probabilities are not finite are left out.
        label: class indices `(N,)`.
        num_classes: C.
    """
    predicted, label = np.asarray(predicted), np.asarray(label)
    if predicted.ndim == 2:
        predicted = np.where(np.isfinite(predicted).all(1), predicted.argmax(1), -1)
    cells = (label * num_classes + predicted)[predicted >= 0]
    counts = np.bincount(cells.astype(np.int64), minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


class RocCurve(NamedTuple):
    """Rates of false and true positives `(T,)` over all thresholds, and the area below."""

    fpr: np.ndarray
    tpr: np.ndarray
    auc: float


def roc_curves(probability: ArrayLike, label: ArrayLike) -> dict[int | str, RocCurve]:
    """Return the ROC curve of each class against the others, and two of all classes together.

    Args:
        probability: `(N, C)` in [0, 1], on the CPU.
        label: class indices `(N,)`. Images without finite probabilities count as in
            `classification_scores`.

    Returns:
        A curve for each class index, without those that have no images or all of them; `macro`, the
        mean of their true positive rates, interpolated linearly, unless there are none; and
        `micro`, that of all pairs of an image and a class.
    """
    # This import costs a second, which few runs need pay.
    from sklearn.metrics import auc, roc_curve

    def draw(truth: np.ndarray, score: np.ndarray) -> RocCurve:
        fpr, tpr, _ = roc_curve(truth, score)
        return RocCurve(fpr, tpr, float(auc(fpr, tpr)))

    chance, truth, _ = _checked(probability, label)
    hot = np.eye(chance.shape[1], dtype=bool)[truth]
    curves: dict[int | str, RocCurve] = {
        index: draw(hot[:, index], chance[:, index])
        for index in range(chance.shape[1])
        if 0 < hot[:, index].sum() < len(hot)
    }
    if curves:
        fpr = np.unique(np.concatenate([curve.fpr for curve in curves.values()]))
        tpr = np.mean([np.interp(fpr, curve.fpr, curve.tpr) for curve in curves.values()], axis=0)
        curves["macro"] = RocCurve(fpr, tpr, float(auc(fpr, tpr)))
    curves["micro"] = draw(hot.ravel(), chance.ravel())
    return curves


class Reliability(NamedTuple):
    """Mean highest probability, accuracy and number of images of each bin, `(bins,)` each.

    The first two are nan in a bin without images. `undefined` is the number of images without
    finite probabilities, which are in no bin and have the largest error, 1.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    undefined: int = 0

    @property
    def error(self) -> float:
        """The expected calibration error."""
        errors = np.nansum(self.count * abs(self.confidence - self.accuracy)) + self.undefined
        return float(errors / (self.count.sum() + self.undefined))


def reliability(probability: ArrayLike, label: ArrayLike, bins: int = 15) -> Reliability:
    """Compare how sure predictions are with how often they are right.

    Images are put into bins of equal width by their highest probability.

    Args:
        probability: `(N, C)` in [0, 1], on the CPU.
        label: class indices `(N,)`.
        bins: their number.
    """
    chance, truth, finite = _checked(probability, label)
    chance, truth = chance[finite], truth[finite]
    highest, correct = chance.max(1), chance.argmax(1) == truth
    rows = _bins(highest, bins)
    count = np.bincount(rows, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (
            np.bincount(rows, values, bins) / count for values in (highest, correct)
        )
    return Reliability(confidence, accuracy, count, int((~finite).sum()))


class ClassificationScores(nn.Module):
    """All `classification_scores` of the images of an epoch, merged exactly over processes.

    Args:
        classes: their names, in the order of the labels.
        bins: of the calibration error.
        positive: the class, in upper or lower case, whose sensitivity at `specificity` is scored;
            null scores none. MEL is also melanoma, else malignant, and none without such a class.
        specificity: that this sensitivity is to have.

    Raises:
        UserError: an argument is outside its range, or `positive` is no class.
    """

    def __init__(
        self,
        classes: Sequence[str],
        bins: int = 15,
        positive: str | None = MELANOMA,
        specificity: float = 0.9,
    ) -> None:
        super().__init__()
        check_number("metrics.bins", bins, 1, whole=True)
        check_number("metrics.specificity", specificity, 0, below=1, exclusive=True)
        self.classes = tuple(classes)
        found = positive_class(positive, self.classes)
        optional = positive is None or str(positive).casefold() == MELANOMA.casefold()
        if found is None and not optional:
            raise UserError(
                f"metrics.positive={positive} is no class of the data; choose one of "
                f"{', '.join(self.classes)}, or null."
            )
        self.positive = positive = found
        settings = {"bins": bins, "positive": positive, "specificity": specificity}
        self.pooled = _PooledScores(self.classes, settings)

    def update(self, probability: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Add images; return what is said of each by name, `(B,)` each.

        Args:
            probability: `(B, C)` in [0, 1].
            label: class indices `(B,)`.

        Returns:
            `correct`, int64, 1 where the most probable class is the true one; `confidence`,
            float32, its probability. Both are 0 where a probability is not finite.
        """
        chance = probability.detach().float()
        self.pooled.update(chance, label)
        finite = finite_images(chance)
        confidence, predicted = chance.max(1)
        return {
            "correct": ((predicted == label) & finite).long(),
            "confidence": torch.where(finite, confidence, 0.0),
        }

    def compute(self) -> dict[str, Tensor]:
        """Return every score over all images that is a number, by name, and forget the images.

        They are float32 scalars on the CPU; there are none where there are no images.
        """
        scores = self.pooled.compute()
        self.pooled.reset()
        return scores


class _PooledScores(ExactMetric):
    """Collects probabilities and labels, and scores them all together."""

    full_state_update = False

    def __init__(self, classes: Sequence[str], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.classes = list(classes)
        self.settings = dict(settings)
        # One flat state: only such ones are merged with those of a process without images.
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, probability: Tensor, label: Tensor) -> None:
        # Float32 holds class indices exactly.
        self.values.append(torch.cat((probability, label[:, None].float()), dim=1).flatten())

    def compute(self) -> dict[str, Tensor]:
        # Processes have merged them already where there are several.
        whole = isinstance(self.values, Tensor)
        parts = [self.values] if whole else self.values
        values = torch.cat([torch.zeros(0), *(part.cpu() for part in parts)])
        rows = values.view(-1, len(self.classes) + 1).numpy()
        if not len(rows):
            return {}
        # Sorted, so that not even the last bit depends on the order in which images come.
        rows = rows[np.lexsort(rows.T)]
        scores = classification_scores(
            rows[:, :-1], rows[:, -1], classes=self.classes, **self.settings
        )
        return {
            name: torch.tensor(value, dtype=torch.float32)
            for name, value in scores.items()
            if np.isfinite(value)
        }


def _checked(probability: ArrayLike, label: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return probabilities, classes, and which images have finite probabilities.

    The others get the worst ones: -1 for the true class and 2 for all others.
    """
    chance = np.asarray(probability, dtype=np.float64)
    truth = np.asarray(label)
    if chance.ndim != 2 or truth.shape != chance.shape[:1]:
        raise ValueError(f"probabilities {chance.shape} do not match labels {truth.shape}")
    if not len(truth):
        raise ValueError("there are no images")
    if truth.min() < 0 or truth.max() >= chance.shape[1]:
        raise ValueError(f"labels must be from 0 to {chance.shape[1] - 1}")
    truth = truth.astype(np.int64)
    finite = np.isfinite(chance).all(1)
    worst = np.where(np.eye(chance.shape[1], dtype=bool)[truth], -1.0, 2.0)
    return np.where(finite[:, None], chance, worst), truth, finite


def positive_class(positive: str | None, classes: Sequence[str]) -> str | None:
    """Return the class that `positive` means, as it is written in `classes`; None without one."""
    if positive is None:
        return None
    is_melanoma = str(positive).casefold() == MELANOMA.casefold()
    names = MELANOMA_NAMES if is_melanoma else (str(positive),)
    found = (_index(name, classes) for name in names)
    return next((classes[index] for index in found if index is not None), None)


def _index(name: str, classes: Sequence[str]) -> int | None:
    folded = [other.casefold() for other in classes]
    return folded.index(name.casefold()) if name.casefold() in folded else None


def _bins(chance: np.ndarray, bins: int) -> np.ndarray:
    return (chance * bins).astype(np.int64).clip(0, bins - 1)


def _score(
    chance: np.ndarray,
    truth: np.ndarray,
    finite: np.ndarray,
    drawn: np.ndarray,
    bins: int,
    classes: Sequence[str],
    chosen: int | None,
    specificity: float,
) -> dict[str, np.ndarray]:
    """Score replicates by how often each image was drawn, `(N, R)`; `(R,)` for each score."""
    every = np.arange(len(truth))
    hot = np.eye(len(classes))[truth]
    guess = np.eye(len(classes))[chance.argmax(1)] * finite[:, None]
    correct = (hot * guess).sum(1)
    own = chance[every, truth][:, None]
    before = (chance > own) | ((chance == own) & (np.arange(len(classes)) < truth[:, None]))
    gap = np.zeros((len(truth), bins))
    gap[every, _bins(chance.max(1), bins)] = (chance.max(1) - correct) * finite

    with np.errstate(divide="ignore", invalid="ignore"):
        total = drawn.sum(0)
        right, actual, guessed = (values.T @ drawn for values in (hot * guess, hot, guess))
        absent = actual == 0
        # A present class that nobody predicts is right in none of its predictions.
        precision = np.where(absent, np.nan, right / np.maximum(guessed, 1))
        ranked = [
            _rank(chance[:, index], hot[:, index], drawn, specificity)
            for index in range(len(classes))
        ]
        by_class = {
            "precision": precision,
            "recall": right / actual,
            "f1": np.where(absent, np.nan, 2 * right / (actual + guessed)),
            "auc": np.stack([auc for auc, _, _ in ranked]),
            "average_precision": np.stack([area for _, area, _ in ranked]),
        }
        scores = {
            "accuracy": correct @ drawn / total,
            "top2_accuracy": ((before.sum(1) < 2) & finite) @ drawn / total,
            "balanced_accuracy": _mean(by_class["recall"]),
            **{name: _mean(values) for name, values in by_class.items()},
            "calibration_error": (abs(gap.T @ drawn).sum(0) + ~finite @ drawn) / total,
        }
    if chosen is not None:
        scores[f"{classes[chosen].lower()}_sensitivity"] = ranked[chosen][2]
    for name, values in by_class.items():
        scores |= {f"{name}/{key}": value for key, value in zip(classes, values, strict=True)}
    return scores


def _mean(values: np.ndarray) -> np.ndarray:
    """Average over classes `(C, R)`, without those that have no value."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(0) / known.sum(0)


def _rank(
    score: np.ndarray, positive: np.ndarray, drawn: np.ndarray, specificity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return AUC, average precision and sensitivity at a specificity of one class, `(R,)` each."""
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    # Images of the same score are above or below a threshold only together.
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
    counts = drawn[order]
    there = np.add.reduceat(counts, starts, axis=0)
    hits = np.add.reduceat(counts * positive[order, None], starts, axis=0)
    misses = there - hits
    tp, fp = hits.cumsum(0), misses.cumsum(0)
    positives, negatives = tp[-1], fp[-1]
    auc = (hits * (negatives - fp + misses / 2)).sum(0) / (positives * negatives)
    area = (hits * tp / np.maximum(tp + fp, 1)).sum(0) / positives
    # 1 - 0.9 is a little less than a tenth of ten images.
    allowed = fp <= (1 - specificity + 1e-9) * negatives
    found = np.where(allowed, tp, 0).max(0) / positives
    return auc, area, np.where(negatives > 0, found, np.nan)
