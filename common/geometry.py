"""Where a photograph lies in the square of a network, and resampling between the two.

Coordinates are continuous: pixel `i` covers the interval from `i` to `i + 1`, in both images, so
that nothing moves by half a pixel when the size changes.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Box", "fitted", "interpolation_weights", "restore", "restoring_weights"]


class Box(NamedTuple):
    """Where an image lies in a square, in px of the square, which need not be whole numbers."""

    top: float
    left: float
    height: float
    width: float

    @property
    def rows(self) -> slice:
        """Rows of the square with their centre in the image."""
        return _centred(self.top, self.height)

    @property
    def columns(self) -> slice:
        """Columns of the square with their centre in the image."""
        return _centred(self.left, self.width)


def _centred(start: float, extent: float) -> slice:
    # Symmetric where a centre lies on the border itself, however the division was rounded.
    first = math.ceil(start - 0.5 - 1e-6)
    end = math.floor(start + extent - 0.5 + 1e-6) + 1
    if first < end:
        return slice(first, end)
    # An image thinner than a pixel need not cover the centre of any.
    return slice(math.floor(start), math.ceil(start + extent))


def fitted(size: Sequence[int], side: int, letterbox: bool) -> Box:
    """Return where an image of a height and width lies in a square of this side.

    With `letterbox` it keeps its proportions and lies in the middle, otherwise it fills the square.
    """
    if not letterbox:
        return Box(0.0, 0.0, float(side), float(side))
    height, width = (length * side / max(size) for length in size)
    return Box((side - height) / 2, (side - width) / 2, height, width)


def interpolation_weights(
    length: int, cells: int, start: float, step: float, kernel: str = "linear", lowpass: bool = True
) -> np.ndarray:
    """Return the weights of an interpolation along one axis, float64 `(cells, length)`.

    Output pixel `i` covers the source from `start + i * step` to `start + (i + 1) * step`; its
    value is that of the kernel centred there. What the kernel finds outside the source counts as
    the source's first or last pixel, so that all weights of an output pixel sum to 1.

    Args:
        length: pixels of the source.
        cells: pixels of the output.
        start: px of the source at which the output begins.
        step: px of the source in one pixel of the output, above 0.
        kernel: `linear`, or `cubic` (Keys, 1981, with a = -0.75 as in PyTorch and OpenCV).
        lowpass: widen the kernel where the image shrinks.
    """
    reach, weigh = _KERNELS[kernel]
    width = max(1.0, step) if lowpass else 1.0
    centres = start + (np.arange(cells) + 0.5) * step
    margin = math.ceil(reach * width) + 1
    pixels = np.floor(centres)[:, None].astype(np.int64) + np.arange(-margin, margin + 1)
    values = weigh(abs(pixels + 0.5 - centres[:, None]) / width)
    weights = np.zeros((cells, length))
    rows = np.broadcast_to(np.arange(cells)[:, None], pixels.shape)
    np.add.at(weights, (rows, pixels.clip(0, length - 1)), values)
    return weights / values.sum(1, keepdims=True)


def _linear(distance: np.ndarray) -> np.ndarray:
    return (1 - distance).clip(0)


def _cubic(distance: np.ndarray) -> np.ndarray:
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))


# How far a kernel reaches, in px, and its value by distance.
_KERNELS = {"linear": (1, _linear), "cubic": (2, _cubic)}


@lru_cache(maxsize=8)
def restoring_weights(
    size: tuple[int, int], side: int, letterbox: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return what brings a square map back to an image, `rows @ map @ columns.T`.

    Args:
        size: height and width of the image.
        side: of the square.
        letterbox: as in `fitted`; the margins have no weight.

    Returns:
        Weights float32 of the rows `(H, side)` and of the columns `(W, side)`, each summing to 1.
    """
    box = fitted(size, side, letterbox)
    weights = []
    for length, start, extent, inside in (
        (size[0], box.top, box.height, box.rows),
        (size[1], box.left, box.width, box.columns),
    ):
        part = np.zeros((length, side), dtype=np.float32)
        part[:, inside] = interpolation_weights(
            inside.stop - inside.start, length, start - inside.start, extent / length, "cubic"
        )
        weights.append(part)
    return weights[0], weights[1]


def restore(values: Tensor, size: Sequence[int], letterbox: bool = False) -> Tensor:
    """Bring square maps `(C, S, S)` back to an image's own height and width, float32.

    The interpolation is cubic, which finds the outline between the pixels of a small map better
    than a linear one, and stays within the range of the map.
    """
    height, width = (int(length) for length in size)
    rows, columns = (
        torch.from_numpy(weights).to(values.device)
        for weights in restoring_weights((height, width), values.shape[-1], letterbox)
    )
    box = fitted((height, width), values.shape[-1], letterbox)
    values = values.float()
    inside = values[..., box.rows, box.columns]
    return (rows @ values @ columns.T).clamp(inside.min(), inside.max())
