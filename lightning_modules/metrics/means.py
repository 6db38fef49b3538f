"""Mean losses over images, however they were batched and dealt out to processes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_modules.metrics.exact import ExactMetric

__all__ = ["LossMeans"]


class LossMeans(ExactMetric):
    """Means of several losses, each batch weighted by its images, merged exactly over processes.

    The Trainer's own merging divides by the mean number of images of a process, rounded down.

    Args:
        names: of the losses, in the order of `compute`'s result.
    """

    full_state_update = False

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        totals = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("totals", totals, dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, Tensor], images: int) -> None:
        """Add a batch by its mean losses, scalars by name, and its number of images."""
        self.totals += torch.stack([values[name].detach().double() for name in self.names]) * images
        self.images += images

    def compute(self) -> dict[str, Tensor]:
        means = (self.totals / self.images.clamp(min=1)).float()
        return dict(zip(self.names, means, strict=True))
