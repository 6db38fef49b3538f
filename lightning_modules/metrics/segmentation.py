"""Everything that a test says of predicted masks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError, check_choice
from common.geometry import restore
from lightning_modules.metrics.batch_pooled import BatchPooledScores
from lightning_modules.metrics.boundary import BOUNDARY_SCORES, boundary_scores
from lightning_modules.metrics.means import LossMeans
from lightning_modules.metrics.overlap import OverlapMetrics, dice_score, iou_score, overlap_counts
from lightning_modules.metrics.uncertainty import (
    CalibrationError,
    DoubtScores,
    doubt,
    expected_dice,
    uncertainty_correlation,
)

__all__ = ["SegmentationScores"]

RESOLUTIONS = ("model", "native")
PIXEL_MEANS = (*BOUNDARY_SCORES, "uncertainty_correlation")


class SegmentationScores(nn.Module):
    """Overlap, outlines, calibration and doubt of predicted masks, merged over processes.

    Args:
        resolution: `model` compares at the network's size, `native` at that of the original masks,
            to which the probability is resized before it is thresholded.
        tolerance: of the boundary F1, in px of that resolution.
        bins: of the calibration error.
        referral: share of images that are referred to a doctor.
        letterbox: whether the network's square keeps the images' proportions.
        batch_pooled: also `BatchPooledScores`, at the network's size whatever the resolution.

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
        for key, value, fine in (
            ("tolerance", tolerance, tolerance >= 0),
            ("bins", bins, bins >= 1),
            ("referral", referral, 0 <= referral < 1),
        ):
            if not fine:
                raise UserError(f"metrics.{key}={value} is outside its range.")
        self.native = resolution == "native"
        self.tolerance = tolerance
        self.letterbox = letterbox
        self.overlap = OverlapMetrics()
        self.means = LossMeans(PIXEL_MEANS)
        self.calibration = CalibrationError(bins)
        self.doubts = DoubtScores(referral)
        self.batch_pooled = BatchPooledScores() if batch_pooled else None

    def update(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Add a batch; return what is said of each image by name, `(B,)` each.

        Args:
            prediction: of `predict`.
            batch: with `mask`, or at native resolution `native_mask`, a list of uint8 `(H, W)`;
                for `batch_pooled` always with `mask`.
        """
        probability, uncertainty = prediction["probability"].float(), doubt(prediction)
        if self.batch_pooled is not None:
            self.batch_pooled.update(probability, batch["mask"])
        if not self.native:
            return self._add(probability, uncertainty, batch["mask"])
        rows = []
        for index, truth in enumerate(batch["native_mask"]):
            mask = torch.as_tensor(truth).to(probability.device)[None, None]
            maps = (values[index] for values in (probability, uncertainty))
            whole = (restore(values, mask.shape[-2:], self.letterbox)[None] for values in maps)
            rows.append(self._add(*whole, mask))
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _add(self, probability: Tensor, uncertainty: Tensor, mask: Tensor) -> dict[str, Tensor]:
        predicted = probability > 0.5
        counts = overlap_counts(predicted, mask)
        tp, fp, fn, _ = counts.unbind(1)
        wrong = predicted != (mask > 0.5)
        outlines = boundary_scores(predicted, mask, self.tolerance)
        scores = {
            "dice": dice_score(counts),
            "iou": iou_score(counts),
            **{name: values.to(counts.device) for name, values in outlines.items()},
            "uncertainty_correlation": uncertainty_correlation(uncertainty, wrong),
            "expected_dice": expected_dice(probability),
            "lesion_pixels": tp + fn,
            "predicted_pixels": tp + fp,
        }
        self.overlap.update(counts)
        self.means.update({name: scores[name].mean() for name in PIXEL_MEANS}, len(mask))
        self.calibration.update(probability, mask)
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
        metrics = [self.overlap, self.means, self.calibration, self.doubts]
        if self.batch_pooled is not None:
            scores |= self.batch_pooled.compute()
            metrics.append(self.batch_pooled)
        for metric in metrics:
            metric.reset()
        return scores
