"""Decoded, resized samples in memory-mapped arrays, shared by workers and processes."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from rich.progress import track

from common.errors import UserError
from common.files import atomic_folder
from datamodules.identity import photograph_digest
from datamodules.transforms import SOFT_MASKS, resize_image, resize_mask

__all__ = ["Sample", "SampleCache", "open_cache"]

# Raise this when decoding or resizing changes, so that older caches are not used.
CACHE_VERSION = 2


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

    def exists(self) -> bool:
        """Tell whether it has been built; what has been begun has another name."""
        return (self.folder / "meta.json").is_file()

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
    size, antialias, letterbox, mask resizing, version), so a stale cache is never read.

    Args:
        samples: in the order of the arrays.
        root: where caches live.
        name: the dataset, for the folder's name.
        image_size: side of the square arrays in pixels.
        antialias, letterbox: as in `resize_image`.
        mask_resize: as `how` in `resize_mask`.

    Raises:
        UserError: a sample cannot be loaded, or the folder is not writable.
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
    if cache.exists():
        return cache
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = root / f".{folder.name}.lock"
        # Of several processes one builds and the others wait.
        with FileLock(lock):
            try:
                if not cache.exists():
                    with atomic_folder(folder) as temporary:
                        resizing = (image_size, antialias, letterbox, mask_resize)
                        _build(samples, temporary, name, *resizing)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {root} cannot be written ({error.strerror}); set paths.cache to one "
            "that can, with room for the decoded images."
        ) from error
    return cache


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
    images = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(count, size, size, 3)
    )
    masks = np.lib.format.open_memmap(
        folder / "masks.npy", mode="w+", dtype=np.uint8, shape=(count, size, size)
    )
    sizes = np.zeros((count, 2), dtype=np.int64)
    digests = np.zeros(count, dtype="U16")
    covered = np.full(count, np.nan)

    # Decoding JPEGs at reduced size would save time and give other pixels, by up to 78 grey levels.
    def decode(index: int) -> None:
        image, mask = samples[index].load()
        images[index] = resize_image(image, size, antialias, letterbox)
        sizes[index] = image.shape[:2]
        digests[index] = photograph_digest(image)
        if mask is not None:
            masks[index] = resize_mask(mask, size, letterbox, mask_resize)
            covered[index] = _lesion(masks[index], mask_resize in SOFT_MASKS).mean()

    with ThreadPoolExecutor() as pool:
        for _ in track(pool.map(decode, range(count)), f"Caching {name} at {size} px", count):
            pass
    images.flush()
    masks.flush()
    np.save(folder / "sizes.npy", sizes)
    np.save(folder / "digests.npy", digests)
    meta = {
        "count": count,
        "empty_masks": int((covered == 0).sum()),
        "full_masks": int((covered == 1).sum()),
        "mask_resize": mask_resize,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _lesion(masks: np.ndarray, soft: bool) -> np.ndarray:
    return (masks > 127).astype(np.uint8) if soft else masks
