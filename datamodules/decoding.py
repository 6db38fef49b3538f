"""Decoding of photographs and masks."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from datamodules.problems import BadFileError

__all__ = ["read_image", "read_mask"]


def read_image(path: Path) -> np.ndarray:
    """Decode a photograph to RGB uint8 `(H, W, 3)`, turned upright by its EXIF orientation.

    Grey, CMYK and palette images become RGB; transparency is dropped; of 16 bits the upper 8 stay.

    Raises:
        BadFileError: the file cannot be decoded.
    """
    values = _decode(path)
    if isinstance(values, np.ndarray):
        levels = max(np.iinfo(np.uint16).max, float(values.max(initial=0))) + 1
        grey = (values.clip(0) / levels * 256).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(values.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """Decode a mask to uint8 `(H, W)` of {0, 1}, lesion = 1.

    Raises:
        BadFileError: the file cannot be decoded or has other values than 0 and 1, 255 or 65535.
    """
    values = _decode(path)
    if not isinstance(values, np.ndarray):
        values = np.asarray(values.convert("L"))
    present = np.unique(values)
    if not any(np.isin(present, (0, lesion)).all() for lesion in (1, 255, 65535)):
        raise BadFileError(
            "mask with grey levels",
            path,
            f"The mask {path} has {len(present)} grey levels; a mask holds 0 for skin and 255 (or "
            "1) for lesion. Save it without lossy compression or smoothing.",
        )
    return (values > 0).astype(np.uint8)


def _decode(path: Path) -> Image.Image | np.ndarray:
    """Return an image upright; as numbers where it has more than 8 bits a channel."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            upright.load()
            deep = upright.mode.startswith(("I", "F"))
            return np.asarray(upright) if deep else upright
    except Exception as error:
        # Damaged bytes can make a decoder fail in any way, such as by a SyntaxError.
        raise BadFileError(
            "undecodable file",
            path,
            f"The image {path} cannot be decoded ({error}); replace it by an intact copy.",
        ) from error
