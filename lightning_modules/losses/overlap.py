"""Losses of a network's logits against masks, which may have grey edges."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from common.errors import UserError

__all__ = ["at_least_float32", "bce_loss", "dice_loss", "focal_loss"]


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 where they are so already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def bce_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean of `-y log(p) - (1 - y) log(1 - p)` over all pixels, with `p = sigmoid(logits)`.

    Args:
        logits: `(B, 1, H, W)`.
        mask: `y`, `(B, 1, H, W)` in [0, 1].
    """
    logits = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, mask.to(logits.dtype))


def dice_loss(logits: Tensor, mask: Tensor, smooth: float = 1.0, per_image: bool = True) -> Tensor:
    """Soft Dice loss: `1 - (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth)`.

    Args:
        logits, mask: as in `bce_loss`; `p = sigmoid(logits)`.
        smooth: above 0; it defines the loss of an empty mask.
        per_image: sums over each image and the mean over images, otherwise sums over the whole
            batch, in which an image counts by its lesion's size.

    Returns:
        A scalar in [0, 1).

    Raises:
        UserError: `smooth` is not positive.

    Source: Milletari et al., "V-Net", 2016, with sums in place of sums of squares.
    """
    if smooth <= 0:
        raise UserError(f"losses.dice.smooth={smooth} must be above 0, such as 1.")
    logits = at_least_float32(logits)
    probability, lesion = (
        values.flatten(int(per_image)) for values in (logits.sigmoid(), mask.to(logits.dtype))
    )
    overlap = (probability * lesion).sum(-1)
    total = probability.sum(-1) + lesion.sum(-1)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def focal_loss(logits: Tensor, mask: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cross entropy of which pixels that are nearly right are a small part.

    The mean over all pixels of `a (1 - p_t)^gamma BCE`, with `p_t = y p + (1 - y)(1 - p)` and
    `a = y alpha + (1 - y)(1 - alpha)`. On a grey edge its least value is at a probability that is
    more extreme than `y`.

    Args:
        logits, mask: as in `bce_loss`; `p = sigmoid(logits)`.
        alpha: weight of the lesion, in [0, 1]; -1 weighs all pixels alike by 1.
        gamma: at least 1, or 0 for no focus. Between them the gradient of a pixel that is quite
            right is not defined.

    Raises:
        UserError: `alpha` or `gamma` is outside its range.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017.
    """
    if alpha != -1 and not 0 <= alpha <= 1:
        raise UserError(f"losses.focal.alpha={alpha} must be in [0, 1]; -1 is off.")
    if gamma != 0 and not gamma >= 1:
        raise UserError(f"losses.focal.gamma={gamma} must be at least 1; 0 is off.")
    logits = at_least_float32(logits)
    return sigmoid_focal_loss(logits, mask.to(logits.dtype), alpha, gamma, reduction="mean")
