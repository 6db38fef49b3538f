"""All scores of predicted masks, at the network's size and at that of the original masks."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import check_choice, check_number
from common.geometry import restore
from common.runs import NATIVE
from lightning_modules.metrics.batch_pooled import BatchPooledScores
from lightning_modules.metrics.boundary import BOUNDARY_SCORES, boundary_scores
from lightning_modules.metrics.means import LossMeans
from lightning_modules.metrics.overlap import (
    OverlapMetrics,
    dice_score,
    finite_images,
    iou_score,
    lesion_masks,
    overlap_counts,
    threshold_jaccard,
)
from lightning_modules.metrics.uncertainty import (
    CalibrationError,
    DoubtScores,
    doubt,
    expected_dice,
    uncertainty_correlation,
)

__all__ = ["SegmentationScores"]

RESOLUTIONS = ("both", "model", "native")
PIXEL_MEANS = (*BOUNDARY_SCORES, "uncertainty_correlation")
# The worst value of each score that is not computed from overlap counts, except distances.
WORST = {
    "boundary_f1": 0.0,
    "hd95_relative": 1.0,
    "assd_relative": 1.0,
    "uncertainty_correlation": -1.0,
    # As if the network were certain, so that the image is not referred.
    "expected_dice": 1.0,
}


class SegmentationScores(nn.Module):
    """Overlap, outlines, calibration and doubt of predicted masks, merged over processes.

    Scores at the network's size have plain names such as `dice`. Scores at the size of the original
    masks, to which the probability is resized before it is thresholded, have names that begin with
    `native_`, such as `native_dice`, and come first.

    A prediction that is not finite has the worst value of every score, at both sizes: overlap 0,
    distances of the diagonal, and calibration error 1 in each pixel. It counts as certain, so that
    it is not referred. An uncertainty that is not finite has the worst correlation, -1.

    Args:
        resolution: `model`, `native` or `both`: at which sizes predictions are scored.
        tolerance: of the boundary F1, in px of either resolution.
        bins: of the calibration error.
        referral: share of images that are referred to a doctor, rounded down to whole images.
        letterbox: whether the network's square keeps the images' proportions.
        batch_pooled: also `BatchPooledScores`, at the network's size whatever the resolution.

    Attributes:
        resolution: as given; a test may change it before its first batch.

    Raises:
        UserError: an argument is outside its range.
    """

    def __init__(
        self,
        resolution: str = "model",
        tolerance: float = 2.0,
        bins: int = 15,
        referral: float = 0.1,
        letterbox: bool = False,
        batch_pooled: bool = False,
    ) -> None:
        super().__init__()
        check_choice("metrics.resolution", resolution, RESOLUTIONS)
        check_number("metrics.tolerance", tolerance, 0)
        check_number("metrics.bins", bins, 1, whole=True)
        check_number("metrics.referral", referral, 0, below=1)
        self.resolution = resolution
        self.letterbox = letterbox
        self.native, self.model = (_Scores(tolerance, bins, referral) for _ in range(2))
        self.batch_pooled = BatchPooledScores() if batch_pooled else None

    def update(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Add a batch; return the scores of each image by name, `(B,)` each.

        `finite`, int64, is 1 where the prediction is finite throughout.

        Args:
            prediction: of `predict`.
            batch: with `mask` `(B, 1, S, S)` for scores at the network's size and `batch_pooled`,
                and `native_mask`, a list of uint8 `(H, W)`, for those at the original size.
        """
        probability, uncertainty = prediction["probability"].float(), doubt(prediction)
        finite = finite_images(probability)
        if self.batch_pooled is not None:
            self.batch_pooled.update(probability, batch["mask"])
        scores = {}
        if self.resolution != "model":
            rows = []
            for index, truth in enumerate(batch["native_mask"]):
                mask = torch.as_tensor(truth).to(probability.device)[None, None]
                maps = (values[index] for values in (probability, uncertainty))
                whole = (restore(values, mask.shape[-2:], self.letterbox)[None] for values in maps)
                rows.append(self.native.add(*whole, mask, finite[index, None]))
            scores = {NATIVE + name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if self.resolution != "native":
            scores |= self.model.add(probability, uncertainty, batch["mask"], finite)
        return {**scores, "finite": finite.long()}

    def compute(self) -> dict[str, Tensor]:
        """Return every score over all images by name, and forget them."""
        scores = {}
        if self.resolution != "model":
            scores = {NATIVE + name: value for name, value in self.native.compute().items()}
        if self.resolution != "native":
            scores |= self.model.compute()
        if self.batch_pooled is not None:
            scores |= self.batch_pooled.compute()
            self.batch_pooled.reset()
        return scores


class _Scores(nn.Module):
    """The scores at one resolution."""

    def __init__(self, tolerance: float, bins: int, referral: float) -> None:
        super().__init__()
        self.tolerance = tolerance
        self.overlap = OverlapMetrics()
        self.means = LossMeans(PIXEL_MEANS)
        self.calibration = CalibrationError(bins)
        self.doubts = DoubtScores(referral)

    def add(
        self, probability: Tensor, uncertainty: Tensor, mask: Tensor, finite: Tensor
    ) -> dict[str, Tensor]:
        """Add images of one size; return the scores of each by name, `(B,)` each.

        Args:
            probability, uncertainty, mask: `(B, 1, H, W)`.
            finite: which predictions are finite, bool `(B,)`.
        """
        predicted = lesion_masks(probability, mask, finite)
        counts = overlap_counts(predicted, mask)
        tp, fp, fn, _ = counts.unbind(1)
        wrong = predicted != (mask > 0.5)
        outlines = boundary_scores(predicted, mask, self.tolerance)
        scores = {
            "dice": dice_score(counts),
            "iou": iou_score(counts),
            "threshold_jaccard": threshold_jaccard(counts),
            **{name: values.to(counts.device) for name, values in outlines.items()},
            "uncertainty_correlation": uncertainty_correlation(uncertainty, wrong),
            "expected_dice": expected_dice(probability),
            "lesion_pixels": tp + fn,
            "predicted_pixels": (tp + fp) * finite,
        }
        diagonal = math.hypot(*mask.shape[-2:])
        for name, worst in {**WORST, "hd95": diagonal, "assd": diagonal}.items():
            scores[name] = torch.where(finite, scores[name], worst)
        known, name = finite_images(uncertainty), "uncertainty_correlation"
        scores[name] = torch.where(known, scores[name], WORST[name])
        self.overlap.update(counts)
        self.means.update({name: scores[name].mean() for name in PIXEL_MEANS}, len(mask))
        self.calibration.update(
            probability.masked_fill(~finite[:, None, None, None], torch.nan), mask
        )
        self.doubts.update(1 - scores["expected_dice"], scores["dice"])
        return scores

    def compute(self) -> dict[str, Tensor]:
        """Return every score over all images by name, and forget them."""
        scores = {
            **self.overlap.compute(),
            **self.means.compute(),
            "calibration_error": self.calibration.compute(),
            **self.doubts.compute(),
        }
        for metric in (self.overlap, self.means, self.calibration, self.doubts):
            metric.reset()
        return scores
