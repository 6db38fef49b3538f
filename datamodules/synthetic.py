"""Made-up dermoscopy with exact masks: the default data, which needs no download.

Each photograph has a skin tone with texture and uneven light, dark corners, hairs and gel bubbles
that distract, and one lesion of low contrast, irregular outline, several colours and a soft border.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from common.errors import UserError
from datamodules.files import Listing
from datamodules.segmentation import SegmentationDataModule

__all__ = ["Synthetic", "synthesise_lesion"]

HEIGHT, WIDTH = 144, 192
SKIN_TONES = np.array(
    [[236, 196, 178], [224, 172, 150], [205, 150, 125], [176, 124, 98], [140, 96, 76]], np.float32
)
LESION_TINTS = np.array(
    [[0.62, 0.45, 0.40], [0.75, 0.55, 0.50], [0.55, 0.50, 0.55], [0.85, 0.55, 0.55]], np.float32
)


class Synthetic(SegmentationDataModule):
    """Deterministic synthetic images, made once and cached like any other dataset.

    Args:
        num_samples: images to make; 70 % train, 10 % val, 20 % test in the reference's proportions.
        content_seed: which images are made, apart from `seed`, so that a sweep over seeds keeps
            its data.
        arguments, settings: everything that `SegmentationDataModule` takes; `root` must be none.

    Raises:
        UserError: a `root` is given.
    """

    name = "synthetic"
    reference_split = (7, 1, 2)

    @property
    def hint(self) -> str:
        """What to do when the data is not there."""
        return "it is made up as it is needed."

    def __init__(
        self, *arguments: Any, num_samples: int = 640, content_seed: int = 0, **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        root = settings.get("root", next(iter(arguments[3:]), None))
        if root is not None:
            raise UserError(
                f"datamodule.root={root} has no effect on data that is made up; add "
                "datamodule=folder or datamodule=folder_diagnosis to use that folder."
            )
        self.num_samples = num_samples
        self.content_seed = content_seed

    def list_files(self) -> Listing:
        numbers = range(self.num_samples)
        return Listing([SyntheticSample(self.content_seed, number) for number in numbers])


@dataclass(frozen=True)
class SyntheticSample:
    """One made-up image, a function of its two numbers."""

    seed: int
    index: int
    part = None
    group = None
    labelled = True

    @property
    def id(self) -> str:
        return f"synthetic_{self.index:06d}"

    def fingerprint(self) -> list[Any]:
        return [self.seed, self.index, HEIGHT, WIDTH]

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        return synthesise_lesion(self.seed, self.index)


def synthesise_lesion(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Make one image and its mask.

    Returns:
        RGB uint8 `(144, 192, 3)` and the uint8 mask `(144, 192)` of {0, 1}, lesion = 1.
    """
    rng = np.random.default_rng([seed, index])
    image = _skin(rng)
    inside, mask = _outline(rng)
    image = _paint_lesion(rng, image, inside)
    image = _light(rng, image)
    _draw_hairs(rng, image)
    _draw_bubbles(rng, image)
    image += rng.normal(0, 3, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def _smooth_noise(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Random field `(H, W)` of zero mean and unit deviation, smooth over `scale` pixels."""
    noise = cv2.GaussianBlur(rng.standard_normal((HEIGHT, WIDTH)).astype(np.float32), (0, 0), scale)
    return (noise - noise.mean()) / noise.std()


def _skin(rng: np.random.Generator) -> np.ndarray:
    position = rng.uniform(0, len(SKIN_TONES) - 1)
    low = int(position)
    tone = SKIN_TONES[low] + (position - low) * (SKIN_TONES[min(low + 1, 4)] - SKIN_TONES[low])
    texture = 5 * _smooth_noise(rng, 25) + 3 * _smooth_noise(rng, 6) + 2 * _smooth_noise(rng, 1.5)
    redness = 5 * _smooth_noise(rng, 18)
    return tone + texture[..., None] + redness[..., None] * np.array([1, -0.5, -0.5], np.float32)


def _outline(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the lesion's soft opacity and its exact mask, both `(H, W)`."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    radius = HEIGHT * rng.uniform(0.16, 0.42)
    centre_y = HEIGHT * rng.uniform(0.40, 0.60)
    centre_x = WIDTH * rng.uniform(0.40, 0.60)
    stretch, tilt = rng.uniform(0.75, 1.3), rng.uniform(0, np.pi)
    dy, dx = y - centre_y, x - centre_x
    along = (dx * np.cos(tilt) + dy * np.sin(tilt)) / stretch
    across = (dy * np.cos(tilt) - dx * np.sin(tilt)) * stretch
    angle = np.arctan2(across, along)
    outline = np.full_like(angle, radius)
    for frequency in range(2, 8):
        amplitude = radius * rng.normal(0, 0.16 / frequency)
        outline += amplitude * np.cos(frequency * angle + rng.uniform(0, 2 * np.pi))
    depth = outline - np.hypot(along, across)
    softness = rng.uniform(0.8, 2.5)
    opacity = 1 / (1 + np.exp(-(depth / softness).clip(-30, 30)))
    return opacity, (depth > 0).astype(np.uint8)


def _paint_lesion(rng: np.random.Generator, image: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    first, second = LESION_TINTS[rng.choice(len(LESION_TINTS), 2, replace=False)]
    blend = 1 / (1 + np.exp(-2 * _smooth_noise(rng, 14)))[..., None]
    tint = first * blend + second * (1 - blend)
    contrast = rng.uniform(0.45, 0.85)
    pattern = 1 + 0.06 * _smooth_noise(rng, 3)[..., None]
    lesion = image * (1 - contrast * (1 - tint)) * pattern
    return image + opacity[..., None] * (lesion - image)


def _light(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Uneven light and the dark corners of a dermatoscope's round field of view."""
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    direction = rng.uniform(0, 2 * np.pi)
    slope = 1 + rng.uniform(0, 0.18) * (np.cos(direction) * x + np.sin(direction) * y)
    distance = np.hypot(x - rng.uniform(-0.1, 0.1), y - rng.uniform(-0.1, 0.1))
    start, strength = rng.uniform(0.9, 1.3), rng.uniform(0.2, 0.9)
    corners = 1 - strength / (1 + np.exp(-(distance - start) / rng.uniform(0.03, 0.12)))
    return image * (slope * corners)[..., None]


def _draw_hairs(rng: np.random.Generator, image: np.ndarray) -> None:
    for _ in range(rng.integers(0, 10)):
        start, middle, end = rng.uniform(-0.1, 1.1, (3, 2)) * [WIDTH, HEIGHT]
        middle = (start + end) / 2 + (middle - (start + end) / 2) * 0.4
        s = np.linspace(0, 1, 24)[:, None]
        curve = (1 - s) ** 2 * start + 2 * s * (1 - s) * middle + s**2 * end
        stroke = np.zeros((HEIGHT, WIDTH), np.uint8)
        thickness = int(rng.integers(1, 3))
        points = (curve * 16).round().astype(np.int32)
        cv2.polylines(stroke, [points], False, 255, thickness, cv2.LINE_AA, shift=4)
        opacity = stroke[..., None].astype(np.float32) / 255 * rng.uniform(0.5, 0.9)
        image += opacity * (rng.uniform(20, 60) - image)


def _draw_bubbles(rng: np.random.Generator, image: np.ndarray) -> None:
    for _ in range(rng.integers(0, 4)):
        centre = (int(rng.integers(0, WIDTH)), int(rng.integers(0, HEIGHT)))
        ring = np.zeros((HEIGHT, WIDTH), np.uint8)
        cv2.circle(ring, centre, int(rng.integers(3, 9)), 255, 1, cv2.LINE_AA)
        image += ring[..., None].astype(np.float32) / 255 * 0.4 * (240 - image)
