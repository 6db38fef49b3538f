"""Keys that two files of one photograph share, in whatever dataset and under whatever name."""

import hashlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

__all__ = ["image_keys", "photograph_digest"]

# The archive's number is one photograph in every challenge, at whatever size it was published.
_ARCHIVE_ID = re.compile(r"isic_(\d{7})(?!\d)", re.IGNORECASE)


def photograph_digest(image: np.ndarray) -> str:
    """Return 16 hexadecimal digits that identify the pixels of a photograph.

    Args:
        image: upright, RGB uint8 `(H, W, 3)`, as decoded and not yet resized.
    """
    height, width = image.shape[:2]
    digest = hashlib.blake2b(f"{height}x{width}".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def image_keys(
    ids: Iterable[str], namespace: str | None, digests: Mapping[str, str] | None = None
) -> dict[str, frozenset[str]]:
    """Return the keys of each image; two images are the same if they have a key in common.

    Keys are 16 hexadecimal digits, which do not give a file's name away.

    Args:
        ids: of the images, unique in their dataset.
        namespace: in which an id always is the same photograph, such as a published dataset; none
            for own files, whose names mean nothing elsewhere.
        digests: `photograph_digest` of each image by id, where known.
    """
    keys = {}
    for key in ids:
        found = [digests[key]] if digests else []
        number = _ARCHIVE_ID.match(key.rpartition("/")[2])
        if number:
            found.append(_hashed(f"ISIC archive/{number[1]}"))
        elif namespace is not None:
            found.append(_hashed(f"{namespace}/{key}"))
        keys[key] = frozenset(found)
    return keys


def _hashed(name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
