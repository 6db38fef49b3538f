"""ISIC 2017 Part 1, lesion segmentation: 2000 photographs to train, 150 to validate, 600 to test.

Source: Codella et al., "Skin Lesion Analysis Toward Melanoma Detection", 2018.
"""

from datamodules.downloads import isic_archives
from datamodules.files import Listing
from datamodules.segmentation import SegmentationDataModule

__all__ = ["ISIC2017"]

FOLDERS = tuple(
    (part, f"ISIC-2017_{name}_Data", f"ISIC-2017_{name}_Part1_GroundTruth")
    for part, name in (("train", "Training"), ("val", "Validation"), ("test", "Test_v2"))
)


class ISIC2017(SegmentationDataModule):
    """The official layout: `ISIC-2017_Training_Data/<id>.jpg` and
    `ISIC-2017_Training_Part1_GroundTruth/<id>_segmentation.png`; the same with `Validation` and
    `Test_v2`.
    """

    name = "isic2017"
    reference_split = (2000, 150, 600)
    splits = ("official", "random")
    source = "challenge.isic-archive.com (Part 1 of 2017)"
    downloads = isic_archives(2017, FOLDERS, (2000, 150, 600))

    def list_files(self) -> Listing:
        return self.list_published(FOLDERS)
