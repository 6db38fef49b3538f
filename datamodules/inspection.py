"""Looking at every file of a dataset: what is wrong, what is suspicious, what is there twice."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from common.pictures import TRUTH_COLOUR, draw_contour
from datamodules.cache import Sample
from datamodules.decoding import is_transparent
from datamodules.files import FileSample
from datamodules.problems import BadFileError, Problem

__all__ = ["Inspection", "inspect_samples", "near_duplicates", "same_files"]

SIGNATURE_SIDE = 32
THUMBNAIL_SIDE = 128
# In HAM10000 and ISIC 2018, copies at half the size and JPEG quality 70 are at least 0.945 alike,
# photographs of different lesions at most 0.925.
SIMILARITY = 0.93


@dataclass
class Inspection:
    """What a look at one sample has found.

    Attributes:
        sample: the sample.
        size: height and width in px, None where the image cannot be decoded.
        covered: share of the image that the mask covers, None without one.
        digest: SHA-256 of the image file, or of the pixels of a sample without files.
        signature: unit vector of the image's coarse structure; similar images have a scalar
            product near 1.
        thumbnail: small JPEG picture with the mask's outline.
        problems: what stops a training.
        remarks: what may be right but is worth a look.
    """

    sample: Sample
    size: tuple[int, int] | None = None
    covered: float | None = None
    digest: str | None = None
    signature: np.ndarray | None = None
    thumbnail: bytes | None = None
    problems: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)

    @property
    def files(self) -> tuple[Path, ...]:
        """The image file and its masks; the id of a sample without files, such as a made-up one."""
        if isinstance(self.sample, FileSample):
            return (self.sample.image, *self.sample.masks)
        return (Path(self.sample.id),)


def inspect_samples(samples: Sequence[Sample]) -> Iterator[Inspection]:
    """Decode samples in parallel and yield what was found, in their order."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(_inspect, samples)


def _inspect(sample: Sample) -> Inspection:
    found = Inspection(sample)
    content = b""
    try:
        image, mask = sample.load()
        if isinstance(sample, FileSample):
            content = sample.image.read_bytes()
            if is_transparent(sample.image):
                message = f"The image {sample.image} has transparent pixels, read as white."
                found.remarks.append(Problem("transparent image", sample.image, message))
    except BadFileError as error:
        found.problems.append(error.problem)
        return found
    found.size = image.shape[:2]
    found.digest = hashlib.sha256(content or image.tobytes()).hexdigest()
    found.signature = _signature(image)
    if mask is not None:
        found.covered = float(mask.mean())
        extreme = {0.0: "empty mask", 1.0: "full mask"}.get(found.covered)
        if extreme:
            path = found.files[:2][-1]
            found.remarks.append(
                Problem(extreme, path, f"The mask {path} is {extreme.split()[0]}; look at it.")
            )
    found.thumbnail = _thumbnail(image, mask)
    return found


def _signature(image: np.ndarray) -> np.ndarray:
    side = (SIGNATURE_SIDE, SIGNATURE_SIDE)
    grey = cv2.cvtColor(cv2.resize(image, side, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    grey = grey.astype(np.float32)
    # Dark corners and a dark centre are common to many photographs.
    detail = (grey - cv2.GaussianBlur(grey, (0, 0), SIGNATURE_SIDE / 16)).ravel()
    length = float(np.linalg.norm(detail))
    return detail / length if length > 0 else detail


def _thumbnail(image: np.ndarray, mask: np.ndarray | None) -> bytes:
    scale = THUMBNAIL_SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if mask is not None:
        outline = cv2.resize(mask * 255, size, interpolation=cv2.INTER_AREA) > 127
        small = draw_contour(small, outline, TRUTH_COLOUR)
    file = io.BytesIO()
    Image.fromarray(small).save(file, format="JPEG", quality=85)
    return file.getvalue()


def same_files(inspections: Sequence[Inspection]) -> list[list[int]]:
    """Return groups of samples whose image files are byte for byte the same.

    Samples that share one file, such as those of several annotators, are one.
    """
    groups: dict[str, dict[Path, int]] = {}
    for index, found in enumerate(inspections):
        if found.digest is not None:
            groups.setdefault(found.digest, {}).setdefault(found.files[0], index)
    return [sorted(group.values()) for group in groups.values() if len(group) > 1]


def near_duplicates(
    inspections: Sequence[Inspection], similarity: float = SIMILARITY, block: int = 1024
) -> list[tuple[int, int, float]]:
    """Return pairs of samples that look like copies of one photograph, most similar first.

    Pairs of one file, or of the same bytes, are left out.

    Args:
        inspections: of all samples.
        similarity: least scalar product of their signatures.
        block: rows compared at a time, which bounds the memory.
    """
    rows = [index for index, found in enumerate(inspections) if found.signature is not None]
    if not rows:
        return []
    signatures = np.stack([inspections[row].signature for row in rows])
    pairs = []
    for start in range(0, len(rows), block):
        products = signatures[start : start + block] @ signatures[start:].T
        for i, j in zip(*np.nonzero(products >= similarity), strict=True):
            if j <= i:
                continue
            first, second = rows[start + i], rows[start + j]
            if inspections[first].digest != inspections[second].digest:
                pairs.append((first, second, float(products[i, j])))
    return sorted(pairs, key=lambda pair: -pair[2])
