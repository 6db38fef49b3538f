"""Pictures of masks on photographs."""

import cv2
import numpy as np

__all__ = [
    "PREDICTION_COLOUR",
    "TRUTH_COLOUR",
    "draw_contour",
    "draw_outlines",
    "enlarge",
    "stretch",
    "tile",
]

TRUTH_COLOUR = (0, 220, 0)
PREDICTION_COLOUR = (30, 110, 255)


def draw_contour(
    image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], thickness: int = 1
) -> np.ndarray:
    """Return a copy of an RGB uint8 image `(H, W, 3)` with the outline of a mask `(H, W)`."""
    contours, _ = cv2.findContours(
        np.ascontiguousarray(mask, dtype=np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
    )
    return cv2.drawContours(image.copy(), contours, -1, colour, thickness)


def draw_outlines(photo: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return a photograph as in `draw_contour` with both outlines, truth green, prediction blue."""
    return draw_contour(draw_contour(photo, truth, TRUTH_COLOUR), predicted, PREDICTION_COLOUR)


def enlarge(values: np.ndarray, side: int) -> np.ndarray:
    """Repeat the pixels of a small uint8 picture until its height is about `side`.

    Otherwise a contour of one pixel would hide what it outlines.
    """
    scale = max(1, side // values.shape[0])
    size = (values.shape[1] * scale, values.shape[0] * scale)
    return cv2.resize(values, size, interpolation=cv2.INTER_NEAREST)


def stretch(image: np.ndarray) -> np.ndarray:
    """Return an image `(3, H, W)` of any range as an RGB uint8 picture `(H, W, 3)`."""
    photo = image.transpose(1, 2, 0)
    photo = (photo - photo.min()) / max(float(photo.max() - photo.min()), 1e-6)
    return (photo * 255).astype(np.uint8)


def tile(rows: list[list[np.ndarray]], gap: int = 2) -> np.ndarray:
    """Put RGB uint8 images of one size on a white grid, row by row."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (height + gap), c * (width + gap)
            sheet[top : top + height, left : left + width] = image
    return sheet
