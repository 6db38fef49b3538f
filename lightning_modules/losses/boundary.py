"""Boundary-aware weighting of the diffusion loss.

Source: Bozorgpour et al., "DermoSegDiff", 2023, equations 8 to 10, in the form that the published
code computes: the constant in its distance map cancels and leaves `A = 1 - d / d_max`.
"""

from torch import Tensor

from common.errors import UserError, check_choice

__all__ = ["boundary_loss", "boundary_weight", "edge_closeness"]


def edge_closeness(edge_distance: Tensor, mask: Tensor) -> Tensor:
    """Closeness of each pixel to the mask's edge, whatever the time: `A = 1 - d / max(d)`.

    Args:
        edge_distance, mask: as in `boundary_weight`.

    Returns:
        float32 `(B, 1, H, W)` in [0, 1], without gradient; ones where `boundary_weight` is ones.
    """
    distance = edge_distance.detach().float()
    farthest = distance.amax(dim=(1, 2, 3), keepdim=True)
    covered = (mask > 0.5).sum(dim=(1, 2, 3)).view(-1, 1, 1, 1)
    applies = (covered > mask.shape[-1] ** 2 / 100) & (farthest > 0)
    return 1 - distance / farthest.where(farthest > 0, 1) * applies


def boundary_weight(
    edge_distance: Tensor,
    mask: Tensor,
    t: Tensor,
    num_timesteps: int,
    gamma: float,
    closeness: Tensor | None = None,
) -> Tensor:
    """Weight of each pixel by its closeness to the mask's edge.

    `W = A^p` with `A = 1 - d / max(d)` and `p = (gamma (T - t) / T)^gamma`: 1 on the edge, 0 at the
    farthest pixel, flatter for large `t`. Ones for a mask that covers at most `W^2 / 100` pixels
    (`W` the image width, also for images that are not square, as published) or has no edge.

    Args:
        edge_distance: pixels to the nearest edge, `(B, 1, H, W)`, zeros where the mask has no edge.
        mask: `(B, C, H, W)`, lesion where above 0.5: {0, 1} and {-1, 1} give the same.
        t: integer time steps `(B,)` in `[0, num_timesteps)`.
        num_timesteps: `T` of the noise schedule.
        gamma: strength, at least 0.
        closeness: `edge_closeness` of the first two, where it is known already.

    Returns:
        float32 `(B, 1, H, W)` in [0, 1], without gradient.

    Raises:
        UserError: `gamma` is negative.
    """
    if gamma < 0:
        raise UserError(f"gamma={gamma} of a boundary weight must be at least 0, such as 1.5.")
    if closeness is None:
        closeness = edge_closeness(edge_distance, mask)
    exponent = (gamma * (num_timesteps - t.float()) / num_timesteps) ** gamma
    return closeness ** exponent.view(-1, 1, 1, 1)


def boundary_loss(
    prediction: Tensor,
    target: Tensor,
    edge_distance: Tensor,
    mask: Tensor,
    t: Tensor,
    num_timesteps: int,
    gamma: float = 1.5,
    root: str = "l2",
    closeness: Tensor | None = None,
) -> Tensor:
    """Mean over all elements of `W |prediction - target|^r`, `W` from `boundary_weight`.

    Args:
        prediction, target: network output and what it should be, `(B, C, H, W)`.
        edge_distance, mask, t, num_timesteps, gamma, closeness: as in `boundary_weight`.
        root: `l2` for `r = 2`, `l1` for `r = 1`.

    Raises:
        UserError: another `root`, or `gamma` is negative.
    """
    check_choice("losses.boundary.root", root, ("l1", "l2"))
    weight = boundary_weight(edge_distance, mask, t, num_timesteps, gamma, closeness)
    difference = prediction.float() - target.float()
    return (weight * (difference.abs() if root == "l1" else difference.square())).mean()
