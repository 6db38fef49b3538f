"""Plain losses between a network's output and its target, means over all elements."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["huber_loss", "l1_loss", "l2_loss"]


def l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of `|prediction - target|`; both `(B, C, H, W)`, result a scalar."""
    return F.l1_loss(prediction.float(), target.float())


def l2_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of `(prediction - target)^2`; both `(B, C, H, W)`, result a scalar.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, equation 14.
    """
    return F.mse_loss(prediction.float(), target.float())


def huber_loss(prediction: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """Mean of `d^2/2` where `|d| < delta`, else `delta (|d| - delta/2)`; `d` the difference.

    Args:
        prediction, target: `(B, C, H, W)`.
        delta: where the square turns into a line, positive.
    """
    return F.huber_loss(prediction.float(), target.float(), delta=delta)
