"""Plain losses between a network's output and its target, means over all elements."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["huber_loss", "l1_loss", "l2_loss"]


def l1_loss(prediction: Tensor, target: Tensor, time_weight: Tensor | None = None) -> Tensor:
    """Mean of `|prediction - target|`.

    Args:
        prediction, target: `(B, C, H, W)`.
        time_weight: `(B,)`, a factor for each sample; none is all 1.
    """
    errors = F.l1_loss(prediction.float(), target.float(), reduction="none")
    return weighted_mean(errors, time_weight)


def l2_loss(prediction: Tensor, target: Tensor, time_weight: Tensor | None = None) -> Tensor:
    """Mean of `(prediction - target)^2`.

    Args:
        prediction, target, time_weight: as in `l1_loss`.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, equation 14.
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return weighted_mean(errors, time_weight)


def huber_loss(
    prediction: Tensor, target: Tensor, time_weight: Tensor | None = None, delta: float = 1.0
) -> Tensor:
    """Mean of `d^2/2` where `|d| < delta`, else `delta (|d| - delta/2)`; `d` the difference.

    Args:
        prediction, target, time_weight: as in `l1_loss`.
        delta: where the square turns into a line, positive.
    """
    errors = F.huber_loss(prediction.float(), target.float(), reduction="none", delta=delta)
    return weighted_mean(errors, time_weight)


def weighted_mean(errors: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean of errors `(B, C, H, W)`, each sample's by its factor in `weight` `(B,)`."""
    if weight is None:
        return errors.mean()
    return (errors.flatten(1).mean(1) * weight).mean()
