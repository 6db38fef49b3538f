"""ISIC 2019: 25331 photographs of eight diagnoses.

Sources: Tschandl et al., 2018; Codella et al., 2018; Combalia et al., "BCN20000", 2019. The
reference split is that of the SSD-KD repository.
"""

from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from datamodules.cache import Sample
from datamodules.classification import ClassificationDataModule
from datamodules.downloads import ISIC_ARCHIVE, Download
from datamodules.files import FileSample, Listing, images_by_id, unpaired
from datamodules.problems import Problem
from datamodules.tables import read_table

__all__ = ["ISIC2019", "reference_order"]

IMAGES = "ISIC_2019_Training_Input"
DIAGNOSES = "ISIC_2019_Training_GroundTruth.csv"
METADATA = "ISIC_2019_Training_Metadata.csv"
SOURCE = "challenge.isic-archive.com (training data of 2019)"
REFERENCE_SEED = 2021


class ISIC2019(ClassificationDataModule):
    """The official layout: `ISIC_2019_Training_Input/<id>.jpg`,
    `ISIC_2019_Training_GroundTruth.csv` (a column for each class) and
    `ISIC_2019_Training_Metadata.csv` (lesions), under `root`.

    `split=lesion_grouped` has all images of a lesion in one part and the classes in the same
    proportions in all parts. `split=reference` is that of SSD-KD, which has lesions in two parts.
    """

    name = "isic2019"
    classes = ("AK", "BCC", "BKL", "DF", "MEL", "NV", "SCC", "VASC")
    reference_split = (18238, 4560, 2533)
    splits = ("lesion_grouped", "reference", "random")
    source = SOURCE
    downloads = (
        Download(f"{ISIC_ARCHIVE}/2019/{DIAGNOSES}"),
        Download(f"{ISIC_ARCHIVE}/2019/{METADATA}"),
        Download(f"{ISIC_ARCHIVE}/2019/{IMAGES}.zip", 25331),
    )
    group_source = f"get {METADATA} from {SOURCE}, or choose another datamodule.split."

    def list_files(self) -> Listing:
        for needed in (IMAGES, DIAGNOSES):
            if not (self.root / needed).exists():
                raise UserError(f"The folder {self.root} has no {needed}; {self.hint}")
        table = self.root / DIAGNOSES
        rows = read_table(table, "image", self.classes, f"get it from {SOURCE}")
        self._rows = {key: number for number, key in enumerate(rows)}
        path = self.root / METADATA
        lesions = (
            read_table(path, "image", ["lesion_id"], f"get it from {SOURCE}")
            if path.is_file()
            else None
        )
        listing = Listing()
        images = images_by_id([self.root / IMAGES], listing.problems)
        for key in (key for key in images if key not in rows):
            listing.problems.append(unpaired("image", images[key], f"its row in {table}"))
        for key, row in rows.items():
            hot = [name for name in self.classes if _is_one(row[name])]
            if key not in images:
                missing = f"{self.root / IMAGES / key}.jpg"
                listing.problems.append(
                    Problem(
                        "row without image",
                        table,
                        f"{table} has a row of {key}, but {missing} is missing; restore it or "
                        "remove the row.",
                    )
                )
            elif len(hot) != 1:
                listing.problems.append(
                    Problem(
                        "unknown diagnosis",
                        table,
                        f"{table} has {' and '.join(hot) or 'no class'} for {key}; give it one of "
                        f"{', '.join(self.classes)}.",
                    )
                )
            elif lesions is not None and key not in lesions:
                listing.problems.append(
                    Problem(
                        "image without metadata",
                        path,
                        f"{path} has no row of {key}; get it anew from {SOURCE}.",
                    )
                )
            else:
                # Where no lesion is given, the image is taken for the only one of its lesion.
                group = None if lesions is None else lesions[key]["lesion_id"] or key
                label = self.classes.index(hot[0])
                listing.samples.append(FileSample(key, images[key], group=group, label=label))
        return listing

    def reference_parts(self, samples: Sequence[Sample]) -> list[str]:
        # The reference shuffles the rows of its table, takes a tenth of them to test, and of five
        # stratified folds of the rest the second to validate.
        # This import costs a second, which few runs need pay.
        from sklearn.model_selection import StratifiedKFold

        by_row = sorted(range(len(samples)), key=lambda index: self._rows[samples[index].id])
        shuffled = [by_row[row] for row in reference_order(len(samples))]
        n_test = round(0.1 * len(samples))
        rest = shuffled[n_test:]
        folds = StratifiedKFold(5, shuffle=True, random_state=REFERENCE_SEED)
        labels = [samples[index].label for index in rest]
        _, (_, validation), *_ = folds.split(rest, labels)
        parts = np.full(len(samples), "train", dtype=object)
        parts[shuffled[:n_test]] = "test"
        parts[np.array(rest)[validation]] = "val"
        return parts.tolist()


def reference_order(count: int) -> np.ndarray:
    """Return the order in which the reference shuffles the rows of its table."""
    return np.random.RandomState(REFERENCE_SEED).permutation(count)


def _is_one(text: str) -> bool:
    try:
        return float(text) == 1
    except ValueError:
        return False
