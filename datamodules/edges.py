"""Distance of every pixel to the edge of a mask."""

from collections.abc import Callable
from typing import TypeVar

import cv2
import numpy as np
import torch

from common.errors import UserError

__all__ = ["EDGES", "border_distance", "edge_distance"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def border_distance(mask: Array) -> Array:
    """Distance in pixels from the centre of each pixel to the border between lesion and skin.

    It is the Euclidean distance to the nearest pixel of the other kind, minus one half: 0.5 in the
    pixels on both sides of a border, and the same whichever way the mask is turned or mirrored. A
    lesion cut by the image border has no border there.

    Args:
        mask: as in `edge_distance`.

    Returns:
        As `edge_distance`; zeros where the mask is empty or full.

    Raises:
        UserError: another shape.
    """
    return _measured(mask, _to_other_kind)


def edge_distance(mask: Array) -> Array:
    """Euclidean distance in pixels from each pixel to the nearest edge pixel of a mask.

    Edge pixels are those that a Canny detector finds on the {0, 1} image with both thresholds 0,
    as in the published code; a lesion cut by the image border has no edge along the border. Of the
    two pixels on either side of a border Canny marks the left or upper one, so the edge lies half
    a pixel up and left of the border that `border_distance` measures from.

    Args:
        mask: `(H, W)` or `(1, H, W)`, lesion where above 0.5, array or tensor of any number type.

    Returns:
        float32 of the same kind and shape; zeros where the mask has no edge (empty or full).

    Raises:
        UserError: another shape.
    """
    return _measured(mask, _to_canny_edges)


# What distances can be measured from, by the name in the config.
EDGES = {"border": border_distance, "canny": edge_distance}


def _measured(mask: Array, measure: Callable[[np.ndarray], np.ndarray]) -> Array:
    values = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[0] != 1):
        raise UserError(f"A mask has the shape (H, W) or (1, H, W), not {values.shape}.")
    lesion = np.ascontiguousarray(values.reshape(values.shape[-2:]) > 0.5, dtype=np.uint8)
    distance = measure(lesion).astype(np.float32).reshape(values.shape)
    if isinstance(mask, torch.Tensor):
        return torch.from_numpy(distance).to(mask.device)
    return distance


def _to_other_kind(lesion: np.ndarray) -> np.ndarray:
    if lesion.min() == lesion.max():
        return np.zeros(lesion.shape)
    return np.where(lesion, _distances(lesion), _distances(1 - lesion)) - 0.5


def _to_canny_edges(lesion: np.ndarray) -> np.ndarray:
    edges = cv2.Canny(lesion, 0, 0)
    return _distances(255 - edges) if edges.any() else np.zeros(lesion.shape)


def _distances(values: np.ndarray) -> np.ndarray:
    """Return each pixel's distance to the nearest zero, float64."""
    distance = cv2.distanceTransform(values, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # OpenCV's last bit depends on where the array lies in memory; squares are whole numbers.
    return np.sqrt(np.rint(np.square(distance, dtype=np.float64)))
