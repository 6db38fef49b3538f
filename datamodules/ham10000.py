"""HAM10000: 10015 photographs of pigmented lesions with masks, many lesions more than once.

Source: Tschandl et al., "The HAM10000 dataset, a large collection of multi-source dermatoscopic
images of common pigmented skin lesions", Scientific Data 2018.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from datamodules.segmentation import FileSample, SegmentationDataModule, pair_files
from datamodules.splits import grouped_split

__all__ = ["HAM10000"]

# Folders of images and of masks: as published, and as the reference has them.
LAYOUTS = (
    (
        ("HAM10000_images_part_1", "HAM10000_images_part_2"),
        "HAM10000_segmentations_lesion_tschandl",
    ),
    (("images",), "masks"),
)
# Dataverse hands the table out under all three names.
METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")
SOURCE = "Harvard Dataverse, doi:10.7910/DVN/DBW86T"


class HAM10000(SegmentationDataModule):
    """The official layout: `HAM10000_images_part_1/<id>.jpg`, `HAM10000_images_part_2/<id>.jpg`,
    `HAM10000_segmentations_lesion_tschandl/<id>_segmentation.png` and `HAM10000_metadata.csv` under
    `root`; or the reference's, `images/<id>.jpg` and `masks/<id>_segmentation.png`.

    The reference divides the sorted files into 7200, 1800 and 1015 and so tests on other images of
    lesions that it has trained on. `split=lesion_grouped` keeps these proportions and has all
    images of a lesion in one part; it needs the metadata.
    """

    name = "ham10000"
    reference_split = (7200, 1800, 1015)
    splits = (*SegmentationDataModule.splits, "lesion_grouped")

    def find_samples(self) -> list[FileSample]:
        hint = (
            f"get the images and the lesion segmentations from {SOURCE}, and set paths.data to the "
            f"folder that holds {self.root.name}/."
        )
        for parts, masks in LAYOUTS:
            image_folders = [self.root / part for part in parts]
            mask_folder = self.root / masks
            if mask_folder.is_dir() and any(folder.is_dir() for folder in image_folders):
                return pair_files(image_folders, mask_folder, "_segmentation.png", hint)
        layouts = ", nor ".join(f"{'/ or '.join(p)}/ beside {masks}/" for p, masks in LAYOUTS)
        raise UserError(f"The folder {self.root} has neither {layouts}; {hint}")

    def divide(self, ids: Sequence[str]) -> list[str]:
        if self.split != "lesion_grouped":
            return super().divide(ids)
        return grouped_split(self._lesions(ids), self.reference_split, self.split_seed)

    def _lesions(self, ids: Sequence[str]) -> list[str]:
        paths = [self.root / name for name in METADATA]
        path = next((path for path in paths if path.is_file()), None)
        way_out = f"get it from {SOURCE}, or set datamodule.split=reference, which works without."
        if path is None:
            raise UserError(f"datamodule.split=lesion_grouped needs {paths[0]}; {way_out}")
        lesions = _read_lesions(path)
        unknown = [i for i in ids if not lesions.get(i)]
        if unknown:
            raise UserError(
                f"{path} has no lesion_id for {len(unknown)} of {len(ids)} images, first "
                f"{unknown[0]}, which datamodule.split=lesion_grouped needs; {way_out}"
            )
        return [lesions[i] for i in ids]


def _read_lesions(path: Path) -> dict[str, str]:
    """Return the lesion of each image in the metadata, separated by commas or tabs."""
    # A file that is no text has no such columns either, and is refused for that.
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        separator = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        table = csv.DictReader(file, delimiter=separator)
        if not {"image_id", "lesion_id"} <= set(table.fieldnames or ()):
            raise UserError(
                f"{path} has no columns image_id and lesion_id; get it anew from {SOURCE}."
            )
        return {row["image_id"]: row["lesion_id"] for row in table}
