"""Distance of every pixel to the edge of a mask."""

from typing import TypeVar

import cv2
import numpy as np
import torch

from common.errors import UserError

__all__ = ["edge_distance"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def edge_distance(mask: Array) -> Array:
    """Euclidean distance in pixels from each pixel to the nearest edge pixel of a mask.

    Edge pixels are those that a Canny detector finds on the {0, 1} image with both thresholds 0,
    as in the published code; a lesion cut by the image border has no edge along the border.

    Args:
        mask: `(H, W)` or `(1, H, W)`, lesion where above 0.5, array or tensor of any number type.

    Returns:
        float32 of the same kind and shape; zeros where the mask has no edge (empty or full).

    Raises:
        UserError: another shape.
    """
    values = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[0] != 1):
        raise UserError(f"edge_distance expects (H, W) or (1, H, W), not {values.shape}.")
    lesion = np.ascontiguousarray(values.reshape(values.shape[-2:]) > 0.5, dtype=np.uint8)
    edges = cv2.Canny(lesion, 0, 0)
    if edges.any():
        distance = cv2.distanceTransform(255 - edges, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # OpenCV's last bit depends on where the array lies in memory; squares are whole numbers.
        distance = np.sqrt(np.rint(np.square(distance, dtype=np.float64))).astype(np.float32)
    else:
        distance = np.zeros(lesion.shape, dtype=np.float32)
    distance = distance.reshape(values.shape)
    if isinstance(mask, torch.Tensor):
        return torch.from_numpy(distance).to(mask.device)
    return distance
