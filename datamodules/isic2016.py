"""ISIC 2016 lesion segmentation: 900 photographs for training and 379 for testing.

Source: Gutman et al., "Skin Lesion Analysis toward Melanoma Detection", 2016.
"""

from datamodules.downloads import isic_archives
from datamodules.files import Listing
from datamodules.segmentation import SegmentationDataModule

__all__ = ["ISIC2016"]

# Part 3B has the masks among the photographs.
PART_1 = tuple(
    (part, f"ISBI2016_ISIC_Part1_{name}_Data", f"ISBI2016_ISIC_Part1_{name}_GroundTruth")
    for part, name in (("train", "Training"), ("test", "Test"))
)
PART_3B = tuple(
    (part, *[f"ISBI2016_ISIC_Part3B_{name}_Data"] * 2)
    for part, name in (("train", "Training"), ("test", "Test"))
)


class ISIC2016(SegmentationDataModule):
    """The layouts of Part 1, `ISBI2016_ISIC_Part1_Training_Data/<id>.jpg` and
    `ISBI2016_ISIC_Part1_Training_GroundTruth/<id>_Segmentation.png`, and of Part 3B, where both are
    in `ISBI2016_ISIC_Part3B_Training_Data`; the same with `Test`.

    Nothing is published for validation: 150 training images, drawn from `split_seed`, become it.
    """

    name = "isic2016"
    reference_split = (750, 150, 379)
    splits = ("official", "random")
    source = "challenge.isic-archive.com (Part 1 or Part 3B of 2016)"
    downloads = isic_archives(2016, PART_1, (900, 379))

    def list_files(self) -> Listing:
        part_3b = (self.root / PART_3B[0][1]).is_dir()
        return self.list_published(PART_3B if part_3b else PART_1)
