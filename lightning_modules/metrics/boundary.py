"""How far the outlines of two masks are apart."""

import cv2
import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

__all__ = ["BOUNDARY_SCORES", "boundary_scores"]

# Names of what `boundary_scores` returns.
BOUNDARY_SCORES = ("hd95", "hd95_relative", "assd", "assd_relative", "boundary_f1")


def boundary_scores(prediction: Tensor, mask: Tensor, tolerance: float = 2.0) -> dict[str, Tensor]:
    """Compare the outlines of predicted and true lesions, image by image.

    An outline is the lesion's pixels of which one of the four neighbours is skin or outside the
    image; distances are between the centres of pixels, in pixels.

    - `hd95`: 95th percentile of the distances of one outline's pixels to the other outline, the
      larger of both directions (Huttenlocher et al., 1993; interpolated linearly);
    - `assd`: mean of these distances over the pixels of both outlines;
    - `boundary_f1`: harmonic mean of the shares of either outline that is within `tolerance` of
      the other (Csurka et al., 2013);
    - `hd95_relative`, `assd_relative`: divided by the image's diagonal.

    Where both masks are empty the outlines agree: distances 0, score 1. Where one is, nothing is
    right: distances are the diagonal, the score is 0.

    Args:
        prediction, mask: `(B, 1, H, W)`, lesion where true or above 0.5.
        tolerance: px.

    Returns:
        Each score by name, float64 `(B,)` on the CPU.
    """
    pairs = zip(_lesions(prediction), _lesions(mask), strict=True)
    rows = [_compare(first, second, tolerance) for first, second in pairs]
    diagonal = float(np.hypot(*mask.shape[-2:]))
    hd95, assd, f1 = torch.tensor(rows, dtype=torch.float64).view(-1, 3).unbind(1)
    # Without any outline to be near to, distances are infinite.
    hd95, assd = hd95.clamp(max=diagonal), assd.clamp(max=diagonal)
    values = (hd95, hd95 / diagonal, assd, assd / diagonal, f1)
    return dict(zip(BOUNDARY_SCORES, values, strict=True))


def _lesions(masks: Tensor) -> np.ndarray:
    return (masks[:, 0] > 0.5).to(torch.uint8).cpu().numpy()


def _compare(first: np.ndarray, second: np.ndarray, tolerance: float) -> tuple[float, float, float]:
    outlines = [_outline_points(lesion) for lesion in (first, second)]
    empty = [not len(points) for points in outlines]
    if all(empty):
        return 0.0, 0.0, 1.0
    if any(empty):
        return np.inf, np.inf, 0.0
    # Coordinates are whole numbers, so these distances are exact at any size of the image.
    there, back = (cKDTree(to).query(points)[0] for points, to in (outlines, outlines[::-1]))
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    assd = np.concatenate((there, back)).mean()
    precision, recall = ((apart <= tolerance).mean() for apart in (there, back))
    total = precision + recall
    return float(hd95), float(assd), float(2 * precision * recall / total) if total else 0.0


def _outline_points(lesion: np.ndarray) -> np.ndarray:
    """Return row and column of the pixels of a lesion's outline, `(N, 2)`."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(lesion, cross, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.argwhere(lesion != inner)
