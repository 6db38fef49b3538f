"""HAM10000: 10015 photographs of pigmented lesions with masks and diagnoses, many lesions more
than once.

Source: Tschandl et al., "The HAM10000 dataset, a large collection of multi-source dermatoscopic
images of common pigmented skin lesions", Scientific Data 2018.
"""

from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from datamodules.classification import ClassificationDataModule
from datamodules.files import FileSample, Listing, images_by_id, pair_files
from datamodules.problems import Problem
from datamodules.segmentation import SegmentationDataModule
from datamodules.tables import read_table

__all__ = ["HAM10000", "HAM10000Diagnosis"]

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
    splits = ("lesion_grouped", "reference", "random")
    source = SOURCE
    group_source = f"get the metadata from {SOURCE}, or choose another datamodule.split."

    def list_files(self) -> Listing:
        for parts, masks in LAYOUTS:
            folders = [self.root / part for part in parts]
            if (self.root / masks).is_dir() and any(folder.is_dir() for folder in folders):
                listing = pair_files(folders, self.root / masks, "_segmentation", self.hint)
                break
        else:
            layouts = ", nor ".join(f"{'/ or '.join(p)}/ beside {m}/" for p, m in LAYOUTS)
            raise UserError(f"The folder {self.root} has neither {layouts}; {self.hint}")
        path = find_metadata(self.root)
        rows = read_table(path, "image_id", ["lesion_id"], f"get it from {SOURCE}") if path else {}
        lesions = {key: row["lesion_id"] for key, row in rows.items()}
        listing.samples = [replace(s, group=lesions.get(s.id) or None) for s in listing.samples]
        return listing


class HAM10000Diagnosis(ClassificationDataModule):
    """The photographs of HAM10000 with their diagnoses, in either layout; masks are not needed.

    Images of a lesion are in one part, and classes in the same proportions in all parts.
    """

    name = "ham10000_diagnosis"
    classes = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    reference_split = (7200, 1800, 1015)
    splits = ("lesion_grouped", "random")
    source = SOURCE
    group_source = HAM10000.group_source

    def list_files(self) -> Listing:
        path = find_metadata(self.root)
        folders = [self.root / part for parts, _ in LAYOUTS for part in parts]
        folders = [folder for folder in folders if folder.is_dir()]
        if path is None or not folders:
            what = METADATA[0] if path is None else f"{LAYOUTS[0][0][0]}/ nor images/"
            raise UserError(f"The folder {self.root} has no {what}; {self.hint}")
        rows = read_table(path, "image_id", ["lesion_id", "dx"], f"get it from {SOURCE}")
        listing = Listing()
        images = images_by_id(folders, listing.problems)
        for key, image in images.items():
            if key not in rows:
                listing.problems.append(
                    Problem(
                        "image without diagnosis",
                        image,
                        f"{path} has no row of {key}; restore it or remove {image}.",
                    )
                )
            elif rows[key]["dx"] not in self.classes:
                listing.problems.append(
                    Problem(
                        "unknown diagnosis",
                        path,
                        f"{path} has dx={rows[key]['dx']} for {key}; choose from "
                        f"{', '.join(self.classes)}.",
                    )
                )
            else:
                row = rows[key]
                label, group = self.classes.index(row["dx"]), row["lesion_id"] or None
                listing.samples.append(FileSample(key, image, group=group, label=label))
        return listing


def find_metadata(root: Path) -> Path | None:
    """Return the table of lesions and diagnoses, under whatever name it was downloaded."""
    return next((root / name for name in METADATA if (root / name).is_file()), None)
