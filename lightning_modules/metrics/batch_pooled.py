"""Overlap scores from the pixels of a whole batch, as the DeepLabV3+ distillation reports them."""

import torch
from torch import Tensor

from lightning_modules.metrics.exact import ExactMetric
from lightning_modules.metrics.overlap import lesion_masks

__all__ = ["BATCH_POOLED_SCORES", "BatchPooledScores", "batch_pooled_scores"]

# Names of what `BatchPooledScores` returns, in the order of `batch_pooled_scores`.
BATCH_POOLED_SCORES = (
    "batch_pooled_dice",
    "batch_pooled_iou",
    "batch_pooled_precision",
    "batch_pooled_recall",
    "hard_dice_loss",
)


def batch_pooled_scores(probability: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Compare the pixels of a batch, of all its images together, with a mask that may be soft.

    With `m = p > 0.5`: `TP = sum(m y)`, `FP = sum(m (1 - y))`, `FN = sum((1 - m) y)`. Other than in
    `OverlapMetrics`, scores of nothing are 0: `1e-8` is added to denominators. `hard_dice_loss` is
    `1 - (2 TP + 1e-6) / (sum(m) + sum(y) + 1e-6)`, 0 where both are empty. For an image without a
    finite prediction, `m` is the complement of its mask.

    Args:
        probability: `p`, `(B, 1, H, W)` in [0, 1].
        mask: `y`, `(B, 1, H, W)` in [0, 1].

    Returns:
        `dice`, `iou`, `precision`, `recall` and `hard_dice_loss`, float64 scalars in [0, 1].

    Source: the DeepLabV3+ distillation repository.
    """
    predicted, lesion = lesion_masks(probability, mask).double(), mask.double()
    tp = (predicted * lesion).sum()
    fp, fn = predicted.sum() - tp, lesion.sum() - tp
    return {
        "dice": 2 * tp / (2 * tp + fp + fn + 1e-8),
        "iou": tp / (tp + fp + fn + 1e-8),
        "precision": tp / (tp + fp + 1e-8),
        "recall": tp / (tp + fn + 1e-8),
        "hard_dice_loss": 1 - (2 * tp + 1e-6) / (2 * tp + fp + fn + 1e-6),
    }


class BatchPooledScores(ExactMetric):
    """Means of `batch_pooled_scores` over batches, merged exactly over processes.

    They depend on the batch size, and a last batch of few images counts as much as a whole one.
    `compute` returns the scores as `batch_pooled_dice`, `batch_pooled_iou`,
    `batch_pooled_precision`, `batch_pooled_recall` and `hard_dice_loss`, float32.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        totals = torch.zeros(len(BATCH_POOLED_SCORES), dtype=torch.float64)
        self.add_state("totals", totals, dist_reduce_fx="sum")
        self.add_state("batches", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probability: Tensor, mask: Tensor) -> None:
        """Add a batch by its predicted and its true masks, as in `batch_pooled_scores`."""
        self.totals += torch.stack(list(batch_pooled_scores(probability, mask).values()))
        self.batches += 1

    def compute(self) -> dict[str, Tensor]:
        means = (self.totals / self.batches.clamp(min=1)).float()
        return dict(zip(BATCH_POOLED_SCORES, means, strict=True))
