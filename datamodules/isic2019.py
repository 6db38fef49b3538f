"""ISIC 2019: 25331 photographs of eight diagnoses.

Sources: Tschandl et al., 2018; Codella et al., 2018; Combalia et al., "BCN20000", 2019. The
reference split is that of the SSD-KD repository.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
AGE, SEX, SITE = "age_approx", "sex", "anatom_site_general"
# In the order of their numbers, which is the alphabet's.
SEXES = ("female", "male")
SITES = (
    "anterior torso",
    "head/neck",
    "lateral torso",
    "lower extremity",
    "oral/genital",
    "palms/soles",
    "posterior torso",
    "upper extremity",
)


class ISIC2019(ClassificationDataModule):
    """The official layout: `ISIC_2019_Training_Input/<id>.jpg`,
    `ISIC_2019_Training_GroundTruth.csv` (a column for each class) and
    `ISIC_2019_Training_Metadata.csv` (lesions), under `root`.

    `split=lesion_grouped` has all images of a lesion in one part and the classes in the same
    proportions in all parts. `split=reference` is that of SSD-KD, which has lesions in two parts.

    Args:
        metadata: batches also have `metadata` of 11 numbers: the age in years, 0 where it is
            missing, then sex and place as one of each is 1, none where it is missing.
        arguments, settings: everything that `ClassificationDataModule` takes.
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
    available_metadata = (AGE, *SEXES, *SITES)
    group_source = f"get {METADATA} from {SOURCE}, or choose another datamodule.split."

    def __init__(self, *arguments: Any, metadata: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.metadata = metadata
        if metadata:
            self.metadata_columns = self.available_metadata

    def dataset_settings(self) -> dict[str, Any]:
        metadata = None
        if self.metadata:
            metadata = {key: encode_metadata(row) for key, row in self._metadata.items()}
        return {**super().dataset_settings(), "metadata": metadata}

    def list_files(self) -> Listing:
        for needed in (IMAGES, DIAGNOSES):
            if not (self.root / needed).exists():
                raise UserError(f"The folder {self.root} has no {needed}; {self.hint}")
        table = self.root / DIAGNOSES
        rows = read_table(table, "image", self.classes, f"get it from {SOURCE}")
        self._rows = {key: number for number, key in enumerate(rows)}
        path = self.root / METADATA
        metadata = None
        if path.is_file():
            columns = ["lesion_id", *((AGE, SEX, SITE) if self.metadata else ())]
            metadata = read_table(path, "image", columns, f"get it from {SOURCE}")
        elif self.metadata:
            raise UserError(
                f"datamodule.metadata=true needs {path}, which is missing; get it from {SOURCE}, "
                "or set datamodule.metadata=false."
            )
        self._metadata = {}
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
            elif metadata is not None and key not in metadata:
                listing.problems.append(
                    Problem(
                        "image without metadata",
                        path,
                        f"{path} has no row of {key}; get it anew from {SOURCE}.",
                    )
                )
            else:
                # Where no lesion is given, the image is taken for the only one of its lesion.
                group = None if metadata is None else metadata[key]["lesion_id"] or key
                label = self.classes.index(hot[0])
                listing.samples.append(FileSample(key, images[key], group=group, label=label))
                if self.metadata:
                    self._metadata[key] = metadata[key]
                    listing.problems += _unknown_metadata(path, key, metadata[key])
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


def encode_metadata(row: Mapping[str, str]) -> list[float]:
    """Return the 11 numbers of a row: age in years, sexes and sites, each 0 where missing."""
    sexes = [float(row[SEX] == sex) for sex in SEXES]
    sites = [float(row[SITE] == site) for site in SITES]
    return [float(row[AGE] or 0), *sexes, *sites]


def _unknown_metadata(path: Path, key: str, row: Mapping[str, str]) -> Iterator[Problem]:
    for column, known, legal in (
        (AGE, _is_age(row[AGE]), "a number of years"),
        (SEX, row[SEX] in SEXES, f"one of {', '.join(SEXES)}"),
        (SITE, row[SITE] in SITES, f"one of {', '.join(SITES)}"),
    ):
        if row[column] and not known:
            yield Problem(
                "unknown metadata",
                path,
                f"{path} has {column}={row[column]} for {key}; give {legal}, or leave it empty.",
            )


def _is_age(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


def _is_one(text: str) -> bool:
    try:
        return float(text) == 1
    except ValueError:
        return False
