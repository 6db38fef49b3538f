"""How sure a prediction is of itself, and whether that tells where it is wrong."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lightning_modules.metrics.exact import ExactMetric

__all__ = [
    "CalibrationError",
    "DoubtScores",
    "doubt",
    "expected_dice",
    "uncertainty_correlation",
]

# Pixels whose float64 copies fit into a processor's cache.
AT_ONCE = 1 << 17


def doubt(prediction: Mapping[str, Tensor]) -> Tensor:
    """Return the doubt of each pixel, shaped like `probability`, from 0 to 0.5.

    It is the standard deviation over the samples of an ensemble, where `predict` returns one as
    `uncertainty`; otherwise `sqrt(p (1 - p))`, that of a coin with the predicted probability, to
    which the former comes where every sample is certain.
    """
    if "uncertainty" in prediction:
        return prediction["uncertainty"].float()
    probability = prediction["probability"].float().clamp(0, 1)
    return (probability * (1 - probability)).sqrt()


def expected_dice(probability: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the Dice that each predicted mask would have if the probabilities were right.

    `2 sum(p m) / (sum(p) + sum(m))` with the mask `m = p > threshold`, float64 `(B,)`; 1 where
    there is nothing at all. It is low where much of a lesion is unsure, whatever its size.

    Args:
        probability: `(B, 1, H, W)` in [0, 1].
        threshold: of the mask.
    """
    chance = probability.flatten(1)
    mask = chance > threshold
    total = chance.sum(1, dtype=torch.float64) + mask.sum(1)
    inside = (chance * mask).sum(1, dtype=torch.float64)
    return torch.where(total > 0, 2 * inside / total.clamp(min=1e-12), 1.0)


def uncertainty_correlation(uncertainty: Tensor, wrong: Tensor) -> Tensor:
    """Return Pearson's correlation of doubt with error over the pixels of each image.

    Float64 `(B,)`; 0 where an image has no error or the same doubt everywhere.

    Args:
        uncertainty: `(B, 1, H, W)`.
        wrong: bool `(B, 1, H, W)`, true where the mask is wrong.
    """
    values, wrong = uncertainty.double().flatten(1), wrong.flatten(1)
    centred = values - values.mean(1, keepdim=True)
    covariance = (centred * wrong).sum(1)
    pixels, errors = wrong.shape[1], wrong.sum(1)
    # Errors are 0 or 1, and their squared deviations need no further pass over the pixels.
    size = (centred.square().sum(1) * (errors * (pixels - errors) / pixels)).sqrt()
    return torch.where(size > 0, covariance / size.clamp(min=1e-300), 0.0)


class CalibrationError(ExactMetric):
    """Expected calibration error of lesion probabilities over all pixels.

    Pixels are put into bins of equal width by their probability; the error is the mean over pixels
    of the difference between a bin's mean probability and its share of lesion. A pixel whose
    probability is not finite counts with the largest error, 1.
    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", 2015.

    Args:
        bins: their number.
    """

    full_state_update = False

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.bins = bins
        for name in ("pixels", "chances", "lesions"):
            zeros = torch.zeros(bins, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self.add_state("undefined", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probability: Tensor, mask: Tensor) -> None:
        """Add pixels by their probability in [0, 1] and true mask, of equal shapes."""
        finite = probability.isfinite()
        if not finite.all():
            self.undefined += (~finite).sum()
            probability, mask = probability[finite], mask[finite]
        parts = (values.flatten().split(AT_ONCE) for values in (probability, mask > 0.5))
        for chance, lesion in zip(*parts, strict=True):
            chance = chance.double()
            rows = (chance * self.bins).long().clamp(0, self.bins - 1)
            skin, lesions = torch.bincount(rows + self.bins * lesion, minlength=2 * self.bins).view(
                2, self.bins
            )
            self.pixels += skin + lesions
            self.chances += torch.bincount(rows, chance, self.bins)
            self.lesions += lesions

    def compute(self) -> Tensor:
        total = (self.pixels.sum() + self.undefined).clamp(min=1)
        return (((self.chances - self.lesions).abs().sum() + self.undefined) / total).float()


class DoubtScores(ExactMetric):
    """Whether the images of which a model is least sure are those that it gets wrong.

    `compute` returns `doubt_correlation`, Spearman's of the doubt with `1 - Dice`, and
    `referral_dice`, the mean Dice when the images of most doubt are referred to a doctor and left
    out. An image's doubt is `1 - expected_dice`.

    Args:
        referral: share of images that are referred, from 0 up to but not including 1; the number of
            images is rounded down, and at least one is kept.
    """

    full_state_update = False

    def __init__(self, referral: float = 0.1) -> None:
        super().__init__()
        self.referral = referral
        self.add_state("doubts", [], dist_reduce_fx="cat")
        self.add_state("dices", [], dist_reduce_fx="cat")

    def update(self, doubts: Tensor, dices: Tensor) -> None:
        """Add images by their doubt and their Dice, both `(B,)`."""
        self.doubts.append(doubts.double())
        self.dices.append(dices.double())

    def compute(self) -> dict[str, Tensor]:
        doubts, dices = (_joined(values) for values in (self.doubts, self.dices))
        if not len(doubts):
            return dict.fromkeys(("doubt_correlation", "referral_dice"), torch.tensor(0.0))
        # Sorted by both, so that the order in which processes come does not matter.
        by_dice = dices.argsort(stable=True)
        order = by_dice[doubts[by_dice].argsort(stable=True)]
        # The nearest float to 0.29 times 100 is a little less than 29.
        referred = math.floor(self.referral * len(order) + 1e-9)
        kept = order[: max(1, len(order) - referred)]
        varied = len(doubts) > 1 and doubts.std() > 0 and dices.std() > 0
        correlation = spearman_corrcoef(doubts, 1 - dices) if varied else torch.tensor(0.0)
        return {
            "doubt_correlation": correlation.float(),
            "referral_dice": dices[kept].mean().float(),
        }


def _joined(values: list[Tensor] | Tensor) -> Tensor:
    # Processes have merged them already where there are several.
    if isinstance(values, Tensor):
        return values
    return torch.cat(values) if values else torch.zeros(0)
