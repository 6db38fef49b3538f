"""Losses between the features of a student and of its teacher, which gets no gradient.

Relations (RKD, D-KD) compare how features lie to each other, so both may have other sizes; a hint
(FitNet) compares the features as they are. Distances and Gram matrices are computed in float64:
they are small differences of large numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from lightning_modules.losses.overlap import at_least_float32

__all__ = [
    "channel_gram_rmse",
    "hint_mse",
    "pairwise_distances",
    "relational_kd",
    "rkd_angle",
    "rkd_distance",
]

# The distance of rows that coincide, so that a mean of distances can be divided by.
LEAST_DISTANCE = 1e-6


def pairwise_distances(features: Tensor) -> Tensor:
    """Euclidean distances of all pairs of rows: `sqrt(max(|f_i - f_j|^2, 1e-12))`, diagonal 0.

    Args:
        features: `f`, `(N, D)`.

    Returns:
        float64 `(N, N)`; rows that coincide send no gradient.
    """
    diagonal = torch.eye(len(features), dtype=torch.bool, device=features.device)
    return _distances(features.double()).clamp(min=LEAST_DISTANCE).masked_fill(diagonal, 0)


def rkd_distance(pooled: Tensor, teacher_pooled: Tensor) -> Tensor:
    """Difference in distances between samples, each network's in units of its own mean distance.

    The mean of `smooth_l1(D_ij / mean(D), D'_ij / mean(D'))` over all `N^2` pairs, with
    `D = pairwise_distances(pooled)` and `D'` the teacher's; the means are over `i != j`.

    Args:
        pooled: `(N, D)`, one vector for each sample.
        teacher_pooled: `(N, D')`; it gets no gradient.

    Returns:
        A scalar of at least 0; 0 for fewer than two samples, and whatever the scales.

    Source: Park et al., "Relational Knowledge Distillation", 2019.
    """
    student, teacher = (_relative_distances(f) for f in (pooled, teacher_pooled.detach()))
    return _like(F.smooth_l1_loss(student, teacher), pooled)


def rkd_angle(pooled: Tensor, teacher_pooled: Tensor) -> Tensor:
    """Difference in the angles that any two samples make at a third.

    The mean of `smooth_l1(c_ijk, c'_ijk)` over all `N^3` triples, with `c_ijk` the cosine between
    `f_j - f_i` and `f_k - f_i` and `c'` the teacher's; 0 where `f_i` coincides with one of them.
    Rows closer than `1e-6` of the largest distance from the centre coincide: what remains of the
    direction between them is rounding. Memory and time grow with `N^3`, not with `N^3 D`.

    Args:
        pooled, teacher_pooled: as in `rkd_distance`.

    Returns:
        A scalar in [0, 1.5]; it changes with no rotation, shift or scale of either features.

    Source: Park et al., "Relational Knowledge Distillation", 2019.
    """
    student, teacher = (_cosines(f) for f in (pooled, teacher_pooled.detach()))
    return _like(F.smooth_l1_loss(student, teacher), pooled)


def relational_kd(
    pooled: Tensor,
    teacher_pooled: Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    """Relations between samples: `distance_weight rkd_distance + angle_weight rkd_angle`.

    Args:
        pooled, teacher_pooled: as in `rkd_distance`.
        distance_weight, angle_weight: at least 0; 0 switches one and its computation off.

    Returns:
        A scalar of at least 0.

    Raises:
        UserError: a weight is negative.

    Source: Park et al., "Relational Knowledge Distillation", 2019; Wang et al., "SSD-KD: A
    self-supervised diverse knowledge distillation method for lightweight skin lesion
    classification using dermoscopic images", Medical Image Analysis 84, 2023.
    """
    for name, weight in (("distance_weight", distance_weight), ("angle_weight", angle_weight)):
        if not weight >= 0:
            raise UserError(f"losses.drkd.{name}={weight} must be at least 0; 0 is off.")
    # Without any term there is still a zero to call backward on.
    total = _like(pooled[:0].sum(), pooled)
    if distance_weight:
        total = total + distance_weight * rkd_distance(pooled, teacher_pooled)
    if angle_weight:
        total = total + angle_weight * rkd_angle(pooled, teacher_pooled)
    return total


def channel_gram_rmse(adapted: Tensor, teacher_features: Tensor) -> Tensor:
    """Difference in how channels go together: `sqrt(mean_n,c,d((G_ncd - G'_ncd)^2))`.

    `G_n = F_n F_n^T / (C H W)` with `F_n` `(C, H W)` the features of one sample, and `G'` the
    teacher's; one square root over the whole batch.

    Args:
        adapted: `F`, `(N, C, H, W)`, the student's features with as many channels as the teacher's.
        teacher_features: `(N, C, H', W')`; it gets no gradient.

    Returns:
        A scalar of at least 0, accurate to `1e-8` of the Gram matrices. Where it is 0 its gradient,
        which is not defined there, is 0.

    Raises:
        UserError: the numbers of channels differ.

    Source: Wang et al., "SSD-KD: A self-supervised diverse knowledge distillation method for
    lightweight skin lesion classification using dermoscopic images", Medical Image Analysis 84,
    2023, the channel relation.
    """
    channels = teacher_features.shape[1]
    if adapted.shape[1] != channels:
        raise UserError(
            f"losses.crkd compares maps of equal channels, but the student's have "
            f"{adapted.shape[1]} and the teacher's {channels}; adapt the student's to {channels}."
        )
    student, teacher = (f.flatten(2).double() for f in (adapted, teacher_features.detach()))
    if channels <= max(student.shape[2], teacher.shape[2]):
        gram, teacher_gram = (f @ f.mT / f[0].numel() for f in (student, teacher))
        mean = (gram - teacher_gram).square().mean()
    else:
        # |F F^T - F' F'^T|^2 = |F^T F|^2 - 2 |F^T F'|^2 + |F'^T F'|^2, whose matrices are of pixels
        # by pixels: for 2048 channels on 7 x 7 pixels they are 1700 times smaller.
        squares = (
            _mean_square_product(student, student)
            - 2 * _mean_square_product(student, teacher)
            + _mean_square_product(teacher, teacher)
        )
        mean = squares / channels**2
    differs = mean > 0
    return _like(mean.where(differs, 1).sqrt().where(differs, 0), adapted)


def hint_mse(adapted: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean of `(F - F')^2` between the features themselves.

    Args:
        adapted: `F`, `(N, C, H, W)`, the student's features in the shape of the teacher's.
        teacher_features: `F'`, `(N, C, H, W)`; it gets no gradient.

    Returns:
        A scalar of at least 0.

    Raises:
        UserError: the shapes differ.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015.
    """
    if adapted.shape != teacher_features.shape:
        raise UserError(
            f"losses.hint compares maps of equal shape, but the student's is "
            f"{tuple(adapted.shape)} and the teacher's {tuple(teacher_features.shape)}; adapt the "
            "student's to the teacher's."
        )
    student = at_least_float32(adapted)
    return F.mse_loss(student, teacher_features.detach().to(student.dtype))


def _distances(features: Tensor) -> Tensor:
    # By differences: rows that coincide are at exactly 0, where the gradient is 0.
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")


def _relative_distances(features: Tensor) -> Tensor:
    """Return distances `(N, N)` divided by the mean over different rows."""
    distances = pairwise_distances(features)
    count = len(features)
    mean = distances.sum() / max(count * (count - 1), 1)
    # Every distance is at least this, so that it only matters for a batch of one.
    return distances / mean.clamp(min=LEAST_DISTANCE)


def _cosines(features: Tensor) -> Tensor:
    """Return the cosines between `f_j - f_i` and `f_k - f_i`, float64 `(N, N, N)` by i, j, k."""
    features = features.double()
    # The shift changes no angle and keeps the products below small.
    features = features - features.mean(0)
    distances = _distances(features)
    distinct = distances > 1e-6 * features.detach().norm(dim=1).max()
    inverse = distances.where(distinct, 1).reciprocal().where(distinct, 0)
    products = features @ features.T
    anchor = products.diagonal()[:, None, None]
    between = products - products[:, :, None] - products[:, None, :] + anchor
    return between * inverse[:, :, None] * inverse[:, None, :]


def _mean_square_product(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean over samples of `|A^T B|^2`, each divided by its number of elements."""
    product = first.mT @ second
    return product.square().sum((1, 2)).mean() / (first[0].numel() * second[0].numel())


def _like(value: Tensor, features: Tensor) -> Tensor:
    """Return a value in the precision of features, in float32 at least."""
    return value.to(torch.promote_types(features.dtype, torch.float32))
