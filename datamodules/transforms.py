"""Resizing and normalising of photographs and masks.

Arrays are uint8, height x width (x channels), until `normalise`: augmentation works on those.
"""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F

from common.geometry import Box, fitted

__all__ = [
    "ANTIALIAS",
    "NORMALIZATIONS",
    "normalise",
    "resize_image",
    "resize_mask",
    "stretch_to_uint8",
]

ANTIALIAS = (True, False, "pillow")
NORMALIZATIONS = ("minmax", "reference", "imagenet")
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def resize_image(
    image: np.ndarray, size: int, antialias: bool | str, letterbox: bool = False
) -> np.ndarray:
    """Make an RGB uint8 image `(H, W, 3)` square, `(size, size, 3)`, bilinear.

    Args:
        image: RGB uint8.
        size: side in pixels.
        antialias: whether shrinking low-passes; `pillow` has Pillow do it, which rounds otherwise,
            by a grey level here and there; without, the pixels are those of torchvision 0.15,
            which the references pin.
        letterbox: keep the proportions and fill the rest with the mean colour; otherwise the image
            is squashed.
    """
    box = fitted(image.shape[:2], size, letterbox)
    if antialias == "pillow":
        resized = _pillow_resize(image, box)
    else:
        tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
        bilinear = F.InterpolationMode.BILINEAR
        resized = F.resize(tensor, [box.height, box.width], bilinear, antialias=antialias)
        resized = resized.permute(1, 2, 0).contiguous().numpy()
    if not letterbox:
        return resized
    square = np.empty((size, size, 3), dtype=np.uint8)
    square[:] = image.mean(axis=(0, 1)).round()
    square[box.rows, box.columns] = resized
    return square


def resize_mask(
    mask: np.ndarray, size: int, letterbox: bool = False, soft: bool = False
) -> np.ndarray:
    """Make a mask square as `resize_image` does, with skin around it.

    Args:
        mask: uint8 `(H, W)` of {0, 1}.
        size: side in pixels.
        letterbox: as in `resize_image`.
        soft: bilinear and low-passed when shrunk, as Pillow does it, with grey edges; otherwise by
            nearest neighbours.

    Returns:
        uint8 `(size, size)` of {0, 1}, or with `soft` from 0 to 255.
    """
    box = fitted(mask.shape, size, letterbox)
    if soft:
        inside = _pillow_resize(mask * np.uint8(255), box)
    else:
        tensor = torch.from_numpy(mask.copy())[None]
        nearest = F.InterpolationMode.NEAREST
        inside = F.resize(tensor, [box.height, box.width], nearest)[0].numpy()
    square = np.zeros((size, size), dtype=mask.dtype)
    square[box.rows, box.columns] = inside
    return square


def _pillow_resize(values: np.ndarray, box: Box) -> np.ndarray:
    picture = Image.fromarray(values)
    return np.asarray(picture.resize((box.width, box.height), Image.Resampling.BILINEAR))


def stretch_to_uint8(image: np.ndarray) -> np.ndarray:
    """Stretch an image over the full range, jointly over channels, and truncate to uint8.

    This is the range in which the reference augments.
    """
    return (_minmax(image.astype(np.float32), axis=None) * 255).astype(np.uint8)


def normalise(image: np.ndarray, normalization: str, train: bool) -> torch.Tensor:
    """Turn an RGB uint8 image `(H, W, 3)` into the network's input, float32 `(3, H, W)`.

    Args:
        image: RGB uint8.
        normalization: `minmax` stretches to [0, 1] jointly over channels; `reference` does so too,
            except that training images are stretched channel by channel, as in the published code;
            `imagenet` subtracts the mean and divides by the deviation of ImageNet; `none` keeps the
            grey levels from 0 to 255, for networks that normalise by themselves.
        train: whether this is a training image.

    A constant image becomes 0.5 under `minmax` and `reference`.
    """
    values = image.astype(np.float32)
    if normalization == "none":
        pass
    elif normalization == "imagenet":
        values = (values / 255 - IMAGENET_MEAN) / IMAGENET_STD
    else:
        if normalization == "reference" and train:
            values = _minmax(values, axis=(0, 1))
        values = _minmax(values, axis=None)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _minmax(values: np.ndarray, axis: tuple[int, ...] | None) -> np.ndarray:
    low = values.min(axis=axis, keepdims=True)
    spread = values.max(axis=axis, keepdims=True) - low
    stretched = (values - low) / np.where(spread > 0, spread, 1)
    return np.where(spread > 0, stretched, np.float32(0.5))
