"""Losses between the lesion maps of a student and of its teacher, which gets no gradient.

A teacher's map of another size than the student's is resized to it, bilinearly.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from lightning_modules.losses.overlap import at_least_float32, bce_loss
from lightning_modules.losses.pixelwise import weighted_mean

__all__ = [
    "auxiliary_bce_loss",
    "auxiliary_kd_loss",
    "bernoulli_kl_loss",
    "check_temperature",
    "consistency_loss",
    "logit_kd_loss",
    "probability_kd_loss",
]


def logit_kd_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross entropy with a teacher: `T^2 BCE(z / T, sigmoid(z_teacher / T))`.

    It is `bernoulli_kl_loss` and the entropy of the teacher, below which it cannot fall.

    Args:
        logits: `z`, `(B, 1, H, W)`.
        teacher_logits: `z_teacher`, `(B, 1, H', W')`.
        temperature: `T`, above 0; the more, the softer both are.

    Raises:
        UserError: `temperature` is not positive.
    """
    check_temperature("logit_kd", temperature)
    teacher = _matched(teacher_logits, logits)
    loss = bce_loss(at_least_float32(logits) / temperature, (teacher / temperature).sigmoid())
    return temperature**2 * loss


def bernoulli_kl_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Divergence from a teacher: `T^2 (q log(q / p) + (1 - q) log((1 - q) / (1 - p)))`.

    `p = sigmoid(z / T)`, `q = sigmoid(z_teacher / T)`; the mean over all pixels. It equals the
    divergence of a softmax over the two channels `(0, z)`; over one channel that would be 0.

    Args:
        logits, teacher_logits, temperature: as in `logit_kd_loss`.

    Returns:
        A scalar of at least 0 but for rounding, 0 where both are equal.

    Raises:
        UserError: `temperature` is not positive.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    check_temperature("bernoulli_kl", temperature)
    student = at_least_float32(logits) / temperature
    teacher = _matched(teacher_logits, logits) / temperature
    divergence = sum(
        (sign * teacher).sigmoid() * (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student))
        for sign in (1, -1)
    )
    return temperature**2 * divergence.mean()


def auxiliary_bce_loss(auxiliary: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Sum over auxiliary heads of `bce_loss` with the mask.

    Args:
        auxiliary: logits `(B, 1, H, W)` of each head by name, at least one.
        mask: `(B, 1, H, W)` in [0, 1].
    """
    return sum(bce_loss(logits, mask) for logits in auxiliary.values())


def auxiliary_kd_loss(
    auxiliary: Mapping[str, Tensor], teacher_auxiliary: Mapping[str, Tensor]
) -> Tensor:
    """Sum over auxiliary heads of `logit_kd_loss` with the teacher's head of the same name.

    Args:
        auxiliary: logits `(B, 1, H, W)` of each head by name, at least one.
        teacher_auxiliary: the teacher's `(B, 1, H', W')`, of at least these names.
    """
    return sum(logit_kd_loss(auxiliary[name], teacher_auxiliary[name]) for name in auxiliary)


def probability_kd_loss(
    x0: Tensor, teacher_probability: Tensor, x0_weight: Tensor | None = None
) -> Tensor:
    """Squared difference of a clean mask to a teacher's probability: `((x0 + 1) / 2 - p)^2`.

    The mean over all pixels; it is least where `x0` is the probability on the scale of -1 to 1.

    Args:
        x0: clean mask as a diffusion network predicts it, `(B, 1, H, W)`, skin -1 and lesion 1,
            not clamped.
        teacher_probability: `p`, `(B, 1, H', W')` in [0, 1].
        x0_weight: `(B,)` factor on each sample's contribution, ones by default.
    """
    probability = (at_least_float32(x0) + 1) / 2
    squared = (probability - _matched(teacher_probability, x0)).square()
    return weighted_mean(squared, x0_weight)


def consistency_loss(x0: Tensor, consistent_x0: Tensor, x0_weight: Tensor | None = None) -> Tensor:
    """Squared difference of two clean masks of one network, on the scale of `probability_kd_loss`.

    Args:
        x0: as predicted from more noise, `(B, 1, H, W)`.
        consistent_x0: as predicted from less, the same shape, in [-1, 1]; gets no gradient.
        x0_weight: as in `probability_kd_loss`.
    """
    return probability_kd_loss(x0, (consistent_x0 + 1) / 2, x0_weight)


def _matched(teacher: Tensor, student: Tensor) -> Tensor:
    """Return a teacher's map without gradient, at the size and precision of the student's."""
    teacher = teacher.detach().to(at_least_float32(student).dtype)
    size = student.shape[-2:]
    if teacher.shape[-2:] == size:
        return teacher
    return F.interpolate(teacher, size, mode="bilinear", align_corners=False)


def check_temperature(term: str, temperature: float) -> None:
    """Refuse a temperature by which logits cannot be divided.

    Raises:
        UserError: it is not positive.
    """
    if not temperature > 0:
        raise UserError(f"losses.{term}.temperature={temperature} must be above 0, such as 1.")
