"""Files of images and masks in folders, matched by id, and what is wrong with them."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.text import printable
from datamodules.decoding import read_header, read_image, read_mask
from datamodules.problems import BadFileError, Problem

__all__ = [
    "HIDDEN",
    "IMAGE_SUFFIXES",
    "UNREAD_SUFFIXES",
    "FileSample",
    "Listing",
    "image_files",
    "images_by_id",
    "masks_by_id",
    "merge_masks",
    "pair_files",
    "unpaired",
    "unread_problem",
    "visible_files",
]

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    ".ppm",
)
# Photographs in formats that are not read.
UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".dcm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".svg"),
    ".jxl",
)
# What ISIC 2017 and 2018 put among the photographs.
SUPERPIXELS = "_superpixels"
# What systems and archives leave behind, such as thumbnails.
HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN")


@dataclass
class Listing:
    """The samples of a dataset and what is wrong with its files, before any is decoded."""

    samples: list[Any] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def __iadd__(self, other: "Listing") -> "Listing":
        self.samples += other.samples
        self.problems += other.problems
        return self

    def configure_decoding(self, exif: str | None, mask_threshold: float | None) -> None:
        """Set how the samples' files are decoded, and add what their headers show to be wrong.

        Args:
            exif, mask_threshold: as in `FileSample`.
        """
        self.samples = [
            replace(sample, exif=exif, mask_threshold=mask_threshold)
            if isinstance(sample, FileSample)
            else sample
            for sample in self.samples
        ]
        masked = [s for s in self.samples if isinstance(s, FileSample) and s.masks]
        with ThreadPoolExecutor() as pool:
            for found in pool.map(FileSample.header_problems, masked):
                self.problems += found

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
        exif: what is done with the EXIF orientation of image and masks, `apply` or `ignore`; None
            applies it, and an orientation that may not be that of the mask is a problem.
        mask_threshold: as `threshold` in `read_mask`.
    """

    id: str
    image: Path
    masks: tuple[Path, ...] = ()
    merge: str = "majority"
    part: str | None = None
    group: str | None = None
    label: int | None = None
    exif: str | None = None
    mask_threshold: float | None = None

    @property
    def labelled(self) -> bool:
        """Whether it has a mask."""
        return bool(self.masks)

    def fingerprint(self) -> list[Any]:
        stats = [(path.name, path.stat()) for path in (self.image, *self.masks)]
        settings = [self.merge] if len(self.masks) > 1 else []
        settings += [f"exif {self.exif}"] if self.exif else []
        if self.masks and self.mask_threshold is not None:
            settings.append(f"mask threshold {self.mask_threshold}")
        return [value for name, s in stats for value in (name, s.st_size, s.st_mtime_ns)] + settings

    def load(self) -> tuple[np.ndarray, np.ndarray | None]:
        exif = self.exif or "apply"
        image = read_image(self.image, exif)
        masks = [read_mask(path, exif, self.mask_threshold) for path in self.masks]
        for path, mask in zip(self.masks, masks, strict=True):
            if mask.shape != image.shape[:2]:
                problem = self._header_problem(path)
                problem = problem or self._size_problem(path, image.shape[:2], mask.shape)
                raise BadFileError(*astuple(problem))
        return image, merge_masks(masks, self.merge) if masks else None

    def header_problems(self) -> list[Problem]:
        """Return which masks do not lie on the image, by sizes and orientations in the headers.

        Files without a readable header are left to `load`.
        """
        problems = [self._header_problem(path) for path in self.masks]
        return [problem for problem in problems if problem]

    def _header_problem(self, path: Path) -> Problem | None:
        image, mask = read_header(self.image), read_header(path)
        if image is None or mask is None:
            return None
        size, mask_size = image.upright, mask.upright
        other, other_mask = image.stored, mask.stored
        if self.exif == "ignore":
            size, mask_size, other, other_mask = other, other_mask, size, mask_size
        if size != mask_size and other != other_mask:
            return self._size_problem(path, size, mask_size)
        if size != mask_size:
            way = "apply" if self.exif == "ignore" else "ignore"
            return Problem(
                "EXIF orientation",
                path,
                f"The image {self.image} is stored with EXIF orientation {image.orientation}, and "
                f"its mask {path} (orientation {mask.orientation}) fits only with "
                f"datamodule.exif={way}; set that, or save both upright without the tag.",
            )
        if self.exif is None and image.orientation != mask.orientation and other == other_mask:
            return Problem(
                "EXIF orientation",
                path,
                f"The image {self.image} is stored with EXIF orientation {image.orientation}, its "
                f"mask {path} with {mask.orientation}, and their sizes fit with and without it; "
                "set datamodule.exif=apply where masks are drawn on the upright image, "
                "datamodule.exif=ignore where they follow the stored pixels.",
            )
        return None

    def _size_problem(self, path: Path, image: Sequence[int], mask: Sequence[int]) -> Problem:
        return Problem(
            "mask of another size",
            path,
            f"The image {self.image} has {image[1]}x{image[0]} pixels and its mask {path} has "
            f"{mask[1]}x{mask[0]}; replace one, so that both are of one size.",
        )


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
    """Return the files and folders of a folder, sorted, without hidden ones.

    Those are what other systems leave behind, such as `._ISIC_0000000.jpg`.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(HIDDEN))
    except OSError as error:
        raise UserError(
            f"The folder {printable(str(folder))} cannot be read ({error.strerror}); give yourself "
            "the right to read it, or choose another."
        ) from error


def image_files(folder: Path, problems: list[Problem], recursive: bool = False) -> list[Path]:
    """Return the image files of a folder in sorted order.

    Hidden files and files of other kinds are passed over. Broken links, pipes and the like, and
    names that are not UTF-8 are problems.

    Args:
        folder: what to search.
        problems: where problems are added.
        recursive: search its subfolders too, also those behind links.
    """
    return _image_files(folder, problems, recursive, (folder.resolve(),))


def _image_files(
    folder: Path, problems: list[Problem], recursive: bool, above: tuple[Path, ...]
) -> list[Path]:
    found = []
    for path in visible_files(folder):
        if recursive and path.is_dir():
            real = path.resolve()
            # A link to a folder above has nothing new, and no end.
            if real not in above:
                found += _image_files(path, problems, recursive, (*above, real))
            continue
        if path.suffix.lower() in UNREAD_SUFFIXES:
            problem = unread_problem(path)
            problems += [] if problem in problems else [problem]
            continue
        # A broken link without suffix was one to a folder.
        lost_folder = recursive and not path.suffix and not path.exists()
        if path.suffix.lower() in IMAGE_SUFFIXES or lost_folder:
            problem = _file_problem(path)
            if problem is None:
                found.append(path)
            elif problem not in problems:
                problems.append(problem)
    return found


def _file_problem(path: Path) -> Problem | None:
    """Return why a path is no file that a dataset can use, without opening it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        kind, why, fix = "file name that is not UTF-8", "has a name that is not UTF-8", "rename"
    else:
        if path.is_file():
            return None
        kind, why, fix = "no regular file", "is no regular file", "remove"
        if path.is_symlink() and not path.exists():
            kind, why, fix = "broken link", "is a link to nothing", "restore its target or remove"
    return Problem(kind, path, f"The file {printable(str(path))} {why}; {fix} it.")


def unread_problem(path: Path) -> Problem:
    """Return the problem of a photograph in a format that is not read."""
    message = f"The image {printable(str(path))} is in a format that is not read; save it as PNG."
    return Problem("format that is not read", path, message)


def images_by_id(
    folders: Iterable[Path],
    problems: list[Problem],
    other: Sequence[str] = (),
    recursive: bool = False,
) -> dict[str, Path]:
    """Return the photographs of some folders by their path there without suffix, such as `p1/a`.

    Files of other kinds, superpixels and ids that end with one of `other` are passed over; a
    second image of an id is a problem, as is what `image_files` names.
    """
    endings = tuple(ending.lower() for ending in (SUPERPIXELS, *other))
    images: dict[str, Path] = {}
    for folder in folders:
        for path in image_files(folder, problems, recursive):
            key = _key(path, folder)
            if key.lower().endswith(endings):
                continue
            first = images.setdefault(key, path)
            if first != path:
                problems.append(_double("images", key, first, path))
    return images


def masks_by_id(
    folder: Path, suffix: str, problems: list[Problem], recursive: bool = False
) -> dict[str, Path]:
    """Return the masks of a folder by id, which `suffix` follows in their names.

    An id is the path without suffix as in `images_by_id`.
    """
    masks: dict[str, Path] = {}
    for path in image_files(folder, problems, recursive):
        key = _key(path, folder)
        if not key.lower().endswith(suffix.lower()):
            continue
        key = key[: len(key) - len(suffix)]
        first = masks.setdefault(key, path)
        if first != path:
            problems.append(_double("masks", key, first, path))
    return masks


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


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
