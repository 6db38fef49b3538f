"""Where a photograph lies in the square that a network sees."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Box", "fitted", "restore"]


def restore(values: Tensor, size: Sequence[int], letterbox: bool = False) -> Tensor:
    """Bring a square map `(C, S, S)` back to an image's own height and width, bilinear."""
    box = fitted(size, values.shape[-1], letterbox)
    values = values[None, :, box.rows, box.columns].float()
    return F.interpolate(values, tuple(size), mode="bilinear", antialias=True)[0]


class Box(NamedTuple):
    """Where an image lies in a square, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Its rows of the square."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Its columns of the square."""
        return slice(self.left, self.left + self.width)


def fitted(size: Sequence[int], side: int, letterbox: bool) -> Box:
    """Return where an image of a height and width lies in a square of this side.

    With `letterbox` it keeps its proportions and lies in the middle, otherwise it fills the square.
    """
    if not letterbox:
        return Box(0, 0, side, side)
    height, width = (max(1, round(length * side / max(size))) for length in size)
    return Box((side - height) // 2, (side - width) // 2, height, width)
