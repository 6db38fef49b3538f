"""Metrics of segmentation masks on top of torchmetrics."""

from lightning_modules.metrics.means import LossMeans
from lightning_modules.metrics.overlap import OverlapMetrics, dice_score, iou_score, overlap_counts

__all__ = ["LossMeans", "OverlapMetrics", "dice_score", "iou_score", "overlap_counts"]
