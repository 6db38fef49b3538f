"""Resizing and normalising of photographs and masks.

Arrays are uint8, height x width (x channels), until `normalise`: augmentation works on those.
"""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F

from common.geometry import fitted, interpolation_weights

__all__ = [
    "ANTIALIAS",
    "MASK_RESIZE",
    "NORMALIZATIONS",
    "SOFT_MASKS",
    "normalise",
    "resize_image",
    "resize_mask",
    "stretch_to_uint8",
]

ANTIALIAS = (True, False, "pillow")
MASK_RESIZE = ("area", "soft", "published", "pillow")
# Those that leave grey edges.
SOFT_MASKS = ("soft", "pillow")
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
        letterbox: keep the proportions, to a fraction of a pixel, and fill the rest with the mean
            colour; otherwise the image is squashed.
    """
    if letterbox:
        return _letterboxed(image, size, bool(antialias))
    if antialias == "pillow":
        return _pillow_resize(image, size)
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    bilinear = F.InterpolationMode.BILINEAR
    resized = F.resize(tensor, [size, size], bilinear, antialias=antialias)
    return resized.permute(1, 2, 0).contiguous().numpy()


def _letterboxed(image: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    height, width = image.shape[:2]
    box, span = fitted((height, width), size, letterbox=True), max(height, width)
    weights, covered = [], []
    for length, start in ((height, box.top), (width, box.left)):
        step = span / size
        part = interpolation_weights(length, size, -start * step, step, lowpass=antialias)
        weights.append(part.astype(np.float32))
        covered.append(_overlaps(length, size, span).sum(1) / (2 * span))
    rows = weights[0] @ image.reshape(height, -1).astype(np.float32)
    inside = weights[1] @ rows.reshape(size, width, 3)
    share = np.outer(*covered)[..., None]
    square = share * inside + (1 - share) * image.mean(axis=(0, 1))
    return (square + 0.5).clip(0, 255).astype(np.uint8)


def resize_mask(
    mask: np.ndarray, size: int, letterbox: bool = False, how: str = "area"
) -> np.ndarray:
    """Make a mask square as `resize_image` does an image, with skin around it.

    Args:
        mask: uint8 `(H, W)` of {0, 1}.
        size: side in pixels.
        letterbox: as in `resize_image`; only `area` and `soft` can.
        how: `area` makes a pixel lesion where lesion covers at least half of it; `soft` keeps that
            share; `published` takes the upper left neighbour, which moves a mask down and right by
            up to half a pixel of the square, as DermoSegDiff and EFKD; `pillow` is Pillow's
            bilinear shrinking with grey edges, as the DeepLabV3+ distillation.

    Returns:
        uint8 `(size, size)` of {0, 1}, or where `how` is in `SOFT_MASKS` from 0 to 255.
    """
    if how == "pillow":
        return _pillow_resize(mask * np.uint8(255), size)
    if how == "published":
        tensor = torch.from_numpy(mask.copy())[None]
        return F.resize(tensor, [size, size], F.InterpolationMode.NEAREST)[0].numpy()
    spans = (max(mask.shape),) * 2 if letterbox else mask.shape
    rows, columns = (
        _overlaps(length, size, span) for length, span in zip(mask.shape, spans, strict=True)
    )
    # Whole numbers below 2^53, so that ties are the same whichever way an image is turned.
    covered = rows @ mask.astype(np.float64) @ columns.T
    whole = 4.0 * spans[0] * spans[1]
    if how == "soft":
        return np.floor(covered * 255 / whole + 0.5).astype(np.uint8)
    return (2 * covered >= whole).astype(np.uint8)


def _overlaps(length: int, cells: int, span: int) -> np.ndarray:
    """Return how much of each cell each pixel covers, float64 `(cells, length)`.

    The pixels lie in the middle of `span`, which the cells divide. The unit is such that all are
    whole numbers: a pixel has `2 * cells`, a cell `2 * span`.
    """
    pixels = cells * (span - length) + 2 * cells * np.arange(length + 1)
    borders = 2 * span * np.arange(cells + 1)
    first = np.maximum(borders[:-1, None], pixels[:-1])
    last = np.minimum(borders[1:, None], pixels[1:])
    return (last - first).clip(0).astype(np.float64)


def _pillow_resize(values: np.ndarray, size: int) -> np.ndarray:
    picture = Image.fromarray(values)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


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
