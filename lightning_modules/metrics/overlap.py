"""Overlap of a predicted mask with the true one, per image and pooled over all pixels."""

import torch
from torch import Tensor

from lightning_modules.metrics.exact import ExactMetric

__all__ = [
    "OverlapMetrics",
    "dice_score",
    "finite_images",
    "iou_score",
    "lesion_masks",
    "overlap_counts",
    "threshold_jaccard",
]


def finite_images(probability: Tensor) -> Tensor:
    """Return which predictions of a batch `(B, ...)` are finite throughout, bool `(B,)`."""
    return probability.isfinite().flatten(1).all(1)


def lesion_masks(probability: Tensor, mask: Tensor, finite: Tensor | None = None) -> Tensor:
    """Return the predicted masks of a batch, bool `(B, 1, H, W)`: lesion above 0.5.

    A prediction that is not finite becomes the complement of the true mask. No mask overlaps less
    with it, so every overlap score of the image has its worst value.

    Args:
        probability: `(B, 1, H, W)` in [0, 1], or with values that are not finite.
        mask: the true masks `(B, 1, H, W)`, lesion where above 0.5.
        finite: which predictions are finite, bool `(B,)`; by default as `finite_images` finds.
    """
    finite = finite_images(probability) if finite is None else finite
    return torch.where(finite[:, None, None, None], probability > 0.5, mask <= 0.5)


def overlap_counts(prediction: Tensor, mask: Tensor) -> Tensor:
    """Count agreeing and differing pixels of each image.

    Args:
        prediction: `(B, 1, H, W)`, true where a lesion is predicted.
        mask: `(B, 1, H, W)`, lesion where above 0.5.

    Returns:
        int64 `(B, 4)`: true positive, false positive, false negative, true negative pixels.
    """
    predicted, lesion = prediction.bool().flatten(1), (mask > 0.5).flatten(1)
    both, first, second = (count.sum(1) for count in (predicted & lesion, predicted, lesion))
    neither = predicted.shape[1] - first - second + both
    return torch.stack((both, first - both, second - both, neither), dim=1)


def dice_score(counts: Tensor) -> Tensor:
    """Return `2 TP / (2 TP + FP + FN)` of counts `(..., 4)`, float64; 1 where both are empty."""
    tp, fp, fn, _ = counts.double().unbind(-1)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def iou_score(counts: Tensor) -> Tensor:
    """Return `TP / (TP + FP + FN)` of counts `(..., 4)`, float64; 1 where both are empty."""
    tp, fp, fn, _ = counts.double().unbind(-1)
    return _ratio(tp, tp + fp + fn)


def threshold_jaccard(counts: Tensor) -> Tensor:
    """Return `iou_score` of counts `(..., 4)`, float64, with 0 for all values below 0.65.

    The ISIC challenges of 2018 and later rank by its mean over images.
    """
    jaccard = iou_score(counts)
    return torch.where(jaccard >= 0.65, jaccard, 0.0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; 1 where nothing was there to be got wrong."""
    empty = denominator == 0
    return torch.where(empty, 1.0, numerator / denominator.masked_fill(empty, 1))


class OverlapMetrics(ExactMetric):
    """Means over images and the papers' pooled scores, merged exactly over processes.

    `compute` returns `dice`, `iou` and `threshold_jaccard`, the means over images, and `pooled_f1`,
    `pooled_iou`, `pooled_accuracy`, `pooled_precision`, `pooled_sensitivity`, `pooled_specificity`
    from the pixels of all images together (the pooled F1 is the pooled Dice). A score whose
    denominator is 0 is 1: nothing was there to be got wrong. Scalars are float32 tensors in [0, 1].
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("dice_sum", zero.clone(), dist_reduce_fx="sum")
        self.add_state("iou_sum", zero.clone(), dist_reduce_fx="sum")
        self.add_state("threshold_jaccard_sum", zero.clone(), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add images by their `overlap_counts`, `(B, 4)`."""
        self.dice_sum += dice_score(counts).sum()
        self.iou_sum += iou_score(counts).sum()
        self.threshold_jaccard_sum += threshold_jaccard(counts).sum()
        self.images += len(counts)
        self.counts += counts.sum(0)

    def compute(self) -> dict[str, Tensor]:
        tp, fp, fn, tn = self.counts.double().unbind()
        images = self.images.clamp(min=1)
        scores = {
            "dice": self.dice_sum / images,
            "iou": self.iou_sum / images,
            "threshold_jaccard": self.threshold_jaccard_sum / images,
            "pooled_f1": dice_score(self.counts),
            "pooled_iou": iou_score(self.counts),
            "pooled_accuracy": _ratio(tp + tn, tp + fp + fn + tn),
            "pooled_precision": _ratio(tp, tp + fp),
            "pooled_sensitivity": _ratio(tp, tp + fn),
            "pooled_specificity": _ratio(tn, tn + fp),
        }
        return {name: score.float() for name, score in scores.items()}
