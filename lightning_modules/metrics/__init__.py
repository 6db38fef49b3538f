"""Metrics of segmentation masks and of diagnoses on top of torchmetrics."""

from lightning_modules.metrics.batch_pooled import BatchPooledScores, batch_pooled_scores
from lightning_modules.metrics.boundary import BOUNDARY_SCORES, boundary_scores
from lightning_modules.metrics.classification import (
    ClassificationScores,
    Reliability,
    RocCurve,
    classification_scores,
    confusion_matrix,
    positive_class,
    reliability,
    roc_curves,
)
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
from lightning_modules.metrics.segmentation import SegmentationScores
from lightning_modules.metrics.uncertainty import (
    CalibrationError,
    DoubtScores,
    doubt,
    expected_dice,
    uncertainty_correlation,
)

__all__ = [
    "BOUNDARY_SCORES",
    "BatchPooledScores",
    "CalibrationError",
    "ClassificationScores",
    "DoubtScores",
    "LossMeans",
    "OverlapMetrics",
    "Reliability",
    "RocCurve",
    "SegmentationScores",
    "batch_pooled_scores",
    "boundary_scores",
    "classification_scores",
    "confusion_matrix",
    "dice_score",
    "doubt",
    "expected_dice",
    "finite_images",
    "iou_score",
    "lesion_masks",
    "overlap_counts",
    "positive_class",
    "reliability",
    "roc_curves",
    "threshold_jaccard",
    "uncertainty_correlation",
]
