"""Losses as pure functions, tensors in and a scalar out, and their weighted sum."""

from lightning_modules.losses.boundary import boundary_loss, boundary_weight
from lightning_modules.losses.edge_focused import efkd_loss
from lightning_modules.losses.pixelwise import huber_loss, l1_loss, l2_loss
from lightning_modules.losses.weighted_sum import WeightedSum

__all__ = [
    "WeightedSum",
    "boundary_loss",
    "boundary_weight",
    "efkd_loss",
    "huber_loss",
    "l1_loss",
    "l2_loss",
]
