"""MEDIQA-MAGIC 2025 (DermaVQA-seg): patients' photographs, each outlined by several annotators.

Source: Yim et al., "DermaVQA-DAS", 2025; ImageCLEF 2025.
"""

from pathlib import Path
from typing import Any

from common.errors import UserError, check_choice
from datamodules.files import FileSample, Listing, images_by_id, masks_by_id, unpaired
from datamodules.segmentation import SegmentationDataModule

__all__ = ["MEDIQAMagic"]

PARTS = (("train", "train"), ("val", "valid"), ("test", "test"))
# As unpacked from the archives, or moved up.
IMAGE_FOLDERS = ("images_{}", "images_final/images_{}", "images_final/images_final/images_{}")
MASK_FOLDERS = ("dermavqa-segmentations/{}", "segmentations/{}")
ANNOTATORS = ("each", "majority", "union")


class MEDIQAMagic(SegmentationDataModule):
    """The published layout: `images_{train,valid,test}/IMG_<encounter>_<number>.jpg` and
    `dermavqa-segmentations/{train,valid}/IMG_<encounter>_<number>_mask_ann<n>.tiff`.

    The test part is published without masks; where masks of it are there, they are used.

    Args:
        annotators: `each` makes a sample of every mask, as the reference does; `majority` is lesion
            where more than half of an image's annotators say so, `union` where any does.
        arguments, settings: everything that `SegmentationDataModule` takes.
    """

    name = "mediqa_magic"
    reference_split = (2474, 157, 314)
    splits = ("official", "lesion_grouped")
    source = "the MEDIQA-MAGIC 2025 task of ImageCLEF (on registration)"

    def __init__(self, *arguments: Any, annotators: str = "each", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        check_choice("datamodule.annotators", annotators, ANNOTATORS)
        self.annotators = annotators

    def list_files(self) -> Listing:
        listing = Listing()
        for part, name in PARTS:
            images = self._find(IMAGE_FOLDERS, name)
            masks = self._find(MASK_FOLDERS, name)
            if images is None and part != "train":
                continue
            if images is None or (masks is None and part != "test"):
                wanted = IMAGE_FOLDERS if images is None else MASK_FOLDERS
                raise UserError(
                    f"The folder {self.root} has no {wanted[0].format(name)}/; {self.hint}"
                )
            listing += self._list_part(part, images, masks)
        if self.split != "official":
            listing.samples = [sample for sample in listing.samples if sample.labelled]
        return listing

    def _find(self, patterns: tuple[str, ...], name: str) -> Path | None:
        folders = (self.root / pattern.format(name) for pattern in patterns)
        return next((folder for folder in folders if folder.is_dir()), None)

    def _list_part(self, part: str, image_folder: Path, mask_folder: Path | None) -> Listing:
        listing = Listing()
        images = images_by_id([image_folder], listing.problems)
        masks: dict[str, dict[str, Path]] = {}
        if mask_folder is not None:
            for stem, path in masks_by_id(mask_folder, "", listing.problems).items():
                image, _, annotator = stem.rpartition("_mask_")
                masks.setdefault(image, {})[annotator] = path
        for key in sorted(masks.keys() - images.keys()):
            first = min(masks[key].values())
            listing.problems.append(unpaired("mask", first, f"{image_folder / key}.jpg"))
        for key, image in images.items():
            # IMG_ENC00863_00009: images of one encounter show one patient.
            group = key.rpartition("_")[0] or None
            named = masks.get(key, {})
            if not named and mask_folder is not None:
                missing = f"{mask_folder / key}_mask_ann0.tiff or that of another annotator"
                listing.problems.append(unpaired("image", image, missing))
            elif self.annotators == "each" and named:
                listing.samples += [
                    FileSample(f"{key}_{annotator}", image, (path,), part=part, group=group)
                    for annotator, path in sorted(named.items())
                ]
            else:
                paths = tuple(path for _, path in sorted(named.items()))
                merge = "union" if self.annotators == "union" else "majority"
                listing.samples.append(FileSample(key, image, paths, merge, part, group))
        return listing
