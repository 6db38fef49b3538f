"""Losses as pure functions, tensors in and a scalar out, and their weighted sum."""

from lightning_modules.losses.boundary import boundary_loss, boundary_weight, edge_closeness
from lightning_modules.losses.classification import cross_entropy_loss, kd_kl
from lightning_modules.losses.distillation import (
    auxiliary_bce_loss,
    auxiliary_kd_loss,
    bernoulli_kl_loss,
    consistency_loss,
    logit_kd_loss,
    probability_kd_loss,
)
from lightning_modules.losses.edge_focused import efkd_loss
from lightning_modules.losses.overlap import bce_loss, dice_loss, focal_loss
from lightning_modules.losses.pixelwise import huber_loss, l1_loss, l2_loss
from lightning_modules.losses.relational import (
    channel_gram_rmse,
    hint_mse,
    pairwise_distances,
    relational_kd,
    rkd_angle,
    rkd_distance,
)
from lightning_modules.losses.self_supervision import (
    rank_filter,
    ss_contrastive,
    ss_kd,
    ss_similarity,
    transformed_kd,
)
from lightning_modules.losses.weighted_sum import WeightedSum

__all__ = [
    "WeightedSum",
    "auxiliary_bce_loss",
    "auxiliary_kd_loss",
    "bce_loss",
    "bernoulli_kl_loss",
    "boundary_loss",
    "boundary_weight",
    "channel_gram_rmse",
    "consistency_loss",
    "cross_entropy_loss",
    "dice_loss",
    "edge_closeness",
    "efkd_loss",
    "focal_loss",
    "hint_mse",
    "huber_loss",
    "kd_kl",
    "l1_loss",
    "l2_loss",
    "logit_kd_loss",
    "pairwise_distances",
    "probability_kd_loss",
    "rank_filter",
    "relational_kd",
    "rkd_angle",
    "rkd_distance",
    "ss_contrastive",
    "ss_kd",
    "ss_similarity",
    "transformed_kd",
]
