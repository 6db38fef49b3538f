"""Any folder of photographs and masks."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from datamodules.cache import Sample
from datamodules.files import FileSample, Listing, images_by_id, masks_by_id, unpaired
from datamodules.segmentation import SegmentationDataModule
from datamodules.splits import PARTS

__all__ = ["Folder"]

# What may follow an image's name in that of its mask; the first that fits is taken.
MASK_SUFFIXES = ("", "_segmentation", "_mask", "_lesion", "_seg", "_gt")
SPLIT_FILE = "splits.csv"


class Folder(SegmentationDataModule):
    """`images/<id>.jpg` and `masks/<id>.png` under `root`, or both in `train/`, `val/` and `test/`.

    Images and masks may have any common format; a mask's name is the image's, or that followed by
    `_segmentation`, `_mask`, `_lesion`, `_seg` or `_gt`. `test/` may be without `masks/`: then it
    can be predicted, not tested. With `split=auto` the parts are, whichever there is first:
    `splits.csv` (columns `id` and `split`), the folders, or 7 : 1 : 2 drawn from `split_seed`.
    """

    name = "folder"
    reference_split = (7, 1, 2)
    splits = ("auto", "official", "random")

    @property
    def hint(self) -> str:
        """What to do when the data is not there."""
        return (
            "set datamodule.root to a folder that holds images/ and masks/, or train/, val/ and "
            "test/ with both."
        )

    def list_files(self) -> Listing:
        if (self.root / "images").is_dir():
            return self._list_pairs(self.root, None)
        if not (self.root / "train").is_dir():
            raise UserError(f"The folder {self.root} has neither images/ nor train/; {self.hint}")
        listing = Listing()
        for part in PARTS:
            if (self.root / part).is_dir():
                listing += self._list_pairs(self.root / part, part)
        return listing

    def divide(self, samples: Sequence[Sample]) -> list[str]:
        if self.split == "auto" and self.split_file is None:
            if (self.root / SPLIT_FILE).is_file():
                self.split_file = self.root / SPLIT_FILE
            else:
                self.split = "official" if (self.root / "train").is_dir() else "random"
        return super().divide(samples)

    def _list_pairs(self, folder: Path, part: str | None) -> Listing:
        image_folder, mask_folder = folder / "images", folder / "masks"
        without = part == "test" and not mask_folder.is_dir()
        for needed in [image_folder] if without else [image_folder, mask_folder]:
            if not needed.is_dir():
                raise UserError(f"The folder {needed} does not exist; {self.hint}")
        listing = Listing()
        images = images_by_id([image_folder], listing.problems)
        if not images:
            raise UserError(f"The folder {image_folder} has no images; {self.hint}")
        found = {} if without else masks_by_id(mask_folder, "", listing.problems)
        masks = {stem.lower(): path for stem, path in found.items()}
        for key, image in images.items():
            name = f"{part}/{key}" if part else key
            stems = [key.lower() + suffix for suffix in MASK_SUFFIXES]
            stem = next((stem for stem in stems if stem in masks), None)
            if stem is not None:
                listing.samples.append(FileSample(name, image, (masks.pop(stem),), part=part))
            elif without:
                listing.samples.append(FileSample(name, image, part=part))
            else:
                listing.problems.append(unpaired("image", image, f"{mask_folder / key}.png"))
        listing.problems += [
            unpaired("mask", mask, f"an image of that name in {image_folder}")
            for mask in masks.values()
        ]
        return listing
