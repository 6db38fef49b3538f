"""Edge-focused knowledge distillation (EFKD) between two denoising networks.

Source: the EFKD repository's `edge_focused_kd_loss`, whose gamma is fixed at 1.5.
"""

from torch import Tensor

from common.errors import UserError
from lightning_modules.losses.boundary import boundary_weight, edge_closeness

__all__ = ["efkd_loss"]


def efkd_loss(
    student: Tensor,
    teacher: Tensor,
    edge_distance: Tensor,
    mask: Tensor,
    t: Tensor,
    num_timesteps: int,
    edge_weight: float = 3,
    body_weight: float = 1,
    edge_threshold: float = 0.7,
    gamma: float = 1.5,
    edge_time_dependent: bool = True,
    edge_band: float = 0,
    min_area: int = 0,
    sample_weight: Tensor | None = None,
    closeness: Tensor | None = None,
) -> Tensor:
    """Squared difference to the teacher, averaged apart over the lesion's edge and the rest.

    With the edge `E = [boundary_weight > edge_threshold]` and `d2 = (student - teacher)^2`, per
    sample:

        edge = sum(E d2) / (sum(E) + 1e-8),    body = sum((1 - E) d2) / (sum(1 - E) + 1e-8)

    and the loss is `edge_weight mean(edge) + body_weight mean(body)` over the batch.

    Args:
        student, teacher: outputs `(B, C, H, W)` of the same objective; no gradient to the teacher.
        edge_distance, mask, t, num_timesteps, gamma, closeness: as in `boundary_weight`.
        edge_weight, body_weight: weights of the two means, at least 0.
        edge_threshold: in (0, 1); the closeness from which a pixel belongs to the edge.
        edge_time_dependent: as published, the closeness is raised to a power that falls with `t`,
            so that at large `t` nearly every pixel is edge. False takes the plain closeness.
        edge_band: above 0 the edge is, at every time and in every image, what lies within that many
            pixels of the outline, and a mask without outline is all body; the three arguments
            above it then say nothing.
        min_area: a body of fewer pixels than this contributes nothing; as published one pixel may
            carry the whole `body_weight`.
        sample_weight: `(B,)` factor on each sample's contribution, ones by default.

    Returns:
        A scalar, finite also for empty and full masks.

    Raises:
        UserError: `edge_band` or `gamma` is negative.
    """
    if edge_band < 0:
        raise UserError(
            f"losses.efkd.edge_band={edge_band} must be at least 0 px, such as 3; 0 is off."
        )
    if edge_band:
        outlined = edge_distance.amax((1, 2, 3), keepdim=True) > 0
        edge = ((edge_distance <= edge_band) & outlined).float()
    elif edge_time_dependent:
        weight = boundary_weight(edge_distance, mask, t, num_timesteps, gamma, closeness)
        edge = (weight > edge_threshold).float()
    else:
        closeness = edge_closeness(edge_distance, mask) if closeness is None else closeness
        edge = (closeness > edge_threshold).float()
    body = 1 - edge
    squared = (student.float() - teacher.detach().float()).square()

    axes = (1, 2, 3)
    edge_mean = (edge * squared).sum(axes) / (edge.sum(axes) + 1e-8)
    body_area = body.sum(axes)
    body_mean = (body * squared).sum(axes) / (body_area + 1e-8) * (body_area >= min_area)
    per_sample = edge_weight * edge_mean + body_weight * body_mean
    if sample_weight is not None:
        per_sample = per_sample * sample_weight
    return per_sample.mean()
