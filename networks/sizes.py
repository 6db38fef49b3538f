"""Which image sizes a network of a library takes, which only trying tells."""

import copy

import torch
from torch import Tensor, nn

from common.errors import UserError

# Not public: what is listed here can be chosen as a network.
__all__: list[str] = []

COMMON_SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)


def refuse_size(model: nn.Module, image: Tensor, title: str, advice: str = "") -> None:
    """Explain why a model has just failed, if its image's size is the reason.

    It is tried without data, so memory that has run out is not taken for a size that does not fit.

    Args:
        model: what failed, called with an image alone.
        image: `(B, C, H, W)`, with which it did.
        title: the network's name, for the message.
        advice: how to have another size, a sentence for its end.

    Raises:
        UserError: with those of the common sizes that it takes.
    """
    height, width = image.shape[-2:]
    probe = copy.deepcopy(model).to("meta").eval()
    if _takes(probe, height, width):
        return
    legal = [f"{size}x{size}" for size in COMMON_SIZES if _takes(probe, size, size)]
    message = (
        f"An image of {height}x{width} pixels does not fit {title}, which takes, of the common "
        f"sizes, {', '.join(legal) or 'none'}."
    )
    raise UserError(f"{message} {advice}".rstrip())


@torch.no_grad()
def _takes(model: nn.Module, height: int, width: int) -> bool:
    """Tell whether a model on the meta device takes images of a size."""
    try:
        model(torch.empty(1, 3, height, width, device="meta"))
    except (AssertionError, RuntimeError):
        return False
    return True
