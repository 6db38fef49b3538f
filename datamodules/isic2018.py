"""ISIC 2018 Task 1, lesion boundary segmentation: 2594 photographs with masks.

Source: Codella et al., "Skin Lesion Analysis Toward Melanoma Detection 2018", 2019.
"""

from datamodules.segmentation import FileSample, SegmentationDataModule, pair_files

__all__ = ["ISIC2018"]


class ISIC2018(SegmentationDataModule):
    """The official layout: `ISIC2018_Task1-2_Training_Input/<id>.jpg` and
    `ISIC2018_Task1_Training_GroundTruth/<id>_segmentation.png` under `root`.

    The reference divides the sorted training files into 1815, 259 and 520.
    """

    name = "isic2018"
    reference_split = (1815, 259, 520)

    def find_samples(self) -> list[FileSample]:
        return pair_files(
            [self.root / "ISIC2018_Task1-2_Training_Input"],
            self.root / "ISIC2018_Task1_Training_GroundTruth",
            "_segmentation.png",
            hint=f"set paths.data to the folder that holds {self.root.name}/ with the two folders "
            "of ISIC 2018 Task 1 as published on challenge.isic-archive.com.",
        )
