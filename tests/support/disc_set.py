"""Photographs of dark discs with their masks, for tests of files and folders."""

from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def write_discs(
    root: Path,
    count: int = 4,
    size: tuple[int, int] = (64, 48),
    images: str = "images",
    masks: str = "masks",
    orientation: int = 1,
    names: list[str] | None = None,
    mask_suffix: str = "",
) -> list[str]:
    """Write JPEG photographs and PNG masks, and return their names.

    Args:
        root: holds the folders `images` and `masks`.
        count: how many.
        size: width and height in px as stored.
        images, masks: folders of photographs and of masks, which follow the stored pixels.
        orientation: the photographs' EXIF orientation.
        names: of the photographs, without suffix; they may have folders.
        mask_suffix: what follows a name in that of its mask.
    """
    names = names or [f"disc_{index:02d}" for index in range(count)]
    for index, name in enumerate(names):
        rng = np.random.default_rng(index)
        photograph, mask = disc(size, rng)
        path = root / images / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(photograph)
        exif = picture.getexif()
        if orientation != 1:
            exif[ORIENTATION] = orientation
        picture.save(path, quality=95, exif=exif)
        path = root / masks / f"{name}{mask_suffix}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask * 255).save(path)
    return names


def disc(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an RGB photograph of a dark disc on skin and its mask of {0, 1}."""
    width, height = size
    radius = max(size) / 5
    y, x = np.mgrid[:height, :width]
    middle = rng.uniform(0.35, 0.65, 2) * size
    mask = (np.hypot(x - middle[0], y - middle[1]) < radius).astype(np.uint8)
    skin, lesion = np.array([210, 160, 140]), np.array([90, 60, 50])
    photograph = np.where(mask[..., None] == 1, lesion, skin) + rng.normal(0, 4, (height, width, 3))
    return photograph.clip(0, 255).astype(np.uint8), mask
