"""Overlap of a predicted mask with the true one, per image and pooled over all pixels."""

import torch
from torch import Tensor

from lightning_modules.metrics.exact import ExactMetric

__all__ = ["OverlapMetrics", "dice_score", "iou_score", "overlap_counts"]


def overlap_counts(prediction: Tensor, mask: Tensor) -> Tensor:
    """Count agreeing and differing pixels of each image.

    Args:
        prediction: `(B, 1, H, W)`, true where a lesion is predicted.
        mask: `(B, 1, H, W)`, lesion where above 0.5.

    Returns:
        int64 `(B, 4)`: true positive, false positive, false negative, true negative pixels.
    """
    predicted, lesion = prediction.bool().flatten(1), (mask > 0.5).flatten(1)
    counts = (predicted & lesion, predicted & ~lesion, ~predicted & lesion, ~predicted & ~lesion)
    return torch.stack([count.sum(1) for count in counts], dim=1)


def dice_score(counts: Tensor) -> Tensor:
    """Return `2 TP / (2 TP + FP + FN)` of counts `(..., 4)`, float64; 1 where both are empty."""
    tp, fp, fn, _ = counts.double().unbind(-1)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def iou_score(counts: Tensor) -> Tensor:
    """Return `TP / (TP + FP + FN)` of counts `(..., 4)`, float64; 1 where both are empty."""
    tp, fp, fn, _ = counts.double().unbind(-1)
    return _ratio(tp, tp + fp + fn)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; 1 where nothing was there to be got wrong."""
    empty = denominator == 0
    return torch.where(empty, 1.0, numerator / denominator.masked_fill(empty, 1))


class OverlapMetrics(ExactMetric):
    """Means over images and the papers' pooled scores, merged exactly over processes.

    `compute` returns `dice` and `iou`, the means over images, and `pooled_f1`, `pooled_iou`,
    `pooled_accuracy`, `pooled_precision`, `pooled_sensitivity`, `pooled_specificity` from the
    pixels of all images together (the pooled F1 is the pooled Dice). A score whose denominator is 0
    is 1: nothing was there to be got wrong. Scalars are float32 tensors in [0, 1].
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("dice_sum", zero.clone(), dist_reduce_fx="sum")
        self.add_state("iou_sum", zero.clone(), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add images by their `overlap_counts`, `(B, 4)`."""
        self.dice_sum += dice_score(counts).sum()
        self.iou_sum += iou_score(counts).sum()
        self.images += len(counts)
        self.counts += counts.sum(0)

    def compute(self) -> dict[str, Tensor]:
        tp, fp, fn, tn = self.counts.double().unbind()
        images = self.images.clamp(min=1)
        scores = {
            "dice": self.dice_sum / images,
            "iou": self.iou_sum / images,
            "pooled_f1": dice_score(self.counts),
            "pooled_iou": iou_score(self.counts),
            "pooled_accuracy": _ratio(tp + tn, tp + fp + fn + tn),
            "pooled_precision": _ratio(tp, tp + fp),
            "pooled_sensitivity": _ratio(tp, tp + fn),
            "pooled_specificity": _ratio(tn, tn + fp),
        }
        return {name: score.float() for name, score in scores.items()}
