"""Any folder of photographs and masks."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.text import printable
from datamodules.cache import Sample
from datamodules.files import (
    IMAGE_SUFFIXES,
    FileSample,
    Listing,
    images_by_id,
    masks_by_id,
    unpaired,
    visible_files,
)
from datamodules.problems import Problem
from datamodules.segmentation import SegmentationDataModule
from datamodules.splits import PART_NAMES, PARTS

__all__ = ["Folder"]

# What may follow an image's name in that of its mask, in any case; the first that fits is taken.
MASK_SUFFIXES = ("", "_segmentation", "_mask", "-mask", "_seg", "_seg0", "_lesion", "_gt")
SPLIT_FILE = "splits.csv"
# How many file names a message shows.
SHOWN = 3


class Folder(SegmentationDataModule):
    """`images/<id>.jpg` and `masks/<id>.png` under `root`, or both in `train/`, `val/` and `test/`.

    The parts may also be `images/train/` and `masks/train/`, and are called as in `PART_NAMES`,
    in upper or lower case. Subfolders, such as one for each patient, are searched; an id is the
    path of an image there, such as `p1/IMG_0001`, after the part. A mask has the path of its image,
    followed by nothing or one of `MASK_SUFFIXES`; it may lie beside its image, or in a `masks/`
    without subfolders where only one image has that name. Images and masks may have any common
    format. The test part may be without masks: then it can be predicted, not tested. With
    `split=auto` the parts are, whichever there is first: `splits.csv` (columns `id` and `split`),
    the folders, or 7 : 1 : 2 drawn from `split_seed`.

    Args:
        mask_suffix: what follows an image's name in that of its mask, such as `_contour`; null
            tries `MASK_SUFFIXES`.
        arguments, settings: everything that `SegmentationDataModule` takes.
    """

    name = "folder"
    reference_split = (7, 1, 2)
    splits = ("auto", "official", "random")

    def __init__(self, *arguments: Any, mask_suffix: str | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.mask_suffix = mask_suffix

    @property
    def hint(self) -> str:
        """What to do when the data is not there."""
        return (
            "set datamodule.root to a folder that holds images/ and masks/ (of patients: "
            "images/<patient>/ and masks/<patient>/), or train/, val/ and test/ with both."
        )

    def list_files(self) -> Listing:
        listing = Listing()
        for part, images, masks in self._folders():
            listing += self._list_pairs(images, masks, part)
        return listing

    def divide(self, samples: Sequence[Sample]) -> list[str]:
        if self.split == "auto" and self.split_file is None:
            if (self.root / SPLIT_FILE).is_file():
                self.split_file = self.root / SPLIT_FILE
            else:
                self.split = "official" if any(s.part for s in samples) else "random"
        return super().divide(samples)

    @property
    def _suffixes(self) -> tuple[str, ...]:
        if self.mask_suffix is None:
            return MASK_SUFFIXES
        # YAML makes a number of a suffix such as 2; some give the whole end of the name.
        suffix = str(self.mask_suffix).lower()
        ending = next((ending for ending in IMAGE_SUFFIXES if suffix.endswith(ending)), "")
        return (suffix.removesuffix(ending),)

    def _folders(self) -> list[tuple[str | None, Path, Path | None]]:
        """Return part, folder of images and folder of masks, none where those lie beside images.

        Raises:
            UserError: they are missing or not understood.
        """
        images = _child(self.root, "images")
        parts = _part_folders(self.root, () if images is None else ("images", "masks"))
        if images is None and parts:
            return [(part, *self._pair(folder, part)) for part, folder in parts.items()]
        if images is None:
            if not self.root.is_dir() or not self._has_pairs(self.root):
                raise UserError(
                    f"The folder {self.root} has neither images/ nor train/; {self.hint}"
                )
            return [(None, self.root, None)]
        if parts:
            names = ", ".join(f"{folder.name}/" for folder in parts.values())
            raise UserError(
                f"The folder {self.root} has {images.name}/ beside {names}; keep the one or the "
                "others there."
            )
        parts = _part_folders(images)
        if not parts:
            return [(None, *self._pair(self.root, None))]
        if _has_images(images):
            raise UserError(
                f"The folder {images} has images beside {next(iter(parts.values())).name}/; move "
                "each into the folder of its part."
            )
        masks = _child(self.root, "masks")
        masked = _part_folders(masks) if masks else {}
        return [
            (part, folder, self._masks(folder, masked.get(part), f"masks/{folder.name}", part))
            for part, folder in parts.items()
        ]

    def _pair(self, folder: Path, part: str | None) -> tuple[Path, Path | None]:
        """Return the folder of images and that of masks in another, or itself and none."""
        images, masks = _child(folder, "images"), _child(folder, "masks")
        if images is None and masks is None and (_has_images(folder) or self._has_pairs(folder)):
            images = folder
        if images is None:
            raise UserError(f"The folder {folder / 'images'} does not exist; {self.hint}")
        expected = (folder / "masks").relative_to(self.root).as_posix()
        return images, self._masks(images, masks, expected, part)

    def _masks(
        self, images: Path, masks: Path | None, expected: str, part: str | None
    ) -> Path | None:
        if masks is None and part != "test" and not self._has_pairs(images):
            raise UserError(f"The folder {self.root / expected} does not exist; {self.hint}")
        return masks

    def _has_pairs(self, folder: Path) -> bool:
        """Tell whether a folder or one of its subfolders has an image with its mask beside it."""
        keys = {_folded(key) for key in images_by_id([folder], [], recursive=True)}
        return any(key + suffix in keys for key in keys for suffix in self._suffixes if suffix)

    def _list_pairs(self, folder: Path, mask_folder: Path | None, part: str | None) -> Listing:
        """Return the images of a part with their masks.

        Args:
            folder: holds the images.
            mask_folder: holds the masks; none where they lie beside the images, or nowhere.
            part: of all these images, None where the images are not divided.
        """
        listing = Listing()
        beside = tuple(s for s in self._suffixes if s) if mask_folder is None else ()
        images = images_by_id([folder], listing.problems, beside, recursive=True)
        if not images and not listing.problems:
            raise UserError(f"The folder {folder} has no images; {self.hint}")
        masks = masks_by_id(mask_folder or folder, "", listing.problems, recursive=True)
        if mask_folder is None:
            masks = {k: path for k, path in masks.items() if k.lower().endswith(beside)}
        pairs = _match(images, masks, self._suffixes)
        left = {key: masks[key] for key in sorted(masks.keys() - set(pairs.values()))}
        needed = part != "test" or mask_folder is not None or bool(masks)
        for key, image in images.items():
            if key not in pairs and needed:
                place = (mask_folder or folder) / key
                listing.problems.append(self._without_mask(image, place, left or masks))
                continue
            name = f"{part}/{key}" if part else key
            paths = (masks[pairs[key]],) if key in pairs else ()
            listing.samples.append(FileSample(name, image, paths, part=part))
        listing.problems += [
            unpaired("mask", mask, f"an image of that name in {folder}") for mask in left.values()
        ]
        return listing

    def _without_mask(self, image: Path, place: Path, masks: Mapping[str, Path]) -> Problem:
        """Return the problem of an image without a mask.

        Args:
            image: the image.
            place: where the mask was expected, without suffix.
            masks: by id; the message shows a few.
        """
        names = [path.name for path in masks.values()]
        # Those of this image first, which differ from it in the suffix.
        names.sort(key=lambda name: not name.lower().startswith(image.stem.lower()))
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        found = f"masks there are {shown}" if names else "no masks are there"
        tried = ", ".join(suffix for suffix in self._suffixes if suffix)
        tried = f" or followed by {tried}" if tried else ""
        return Problem(
            "image without partner",
            image,
            f"The image {image} is without partner: {place}.png is missing, also in other formats"
            f"{tried}; {found}. Restore it, remove the image, or set datamodule.mask_suffix to "
            "what follows an image's name in that of its mask.",
        )


def _child(folder: Path, name: str) -> Path | None:
    """Return a folder in another by its name in any case.

    Raises:
        UserError: there are several.
    """
    if not folder.is_dir():
        return None
    found = [path for path in visible_files(folder) if path.name.lower() == name and path.is_dir()]
    if len(found) > 1:
        raise UserError(f"The folder {folder} has {' and '.join(p.name for p in found)}; keep one.")
    return found[0] if found else None


def _part_folders(folder: Path, besides: Sequence[str] = ()) -> dict[str, Path]:
    """Return the folders of the parts in another; none where no folder has the name of a part.

    Args:
        folder: holds them.
        besides: lower-case names of folders that may be there too.

    Raises:
        UserError: there is another folder beside them, two are of one part, or one is a broken
            link.
    """
    found: dict[str, Path] = {}
    others = []
    for path in visible_files(folder) if folder.is_dir() else ():
        part = PART_NAMES.get(path.name.lower())
        if part and path.is_symlink() and not path.exists():
            raise UserError(f"The folder {path} is a link to nothing; restore it or remove it.")
        if not path.is_dir():
            continue
        if part is None:
            others += [] if path.name.lower() in besides else [path]
        elif part in found:
            raise UserError(
                f"The folders {found[part].name}/ and {path.name}/ in {folder} both mean {part}; "
                "keep one."
            )
        else:
            found[part] = path
    found = {part: found[part] for part in PARTS if part in found}
    if found and others:
        known = ", ".join(PART_NAMES)
        first = next(iter(found.values())).name
        raise UserError(
            f"The folder {printable(str(others[0]))} beside {first}/ is none "
            f"of the parts {known}; rename it, or move it out of {folder}."
        )
    return found


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in visible_files(folder))


def _folded(name: str) -> str:
    """Return a name in one case and in one of the two forms that accents have in Unicode."""
    return unicodedata.normalize("NFC", name).lower()


def _match(
    images: Mapping[str, Path], masks: Mapping[str, Path], suffixes: Sequence[str]
) -> dict[str, str]:
    """Return the id of each image's mask, which has its path in any case and one of the suffixes.

    A mask that lies in no subfolder also fits an image in one whose name no other image has.
    """
    free: dict[str, list[str]] = {}
    for key in masks:
        free.setdefault(_folded(key), []).append(key)
    pairs: dict[str, str] = {}

    def take(image: str, name: str) -> None:
        for suffix in suffixes:
            keys = free.get(_folded(name) + suffix)
            if keys:
                # On some systems names that differ in case alone are two files.
                exact = [key for key in keys if key.startswith(name)]
                pairs[image] = (exact or keys)[0]
                keys.remove(pairs[image])
                return

    for key in images:
        take(key, key)
    names = {key: key.rpartition("/")[2] for key in images}
    counts = Counter(map(_folded, names.values()))
    for key, name in names.items():
        if key not in pairs and counts[_folded(name)] == 1:
            take(key, name)
    return pairs
