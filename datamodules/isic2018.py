"""ISIC 2018 Task 1, lesion boundary segmentation: 2594 photographs with masks for training.

Source: Codella et al., "Skin Lesion Analysis Toward Melanoma Detection 2018", 2019.
"""

from datamodules.downloads import isic_archives
from datamodules.files import Listing
from datamodules.segmentation import SegmentationDataModule

__all__ = ["ISIC2018"]

FOLDERS = tuple(
    (part, f"ISIC2018_Task1-2_{name}_Input", f"ISIC2018_Task1_{name}_GroundTruth")
    for part, name in (("train", "Training"), ("val", "Validation"), ("test", "Test"))
)


class ISIC2018(SegmentationDataModule):
    """The official layout: `ISIC2018_Task1-2_Training_Input/<id>.jpg` and
    `ISIC2018_Task1_Training_GroundTruth/<id>_segmentation.png` under `root`.

    The reference divides the sorted training files into 1815, 259 and 520. `split=official` takes
    the folders of validation (100) and test (1000) beside them, `Validation` and `Test` in place of
    `Training`.
    """

    name = "isic2018"
    reference_split = (1815, 259, 520)
    splits = ("reference", "random", "official")
    source = "challenge.isic-archive.com (Task 1 of 2018)"
    downloads = isic_archives(2018, FOLDERS, (2594, 100, 1000))

    def list_files(self) -> Listing:
        return self.list_published(FOLDERS if self.split == "official" else FOLDERS[:1])
