"""Losses of class logits against labels and against a teacher's logits."""

import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from lightning_modules.losses.distillation import check_temperature
from lightning_modules.losses.overlap import at_least_float32

__all__ = ["cross_entropy_loss", "kd_kl"]


def cross_entropy_loss(
    logits: Tensor,
    label: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy, averaged by the weights of the labels: `-sum(w_y log p_y) / sum(w_y)`.

    `p = softmax(logits)`. With smoothing `s`, `-w_y log p_y` becomes
    `-(1 - s) w_y log p_y - s / K sum_k(w_k log p_k)`; the divisor stays.

    Args:
        logits: `(N, K)` of `K` classes.
        label: `y`, int64 `(N,)` in `[0, K)`.
        class_weights: `w`, `(K,)` of at least 0; none is all 1.
        label_smoothing: `s`, in [0, 1).

    Returns:
        A scalar of at least 0; 0 where the weights of all labels are 0, as of no rows.

    Raises:
        UserError: `label_smoothing` is outside its range.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(
            f"losses.cross_entropy.label_smoothing={label_smoothing} must be in [0, 1); 0 is off."
        )
    logits = at_least_float32(logits)
    if class_weights is None:
        class_weights = logits.new_ones(logits.shape[1])
    class_weights = class_weights.to(logits)
    total = F.cross_entropy(
        logits, label, class_weights, reduction="sum", label_smoothing=label_smoothing
    )
    weight = class_weights[label].sum()
    return (total / weight.where(weight > 0, 1)).where(weight > 0, 0)


def kd_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 5.0) -> Tensor:
    """Divergence from a teacher: `T^2 / N sum_n(sum_k(q log(q / p)))`.

    `p = softmax(z / T)`, `q = softmax(z_teacher / T)`.

    Args:
        logits: `z`, `(N, K)`.
        teacher_logits: `z_teacher`, `(N, K)`; it gets no gradient.
        temperature: `T`, above 0; the more, the softer both are.

    Returns:
        A scalar of at least 0 but for rounding, 0 where both are equal and where there is no row.

    Raises:
        UserError: `temperature` is not positive.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    check_temperature("kd", temperature)
    logits = at_least_float32(logits)
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().to(logits.dtype) / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * divergence / max(len(logits), 1)
