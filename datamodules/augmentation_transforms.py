"""Mathematics of the augmentations of our own: sampling maps, affines and drops.

Sampling maps are those of `cv2.remap`: for each output pixel, the place in the input (in px) that
it is read from.
"""

from functools import lru_cache

import cv2
import numpy as np

__all__ = ["add_drops", "piecewise_affine_map", "rain_drops", "then_affine", "triangle_affine"]

# Light from the upper left: positive where a surface falls towards the lower right.
_RELIEF = np.float32([[-2, -1, 0], [-1, 0, 1], [0, 1, 2]])
_RAIN_COLOUR = np.float32([238, 238, 175])


def piecewise_affine_map(
    shape: tuple[int, int],
    grid: tuple[int, int],
    jitter_std: float,
    generator: np.random.Generator,
    pull: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The random map of albumentations 2.0.8's `PiecewiseAffine`, all pixels at once.

    A regular grid of control points is jittered, and each pixel is read from the mean of the
    jittered points, weighted by the inverse squared distance to their regular places. Without
    jitter this is not the identity: it pulls each pixel towards the centre, by 5 % of the width
    on average. Without `pull`, only the jitter is averaged: its spread over seeds is the same.

    Args:
        shape: height and width in px.
        grid: rows and columns of control points, at least 2 each.
        jitter_std: standard deviation of their jitter in px; jittered points stay in the image.
        generator: source of the jitter.
        pull: as in the library.

    Returns:
        x and y to read from, inside the image, float32 `(H, W)` each.
    """
    points, weights = _control_points(shape, grid)
    limits = np.float32(shape) - 1
    jitter = generator.normal(0, jitter_std, (len(points), 2)).astype(np.float32)
    moved = np.clip(points + jitter, 0, limits)
    # `@` is slower: at this size BLAS starts threads, which crowd those of the data workers.
    places = np.einsum("pi,pn->in", moved if pull else moved - points, weights)
    places = places.reshape(2, *shape)
    if not pull:
        places += np.indices(shape, np.float32)
    map_y, map_x = (np.clip(p, 0, limit) for p, limit in zip(places, limits, strict=True))
    return map_x, map_y


# A training run has one image size: its weights (1 MiB at 128 px) are worth keeping.
@lru_cache(maxsize=4)
def _control_points(shape: tuple[int, int], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Control points `(points, 2)` as (y, x), and their weights `(points, H * W)` at each pixel."""
    ticks = [np.linspace(0, size - 1, count) for size, count in zip(shape, grid, strict=True)]
    points = np.stack(np.meshgrid(*ticks, indexing="ij"), axis=-1).reshape(-1, 2)
    pixels = np.indices(shape).reshape(2, -1)
    closeness = 1 / (((pixels - points[..., None]) ** 2).sum(axis=1) + 1e-8)
    weights = closeness / closeness.sum(axis=0)
    return points.astype(np.float32), weights.astype(np.float32)


def triangle_affine(
    shape: tuple[int, int], reach: float, generator: np.random.Generator
) -> np.ndarray:
    """A random affine, after Simard et al., ICDAR 2003: three points move, the rest follows.

    The points are three corners of a centred square two thirds as wide as the image's shorter
    side. Each moves by up to `reach` px along x and along y, uniformly.

    Returns:
        The 2 x 3 matrix from output to input (x, y) in px.
    """
    height, width = shape
    corners = np.float32([[1, 1], [1, -1], [-1, -1]]) * min(shape) / 3
    corners += np.float32([width, height]) / 2
    moved = corners + generator.uniform(-reach, reach, (3, 2)).astype(np.float32)
    return cv2.getAffineTransform(moved, corners)


def then_affine(
    map_x: np.ndarray, map_y: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The map that reads through `map_x`, `map_y` from an image warped by `matrix` (2 x 3)."""
    place = cv2.transform(np.dstack([map_x, map_y]), matrix)
    return place[..., 0], place[..., 1]


def rain_drops(
    shape: tuple[int, int],
    mean: float,
    std: float,
    gauss_sigma: float,
    cutout_threshold: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """How strongly raindrops show on a wet lens, per pixel.

    A liquid layer is normal noise of `mean` and `std`, blurred by `gauss_sigma` px (which divides
    its `std` by about `3.5 * gauss_sigma`); where it is thinner than `cutout_threshold` the lens
    is dry. A drop shows on the side where the layer deepens towards the lower right, by depth
    times slope. This resembles albumentations 1.3.1 in coverage and darkness, not in shape.

    Returns:
        float32 `(H, W)` from 0 (dry) to 1 (the strongest pixel); all 0 without a drop.
    """
    layer = generator.normal(mean, std, shape).astype(np.float32)
    layer = cv2.GaussianBlur(layer, (0, 0), gauss_sigma, borderType=cv2.BORDER_REPLICATE)
    layer[layer < cutout_threshold] = 0
    slope = cv2.filter2D(layer, -1, _RELIEF, borderType=cv2.BORDER_REPLICATE)
    drops = np.maximum(layer * slope, 0)
    return drops / max(drops.max(), 1e-8)


def add_drops(image: np.ndarray, drops: np.ndarray, intensity: float) -> np.ndarray:
    """Add `intensity` times the colour of rain to a uint8 RGB image; below 0 it darkens.

    Args:
        image: uint8 `(H, W, 3)`.
        drops: float32 `(H, W)`, 0 to 1, as from `rain_drops`.
        intensity: 1 adds the full colour where `drops` is 1.
    """
    rain = intensity * drops[..., None] * _RAIN_COLOUR
    return np.clip(image + rain, 0, 255).astype(np.uint8)
