"""Self-supervised distillation: what a teacher makes of rotated copies of an image.

A batch of `B` images is `4B` rows: of each image the normal one and its copies rotated by 90, 180
and 270 degrees, then the next image. The `3B` transformed rows keep that order.

Source: Wang et al., "SSD-KD: A self-supervised diverse knowledge distillation method for
lightweight skin lesion classification using dermoscopic images", Medical Image Analysis 84, 2023;
after Xu et al., "Knowledge Distillation Meets Self-Supervision" (SSKD), ECCV 2020.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from lightning_modules.losses.classification import kd_kl
from lightning_modules.losses.distillation import check_temperature
from lightning_modules.losses.overlap import at_least_float32

__all__ = ["rank_filter", "ss_contrastive", "ss_kd", "ss_similarity", "transformed_kd"]

VIEWS = 4


def ss_similarity(projected: Tensor) -> Tensor:
    """Cosine of each transformed row with each normal row: `<r, s> / (|r| |s|)`.

    Args:
        projected: outputs of the projection head, `(4B, D)`, in the order of this module.

    Returns:
        `(3B, B)` in [-1, 1], in float32 at least; 0 for a row of zeros.

    Raises:
        UserError: the number of rows is not a multiple of 4.

    Source: Xu et al., "Knowledge Distillation Meets Self-Supervision", ECCV 2020.
    """
    if len(projected) % VIEWS:
        raise UserError(
            f"losses.ss_similarity got {len(projected)} rows, but an image has {VIEWS}; "
            "give every image with its three rotations."
        )
    # float64 is left alone by autocast, which would round the cosines to bfloat16.
    rows = projected.double()
    length = rows.norm(dim=1, keepdim=True)
    rows = (rows / length.where(length > 0, 1)).unflatten(0, (-1, VIEWS))
    similarity = rows[:, 1:].flatten(0, 1) @ rows[:, 0].T
    return similarity.to(at_least_float32(projected).dtype)


def ss_contrastive(similarity: Tensor) -> Tensor:
    """Cross entropy of finding the image of a transformed row: `-mean(log softmax(S)_ri)`.

    The three rows `r` of image `i` have the target `i`. There is no temperature as published; as
    cosines are in [-1, 1] the loss stays above `log(1 + (B - 1) / e^2)`.

    Args:
        similarity: `S`, `(3B, B)`, of `ss_similarity`.

    Returns:
        A scalar above 0 for several images.

    Source: Xu et al., "Knowledge Distillation Meets Self-Supervision", ECCV 2020.
    """
    return F.cross_entropy(at_least_float32(similarity), _image_of_each_row(similarity))


def rank_filter(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """Indices of the rows that a teacher has right, and of a part of those it has wrong.

    The rank of a row is how many classes score higher than its target; 0 is right. All of rank 0
    are kept and the `int(ratio wrong)` of the least ranks among the `wrong` others. Of equal
    scores the first class ranks higher, and of equal ranks the first row is kept.

    Args:
        scores: the teacher's, `(N, K)`.
        target: int64 `(N,)` in `[0, K)`.
        ratio: of the wrong rows, in [0, 1]; 1 keeps every row.

    Returns:
        int64 indices, ascending.

    Raises:
        UserError: `ratio` is outside its range.

    Source: Xu et al., "Knowledge Distillation Meets Self-Supervision", ECCV 2020.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"ratio={ratio} of a rank filter must be in [0, 1]; 1 keeps every row.")
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = (order == target[:, None]).int().argmax(dim=1)
    wrong = int((rank > 0).sum())
    kept = len(rank) - wrong + int(ratio * wrong)
    return rank.argsort(stable=True)[:kept].sort().values


def transformed_kd(
    transformed_logits: Tensor,
    teacher_transformed_logits: Tensor,
    transformed_label: Tensor,
    temperature: float = 4.0,
    ratio: float = 1.0,
) -> Tensor:
    """`kd_kl` over the transformed rows that `rank_filter` of the teacher's logits keeps.

    Args:
        transformed_logits: `(3B, K)`.
        teacher_transformed_logits: `(3B, K)`; it gets no gradient.
        transformed_label: int64 `(3B,)`, the label of each row's image.
        temperature: as in `kd_kl`.
        ratio: as in `rank_filter`; 1 keeps all rows, whatever the labels.

    Returns:
        A scalar of at least 0 but for rounding, the mean over the rows kept; 0 where none is.

    Raises:
        UserError: `temperature` or `ratio` is outside its range.

    Source: Wang et al., SSD-KD, 2023; Xu et al., SSKD, 2020.
    """
    check_temperature("transformed_kd", temperature)
    kept = rank_filter(teacher_transformed_logits.detach(), transformed_label, ratio)
    return kd_kl(transformed_logits[kept], teacher_transformed_logits[kept], temperature)


def ss_kd(
    similarity: Tensor, teacher_similarity: Tensor, temperature: float = 0.5, ratio: float = 0.75
) -> Tensor:
    """`kd_kl` between similarities, over the rows that `rank_filter` of the teacher's keeps.

    Args:
        similarity: `(3B, B)`, of `ss_similarity`.
        teacher_similarity: `(3B, B)`; it gets no gradient.
        temperature: as in `kd_kl`.
        ratio: as in `rank_filter`; a row is right where it is most similar to its own image.

    Returns:
        A scalar of at least 0 but for rounding, the mean over the rows kept; 0 where none is.

    Raises:
        UserError: `temperature` or `ratio` is outside its range.

    Source: Wang et al., SSD-KD, 2023; Xu et al., SSKD, 2020.
    """
    check_temperature("ss_kd", temperature)
    target = _image_of_each_row(teacher_similarity)
    kept = rank_filter(teacher_similarity.detach(), target, ratio)
    return kd_kl(similarity[kept], teacher_similarity[kept], temperature)


def _image_of_each_row(similarity: Tensor) -> Tensor:
    """Return `0, 0, 0, 1, 1, 1, ...`, int64 `(3B,)`."""
    return torch.arange(len(similarity), device=similarity.device) // (VIEWS - 1)
