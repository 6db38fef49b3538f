"""Files of images and masks in folders, matched by id, and what is wrong with them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from datamodules.decoding import read_image, read_mask
from datamodules.problems import BadFileError, Problem

__all__ = [
    "IMAGE_SUFFIXES",
    "FileSample",
    "Listing",
    "images_by_id",
    "masks_by_id",
    "merge_masks",
    "pair_files",
    "unpaired",
    "visible_files",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
# What ISIC 2017 and 2018 put among the photographs.
SUPERPIXELS = "_superpixels"


@dataclass
class Listing:
    """The samples of a dataset and what is wrong with its files, before any is decoded."""

    samples: list[Any] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def __iadd__(self, other: "Listing") -> "Listing":
        self.samples += other.samples
        self.problems += other.problems
        return self

    def refuse_problems(self) -> None:
        """Raise a UserError for the first problem, if there is one."""
        if self.problems:
            first = self.problems[0]
            alike = sum(problem.kind == first.kind for problem in self.problems)
            count = f"{alike} times {first.kind}: " if alike > 1 else ""
            rest = (
                f" {len(self.problems)} problems in all; task=check_data lists them."
                if len(self.problems) > 1
                else ""
            )
            raise UserError(f"{count}{first.message}{rest}")


@dataclass(frozen=True)
class FileSample:
    """An image file with its mask files: none where unknown, several where people disagree.

    Attributes:
        id: unique in the dataset.
        image: the photograph.
        masks: its masks, all of one size.
        merge: how several masks become one, `majority` or `union`.
        part: where the publisher has it, `train`, `val` or `test`.
        group: images of one lesion or patient share it; None where unknown.
        label: index of its class; None where unknown.
    """

    id: str
    image: Path
    masks: tuple[Path, ...] = ()
    merge: str = "majority"
    part: str | None = None
    group: str | None = None
    label: int | None = None

    @property
    def labelled(self) -> bool:
        """Whether it has a mask."""
        return bool(self.masks)

    def fingerprint(self) -> list[Any]:
        stats = [(path.name, path.stat()) for path in (self.image, *self.masks)]
        merged = [self.merge] if len(self.masks) > 1 else []
        return [value for name, s in stats for value in (name, s.st_size, s.st_mtime_ns)] + merged

    def load(self) -> tuple[np.ndarray, np.ndarray | None]:
        image = read_image(self.image)
        masks = [read_mask(path) for path in self.masks]
        for path, mask in zip(self.masks, masks, strict=True):
            if mask.shape != image.shape[:2]:
                raise BadFileError(
                    "mask of another size",
                    path,
                    f"The image {self.image} has {image.shape[1]}x{image.shape[0]} pixels and its "
                    f"mask {path} has {mask.shape[1]}x{mask.shape[0]}; replace one, so that both "
                    "are of one size.",
                )
        return image, merge_masks(masks, self.merge) if masks else None


def merge_masks(masks: Sequence[np.ndarray], merge: str) -> np.ndarray:
    """Merge masks of one image, uint8 `(H, W)` of {0, 1}.

    `union` is lesion where anyone says so, `majority` where more than half do.
    """
    votes = np.sum(masks, axis=0, dtype=np.uint16)
    return (votes > (0 if merge == "union" else len(masks) / 2)).astype(np.uint8)


def pair_files(
    image_folders: Sequence[Path],
    mask_folder: Path,
    mask_suffix: str,
    hint: str,
    part: str | None = None,
) -> Listing:
    """Match the images of one or several folders with the masks of another by id.

    Args:
        image_folders: hold `<id>.<suffix>`; one of several may be missing.
        mask_folder: holds `<id><mask_suffix>.<suffix>`; it may be one of the image folders.
        mask_suffix: what follows the id in a mask's name, such as `_segmentation`; upper and lower
            case are the same.
        hint: what to do when a folder is missing, for the message.
        part: that all of them belong to, if known.

    Raises:
        UserError: a folder is missing or there are no images.
    """
    present = [folder for folder in image_folders if folder.is_dir()]
    for folder in (*(present or image_folders[:1]), mask_folder):
        if not folder.is_dir():
            raise UserError(f"The folder {folder} does not exist; {hint}")
    listing = Listing()
    other = (mask_suffix,) if mask_folder in present else ()
    images = images_by_id(present, listing.problems, other)
    if not images:
        raise UserError(f"The folder {' or '.join(map(str, present))} has no images; {hint}")
    masks = masks_by_id(mask_folder, mask_suffix, listing.problems)
    listing.samples = [
        FileSample(key, images[key], (masks[key],), part=part)
        for key in sorted(images.keys() & masks.keys())
    ]
    listing.problems += [
        unpaired("image", images[key], f"{mask_folder / key}{mask_suffix}.png")
        for key in sorted(images.keys() - masks.keys())
    ]
    listing.problems += [
        unpaired("mask", masks[key], " or ".join(f"{folder / key}.jpg" for folder in image_folders))
        for key in sorted(masks.keys() - images.keys())
    ]
    return listing


def visible_files(folder: Path) -> list[Path]:
    """Return the files of a folder, sorted, without hidden ones.

    Those are what other systems leave behind, such as `._ISIC_0000000.jpg`.
    """
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def images_by_id(
    folders: Iterable[Path], problems: list[Problem], other: Sequence[str] = ()
) -> dict[str, Path]:
    """Return the photographs of some folders by the stem of their names.

    Files of other kinds, superpixels and stems that end with one of `other` are passed over; a
    second image of an id is a problem.
    """
    endings = tuple(ending.lower() for ending in (SUPERPIXELS, *other))
    images: dict[str, Path] = {}
    for path in (path for folder in folders for path in visible_files(folder)):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.stem.lower().endswith(endings):
            continue
        first = images.setdefault(path.stem, path)
        if first != path:
            problems.append(_double("images", path.stem, first, path))
    return images


def masks_by_id(folder: Path, suffix: str, problems: list[Problem]) -> dict[str, Path]:
    """Return the masks of a folder by id, which `suffix` follows in the stem of their names."""
    masks: dict[str, Path] = {}
    for path in visible_files(folder):
        stem = path.stem
        if path.suffix.lower() not in IMAGE_SUFFIXES or not stem.lower().endswith(suffix.lower()):
            continue
        key = stem[: len(stem) - len(suffix)]
        first = masks.setdefault(key, path)
        if first != path:
            problems.append(_double("masks", key, first, path))
    return masks


def _double(what: str, key: str, first: Path, second: Path) -> Problem:
    return Problem(
        f"{what} of one id",
        second,
        f"Two {what} have the id {key}: {first} and {second}; remove one of them.",
    )


def unpaired(what: str, path: Path, missing: str) -> Problem:
    """Return the problem of an image without a mask, or of a mask without an image.

    Args:
        what: `image` or `mask`.
        path: the file that is there.
        missing: what is not there, a path or a few words.
    """
    return Problem(
        f"{what} without partner",
        path,
        f"The {what} {path} is without partner: {missing} is missing; restore it or remove the "
        f"{what}.",
    )
