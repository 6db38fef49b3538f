"""A trained network that is only ever asked."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FrozenTeacher"]


class FrozenTeacher:
    """Holds a teacher outside its student: not a submodule, so never among the student's
    parameters, in its optimizer, state dict or moving average.

    Args:
        network: the trained network; it is frozen and put into evaluation mode.
        objective: what it predicts.
    """

    def __init__(self, network: nn.Module, objective: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.objective = objective

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTeacher":
        # Weight averaging deep-copies the student; the teacher must not be copied with it.
        return self

    def to(self, device: torch.device) -> None:
        """Move the network, which no Trainer does for what is not a submodule."""
        self.network.to(device)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, image: Tensor, t: Tensor) -> Tensor:
        """Return the network's output, without graph."""
        return self.network(x_t, image, t)
