"""Decoded, resized samples in memory-mapped arrays, shared by workers and processes."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from rich.filesize import decimal
from rich.progress import track

from common.arrays import ArrayWriter, array_bytes, is_whole_array
from common.errors import UserError
from common.files import atomic_folder, refuse_full, remove_folder
from datamodules.identity import photograph_digest
from datamodules.transforms import SOFT_MASKS, resize_image, resize_mask

__all__ = ["Sample", "SampleCache", "open_cache"]

# Raise this when decoding or resizing changes, so that older caches are not used.
CACHE_VERSION = 2
# Numbers of masks in `meta.json`.
_COUNTED = ("empty_masks", "full_masks")


class Sample(Protocol):
    """One image with what is known of it, wherever it comes from."""

    id: str
    # Where the publisher has it: train, val or test.
    part: str | None
    # Images of one lesion or patient share it.
    group: str | None

    def fingerprint(self) -> list[Any]:
        """Plain values that change whenever the decoded content may change."""

    def load(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the RGB uint8 image `(H, W, 3)`, and the {0, 1} uint8 mask `(H, W)` or none."""


@dataclass(frozen=True)
class SampleCache:
    """Arrays of one dataset at one size; opened on first use in every process.

    Attributes:
        folder: holds `images.npy` uint8 `(N, S, S, 3)`, `masks.npy` uint8 `(N, S, S)` of {0, 1},
            or where they are `soft` from 0 to 255, `sizes.npy` int64 `(N, 2)` (height, width of the
            originals), `digests.npy` `(N,)` (`photograph_digest` of the originals) and
            `meta.json`. Masks that are not known are zeros.
    """

    folder: Path

    def is_whole(self, count: int, image_size: int, mask_resize: str) -> bool:
        """Return whether all files are there with the contents of such a cache.

        Of arrays, header and size are compared; what has been begun has another name.

        Args:
            count: of samples.
            image_size: side of the square arrays in pixels.
            mask_resize: as `how` in `resize_mask`.
        """
        path = self.folder / "meta.json"
        try:
            meta = json.loads(path.read_text()) if path.is_file() else None
        except (OSError, ValueError, RecursionError):
            return False
        known = {"count": count, "mask_resize": mask_resize}
        return (
            isinstance(meta, dict)
            and meta.keys() == {*known, *_COUNTED}
            and all(meta[key] == value for key, value in known.items())
            and all(type(meta[key]) is int and 0 <= meta[key] <= count for key in _COUNTED)
            and all(
                is_whole_array(self.folder / f"{name}.npy", *kind)
                for name, kind in _arrays(count, image_size).items()
            )
        )

    @cached_property
    def images(self) -> np.ndarray:
        return np.load(self.folder / "images.npy", mmap_mode="r")

    @cached_property
    def masks(self) -> np.ndarray:
        return np.load(self.folder / "masks.npy", mmap_mode="r")

    @property
    def soft(self) -> bool:
        """Whether the masks have grey edges."""
        return self.meta["mask_resize"] in SOFT_MASKS

    def lesions(self, rows: Sequence[int]) -> np.ndarray:
        """Return masks of these rows as uint8 of {0, 1}, lesion where above one half."""
        return _lesion(self.masks[rows], self.soft)

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.load(self.folder / "sizes.npy")

    @cached_property
    def digests(self) -> np.ndarray:
        return np.load(self.folder / "digests.npy")

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        # A pickled memory map would carry the whole dataset to every worker.
        return type(self), (self.folder,)


def open_cache(
    samples: Sequence[Sample],
    root: Path,
    name: str,
    image_size: int,
    antialias: bool | str,
    letterbox: bool = False,
    mask_resize: str = "area",
) -> SampleCache:
    """Return the cache of these samples at this size, built first if there is none.

    The folder's name carries a digest of everything that shapes the arrays (ids, fingerprints,
    size, antialias, letterbox, mask resizing, version), so a stale cache is never read. A damaged
    one is built again.

    Args:
        samples: in the order of the arrays.
        root: where caches live.
        name: the dataset, for the folder's name.
        image_size: side of the square arrays in pixels.
        antialias, letterbox: as in `resize_image`.
        mask_resize: as `how` in `resize_mask`.

    Raises:
        UserError: a sample cannot be loaded, the folder is not writable, or its disk has no room.
    """
    shape = [
        CACHE_VERSION,
        image_size,
        antialias,
        letterbox,
        mask_resize,
        [[s.id, *s.fingerprint()] for s in samples],
    ]
    digest = hashlib.sha256(json.dumps(shape).encode()).hexdigest()
    folder = root / f"{name}-{image_size}px-{digest[:16]}"
    cache = SampleCache(folder)
    expected = (len(samples), image_size, mask_resize)
    if cache.is_whole(*expected):
        return cache
    needed = _needed_bytes(samples, image_size)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = root / f".{folder.name}.lock"
        # Of several processes one builds and the others wait.
        with FileLock(lock):
            try:
                if not cache.is_whole(*expected):
                    remove_folder(folder)
                    refuse_full(root, needed, "the decoded images", "paths.cache")
                    with atomic_folder(folder) as temporary:
                        resizing = (image_size, antialias, letterbox, mask_resize)
                        _build(samples, temporary, name, *resizing)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {root} cannot be written ({error.strerror}); set paths.cache to one "
            f"that can, with {decimal(needed)} free for the decoded images."
        ) from error
    return cache


def _arrays(count: int, size: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of the arrays of a cache."""
    return {
        "images": ((count, size, size, 3), "uint8"),
        "masks": ((count, size, size), "uint8"),
        "sizes": ((count, 2), "int64"),
        "digests": ((count,), "U16"),
    }


def _needed_bytes(samples: Sequence[Sample], size: int) -> int:
    """Return the room that a cache takes; masks that are not known take none."""
    unknown = sum(not getattr(sample, "labelled", True) for sample in samples)
    arrays = _arrays(len(samples), size).values()
    return sum(array_bytes(*kind) for kind in arrays) - unknown * size**2


def _build(
    samples: Sequence[Sample],
    folder: Path,
    name: str,
    size: int,
    antialias: bool | str,
    letterbox: bool,
    mask_resize: str,
) -> None:
    count = len(samples)
    covered = np.full(count, np.nan)

    # Decoding JPEGs at reduced size would save time and give other pixels, by up to 78 grey levels.
    def decode(index: int) -> None:
        image, mask = samples[index].load()
        arrays["images"][index] = resize_image(image, size, antialias, letterbox)
        arrays["sizes"][index] = image.shape[:2]
        arrays["digests"][index] = photograph_digest(image)
        if mask is not None:
            resized = resize_mask(mask, size, letterbox, mask_resize)
            arrays["masks"][index] = resized
            covered[index] = _lesion(resized, mask_resize in SOFT_MASKS).mean()

    with ExitStack() as stack:
        arrays = {
            key: stack.enter_context(ArrayWriter(folder / f"{key}.npy", *kind))
            for key, kind in _arrays(count, size).items()
        }
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(decode, range(count))
            for _ in track(decoded, f"Caching {name} at {size} px", count):
                pass
    meta = {
        "count": count,
        "empty_masks": int((covered == 0).sum()),
        "full_masks": int((covered == 1).sum()),
        "mask_resize": mask_resize,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _lesion(masks: np.ndarray, soft: bool) -> np.ndarray:
    return (masks > 127).astype(np.uint8) if soft else masks
