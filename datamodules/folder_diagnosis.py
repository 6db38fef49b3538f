"""Any folder of photographs with a table of diagnoses, or with a folder for each class."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from datamodules.cache import Sample
from datamodules.classification import ClassificationDataModule
from datamodules.diagnosis_tables import (
    IDS,
    Columns,
    Diagnosis,
    join_groups,
    normalise_label,
    plain_name,
    read_diagnoses,
)
from datamodules.files import (
    HIDDEN,
    IMAGE_SUFFIXES,
    SUPERPIXELS,
    UNREAD_SUFFIXES,
    FileSample,
    Listing,
    unread_problem,
)
from datamodules.folder import MASK_SUFFIXES, SPLIT_FILE
from datamodules.problems import Problem
from datamodules.splits import PART_NAMES, stratified_grouped_split
from datamodules.tables import column_names, read_records

__all__ = ["FolderDiagnosis"]

IMAGES = "images"
TABLES = ("labels.csv", "metadata.csv")
# Columns of the tables of predictions, where each class has a column of its name.
RESERVED = {
    *("id", "label", "predicted", "correct", "confidence"),
    *("file", "name", "height", "width", "seconds", "error", "remark", "settings"),
}
# Formulas of spreadsheets, and references to other values of a config.
UNSAFE = re.compile(r"[=@]|[+-]\D|.*\$\{")


class FolderDiagnosis(ClassificationDataModule):
    """Photographs under `root` with a table of their diagnoses, or in one folder for each class.

    The table may have any form that `read_records` reads: a column of classes, or a column of 0
    and 1 for each class. Without one, the folders under `root`, or under `train/`, `val/` and
    `test/` there, are the classes. Photographs are found in all subfolders of `root/images`, where
    there is such a folder, otherwise of `root`; masks beside them are passed over.

    With `split=auto` the parts are, whichever there is first: `splits.csv` (columns `id` and
    `split`), the split column or the folders, or 7 : 1 : 2 as with `split=lesion_grouped`, drawn
    from `split_seed`: every class in these proportions, images of one lesion or of one patient in
    one part. A class with too few of these groups is in the training part first.

    `classes` are empty until the files are listed, unless they are given.

    Args:
        table: a file, relative to the working folder or to `root`; by default `labels.csv`,
            `metadata.csv` or the only table in `root`, otherwise the only one in its folders.
            False: the folders are the classes.
        id_column: file names or ids of the photographs.
        label_column: their classes; a list of columns of 0 and 1, one for each class.
        group_column, patient_column: of lesions and of patients.
        split_column: of parts. Columns that are not given are found by their usual names.
        rest_class: the class of rows that are 0 in every column of a class.
        classes: those to learn, in the order of their labels; by default all, sorted.
        skip_other_classes: leave out images of other classes than `classes`; by default where
            these are given.
        skip_unlabelled: leave out images whose row has no class.
        partial: leave out rows without image and images without row.
        arguments, settings: everything that `ClassificationDataModule` takes.

    Raises:
        UserError: an argument is outside its range.
    """

    name = "folder_diagnosis"
    classes = ()
    reference_split = (7, 1, 2)
    splits = ("auto", "official", "lesion_grouped", "random")

    def __init__(
        self,
        *arguments: Any,
        table: str | Path | bool | None = None,
        id_column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        group_column: str | None = None,
        patient_column: str | None = None,
        split_column: str | None = None,
        rest_class: str | None = None,
        classes: Sequence[str] | None = None,
        skip_other_classes: bool | None = None,
        skip_unlabelled: bool = False,
        partial: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        for key, value, legal in (
            ("skip_other_classes", skip_other_classes, (True, False, None)),
            ("skip_unlabelled", skip_unlabelled, (True, False)),
            ("partial", partial, (True, False)),
        ):
            if value not in legal:
                raise UserError(f"datamodule.{key}={value} must be true or false.")
        if table is True or table == "":
            raise UserError(f"datamodule.table={table} must be a file, or false for class folders.")
        self.table = table
        self.columns = Columns(id_column, label_column, group_column, patient_column, split_column)
        self.rest_class = None if rest_class is None else normalise_label(str(rest_class))
        self.chosen = None if classes is None else _given_classes(classes)
        self.classes = self.chosen or ()
        self.skip_other_classes = skip_other_classes
        self.skip_unlabelled = skip_unlabelled
        self.partial = partial

    @property
    def hint(self) -> str:
        """What to do when the data is not there."""
        return (
            "set datamodule.root to a folder of photographs with a table of their diagnoses "
            "(datamodule.table=<file>), or with one folder for each class."
        )

    def find_classes(self) -> tuple[str, ...]:
        """List the files and return the classes, which must be fit for training.

        Raises:
            UserError: something is wrong with the files, or a class has no training images.
        """
        samples = self.find_samples()
        parts = self.divide(samples)
        counts = Counter(sample.label for sample in samples)
        trained = {
            sample.label for sample, part in zip(samples, parts, strict=True) if part == "train"
        }
        for label, name in enumerate(self.classes):
            if not counts[label]:
                raise UserError(
                    f"datamodule.classes has {name}, and there is no image of it in {self.root}; "
                    f"the classes there are {column_names(self.found_classes)}."
                )
            if label not in trained:
                raise UserError(
                    f"The class {name} has {counts[label]} image(s) in {self.root}, and none of "
                    "them is in the training part; add some, choose another datamodule.split, or "
                    "leave it out with datamodule.classes=[<class>,<class>]."
                )
        return self.classes

    def list_files(self) -> Listing:
        if not self.root.is_dir():
            raise UserError(f"The folder {self.root} does not exist; {self.hint}")
        folder = self.root / IMAGES if (self.root / IMAGES).is_dir() else self.root
        listing = Listing()
        images, masks = _find_images(folder, listing.problems)
        if not images:
            raise UserError(f"The folder {folder} has no photographs; {self.hint}")
        table = self._find_table()
        if table is None:
            found = self._list_folders(folder, images, listing.problems)
        else:
            found = self._list_rows(table, folder, images, masks, listing.problems)
        listing.samples = self._label(found, table or folder, listing.problems)
        return listing

    def divide(self, samples: Sequence[Sample]) -> list[str]:
        if self.split == "auto" and self.split_file is None:
            self.split_file = self._split_beside()
            if self.split_file is None:
                # A training part alone, as of ISIC 2020, is divided.
                known = {sample.part for sample in samples}
                self.split = "lesion_grouped" if known in ({None}, {"train"}) else "official"
        if self.split == "official" and self.split_file is None and self.folds is None:
            self._refuse_loose(samples)
        return super().divide(samples)

    def _split_beside(self) -> Path | None:
        """Return `splits.csv`, None where there is none or it is the table of diagnoses."""
        path = self.root / SPLIT_FILE
        return path if path.is_file() and path != self._find_table() else None

    def _column_divides(self) -> bool:
        """Return whether the split column, where there is one, says what the parts are."""
        if self.split_file is not None or self.folds is not None:
            return False
        return self.split == "official" or (self.split == "auto" and self._split_beside() is None)

    def _refuse_loose(self, samples: Sequence[Sample]) -> None:
        """Refuse photographs beside folders of parts, which would be in no part."""
        loose = [sample for sample in samples if sample.part is None]
        if loose and len(loose) < len(samples):
            raise UserError(
                f"{loose[0].image} is beside folders of parts and in none of them, as are "
                f"{len(loose) - 1} more; put them into those, whose names are "
                f"{', '.join(PART_NAMES)}, or choose datamodule.split=lesion_grouped."
            )

    def grouped_parts(self, samples: Sequence[Sample]) -> list[str]:
        # A patient with one melanoma among many naevi counts for melanoma.
        counts = Counter(sample.label for sample in samples)
        rarest: dict[str, int] = {}
        for sample in samples:
            other = rarest.get(sample.group, sample.label)
            rarest[sample.group] = min(sample.label, other, key=lambda k: (counts[k], k))
        groups = [sample.group for sample in samples]
        labels = [rarest[group] for group in groups]
        return stratified_grouped_split(groups, labels, self.reference_split, self.split_seed)

    def _find_table(self) -> Path | None:
        """Return the table of diagnoses, None where there is none.

        Raises:
            UserError: there are several, or the one that is given is missing.
        """
        if self.table is False:
            return None
        if self.table is not None:
            places = [Path(self.table), self.root / self.table]
            path = next((path for path in places if path.is_file()), None)
            if path is None:
                raise UserError(
                    f"datamodule.table={self.table} is no file, neither here nor in {self.root}; "
                    "give a CSV with a row for each photograph."
                )
            return path
        files = [path for path in sorted(self.root.iterdir()) if path.is_file()]
        files = [p for p in files if not p.name.startswith(".") and p.name.lower() != SPLIT_FILE]
        tables = [path for path in files if path.suffix.lower() in (".csv", ".tsv")]
        # Other texts are licences or notes.
        tables = tables or [p for p in files if p.suffix.lower() == ".txt" and _has_ids(p)]
        # ISIC 2018 has a folder for its table.
        tables = tables or [
            path
            for path in sorted(self.root.glob("*/*.csv"))
            if not path.parent.name.startswith(HIDDEN) and path.is_file() and _has_ids(path)
        ]
        usual = [path for path in tables if path.name.lower() in TABLES]
        tables = usual or tables
        if len(tables) > 1:
            raise UserError(
                f"The folder {self.root} has the tables {', '.join(p.name for p in tables)}; "
                "choose one with datamodule.table=<file>."
            )
        return tables[0] if tables else None

    def _list_rows(
        self,
        table: Path,
        base: Path,
        images: Sequence[Path],
        masks: Sequence[Path],
        problems: list[Problem],
    ) -> list[tuple[FileSample, str]]:
        """Return the photographs that have a row, still without label, and their classes.

        A file that is called as a mask is a photograph where a row names it.
        """
        index = _ImageIndex(base, images, masks)
        rows = read_diagnoses(table, self.columns, index.known, self.rest_class)
        groups = dict(zip(rows, join_groups(rows), strict=True))
        folders = _parts_of_folders(base, index.images)
        divided = self._column_divides()
        samples: list[tuple[FileSample, str]] = []
        first: dict[str, Path] = {}
        for row, image in self._match(table, rows, index, problems):
            if row.label is None:
                if not self.skip_unlabelled:
                    problems.append(_unlabelled(table, row))
                continue
            part = folders.get(image)
            if row.part is not None and divided:
                part = PART_NAMES.get(row.part.casefold())
                if part is None:
                    problems.append(_unknown_part(table, row))
                    continue
            key = index.shorten(row.name, image)
            if first.setdefault(key, image) != image:
                problems.append(_one_id(key, first[key], image))
                continue
            samples.append((FileSample(key, image, part=part, group=groups[row]), row.label))
        return samples

    def _match(
        self,
        table: Path,
        rows: Sequence[Diagnosis],
        index: "_ImageIndex",
        problems: list[Problem],
    ) -> list[tuple[Diagnosis, Path]]:
        """Return the rows that have a photograph of their own, with it."""
        matched: dict[Path, Diagnosis] = {}
        unclear: set[Path] = set()
        for row in rows:
            found = index.find(row.name)
            if len(found) > 1:
                unclear.update(found)
                problems.append(_unclear(table, row, found))
            elif found and found[0] in matched:
                problems.append(_two_rows(table, matched[found[0]], row, found[0]))
            elif found:
                matched[found[0]] = row
            elif not self.partial:
                problems.append(
                    Problem(
                        "row without image",
                        table,
                        f"{table} has a row of {row.name}, and {index.base} has no such image; "
                        "restore it, or set datamodule.partial=true to leave such rows out.",
                    )
                )
        if not matched and not unclear:
            raise UserError(
                f"{table} has rows of {rows[0].name} and {len(rows) - 1} more, but none of the "
                f"{len(index.images)} images in {index.base} has such a name, the first is "
                f"{index.images[0].name}; name the column of ids with "
                "datamodule.id_column=<column>."
            )
        if not self.partial:
            problems += [
                Problem(
                    "image without row",
                    image,
                    f"{table} has no row of {image}; add it, or set datamodule.partial=true to "
                    "leave such images out.",
                )
                for image in index.images
                if image not in matched and image not in unclear and image not in index.masks
            ]
        return [(row, image) for image, row in matched.items()]

    def _list_folders(
        self, base: Path, images: Sequence[Path], problems: list[Problem]
    ) -> list[tuple[FileSample, str]]:
        """Return the photographs in folders of classes, still without label, and their classes."""
        parts = _parts_of_folders(base, images)
        if parts and len(parts) < len(images):
            other = next(image for image in images if image not in parts)
            raise UserError(
                f"{other.relative_to(base)} in {base} is beside folders of parts and in none of "
                f"them; put it into one of those, whose names are {', '.join(PART_NAMES)}."
            )
        depth = 1 if parts else 0
        samples: list[tuple[FileSample, str]] = []
        first: dict[str, Path] = {}
        for image in images:
            path = image.relative_to(base)
            key = image_id(path.as_posix())
            if len(path.parts) < depth + 2:
                problems.append(
                    Problem(
                        "image without class",
                        image,
                        f"{image} is in no folder of a class, and there is no table of diagnoses; "
                        "put it into one, or set datamodule.table=<file>.",
                    )
                )
            elif first.setdefault(key, image) != image:
                problems.append(_one_id(key, first[key], image))
            else:
                sample = FileSample(key, image, part=parts.get(image), group=f"image {key}")
                name = path.parts[depth]
                samples.append((sample, normalise_label(name) or name))
        if not samples:
            raise UserError(
                f"The folder {base} has {len(images)} images, but neither a table of diagnoses nor "
                f"folders of classes; {self.hint}"
            )
        return samples

    def _label(
        self, found: Sequence[tuple[FileSample, str]], source: Path, problems: list[Problem]
    ) -> list[FileSample]:
        """Return samples with their label, and set `classes` where they are not given."""
        counts = Counter(name for _, name in found)
        self.found_classes = tuple(_sorted_classes(counts))
        if self.chosen is None:
            self.classes = self.found_classes
            problems += _bad_classes(self.classes, len(found), source)
            leave_out = False
        else:
            leave_out = self.skip_other_classes is not False
        label_of = {name.casefold(): label for label, name in enumerate(self.classes)}
        samples = []
        for sample, name in found:
            label = label_of.get(name.casefold())
            if label is not None:
                samples.append(replace(sample, label=label))
            elif not leave_out:
                problems.append(
                    Problem(
                        "unknown diagnosis",
                        source,
                        f"{source} has {name} for {sample.id}, which is none of the classes "
                        f"{', '.join(self.classes)}; correct it, or set "
                        "datamodule.skip_other_classes=true to leave such images out.",
                    )
                )
        if found and not samples and leave_out:
            raise UserError(
                f"{source} has none of the classes {', '.join(self.classes)}, but "
                f"{column_names(self.found_classes)}; give those to learn with "
                "datamodule.classes=[<class>,<class>]."
            )
        return samples


class _ImageIndex:
    """Finds photographs by what tables call them: an id, a file name, or a path.

    Args:
        base: the folder of all photographs.
        images: the photographs, in `base` or its subfolders.
        masks: files that are called as masks, taken where no photograph is meant.
    """

    def __init__(self, base: Path, images: Sequence[Path], masks: Sequence[Path]) -> None:
        self.base = base
        self.images = [*images, *masks]
        self.masks = set(masks)
        self._by_path: dict[str, list[Path]] = {}
        self._by_tail: dict[str, list[Path]] = {}
        self._by_folded: dict[str, list[Path]] = {}
        for image in self.images:
            path = self._path(image)
            self._by_path.setdefault(path, []).append(image)
            self._by_folded.setdefault(path.casefold(), []).append(image)
            for tail in _tails(path):
                self._by_tail.setdefault(tail, []).append(image)

    def _path(self, image: Path) -> str:
        return image_id(image.relative_to(self.base).as_posix())

    def known(self, name: str) -> bool:
        """Return whether there is a photograph of this name."""
        return bool(self.find(name))

    def find(self, name: str) -> list[Path]:
        """Return the photographs of this name, several where it is ambiguous."""
        key = image_id(name)
        # A path may begin above the folder, or within it.
        found = self._by_path.get(key) or self._by_tail.get(key)
        if not found:
            paths = (self._by_path.get(tail) for tail in _tails(key))
            found = next(filter(None, paths), [])
        if not found:
            # Written in another case, where that is no other photograph.
            alike = self._by_folded.get(key.casefold(), [])
            found = alike if len(alike) == 1 else []
        found = [image for image in found if image not in self.masks] or found
        same = [image for image in found if image.suffix.lower() == Path(name).suffix.lower()]
        return same or found

    def shorten(self, name: str, image: Path) -> str:
        """Return the id of a photograph: its name in the table, as far as `base` has it."""
        key, path = image_id(name), self._path(image)
        return key if path.endswith(key) else path


def image_id(name: str) -> str:
    """Return a file name or path without its suffix, as it is written on any system."""
    path = unicodedata.normalize("NFC", name.strip()).replace("\\", "/")
    stem, dot, suffix = path.rpartition(".")
    path = stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else path
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _tails(path: str) -> Iterator[str]:
    """Yield a path, then what is left of it without its first folders."""
    parts = path.split("/")
    return ("/".join(parts[start:]) for start in range(len(parts)))


def _find_images(folder: Path, problems: list[Problem]) -> tuple[list[Path], list[Path]]:
    """Return the photographs in a folder and its subfolders, and masks of them, each sorted.

    Hidden files and superpixels are passed over. A mask is called as a photograph with one of
    `MASK_SUFFIXES`, in the same folder or in one called `masks`; there also as the photograph.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"The folder {error.filename} cannot be read ({error.strerror}); make it readable or "
            "move it away."
        ) from error

    paths = []
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        # A link to a folder above would never end.
        folders[:] = [] if real in entered else [f for f in folders if not f.startswith(HIDDEN)]
        if real in entered:
            continue
        entered.add(real)
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() in UNREAD_SUFFIXES and not name.startswith(HIDDEN):
                problems.append(unread_problem(path))
            if name.startswith(HIDDEN) or path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if path.stem.lower().endswith(SUPERPIXELS):
                continue
            if path.is_file() and not _is_garbled(str(path)):
                paths.append(path)
            else:
                problems.append(
                    Problem(
                        "unusable file",
                        path,
                        f"{str(path)!a} is no file or has a name that is no text; rename or remove "
                        "it.",
                    )
                )
    apart = {path for path in paths if _among_masks(path.relative_to(folder))}
    outside = {path.stem for path in paths if path not in apart}
    beside: dict[Path, set[str]] = {}
    for path in paths:
        beside.setdefault(path.parent, set()).add(path.stem)

    def is_mask(path: Path) -> bool:
        endings = [ending for ending in MASK_SUFFIXES if path.stem.lower().endswith(ending)]
        stems = {ending: path.stem[: len(path.stem) - len(ending)] for ending in endings}
        if path in apart and not outside.isdisjoint(stems.values()):
            return True
        return any(ending and stem in beside[path.parent] for ending, stem in stems.items())

    masks = {path for path in paths if is_mask(path)}
    return sorted(path for path in paths if path not in masks), sorted(masks)


def _among_masks(path: Path) -> bool:
    """Return whether a path leads through a folder of masks."""
    return any(folder.lower() in ("mask", "masks") for folder in path.parts[:-1])


def _is_garbled(text: str) -> bool:
    """Return whether a text has control characters or bytes that are not UTF-8."""
    return any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text)


def _parts_of_folders(base: Path, images: Sequence[Path]) -> dict[Path, str]:
    """Return the part of each photograph that is in a folder of a part.

    Raises:
        UserError: two folders mean the same part.
    """
    parts: dict[Path, str] = {}
    folders: dict[str, str] = {}
    for image in images:
        folder = image.relative_to(base).parts[0]
        part = PART_NAMES.get(folder.casefold())
        if part is None or image.parent == base:
            continue
        if folders.setdefault(part, folder) != folder:
            raise UserError(
                f"The folders {folders[part]}/ and {folder}/ in {base} mean the same part; put "
                "their content into one of them."
            )
        parts[image] = part
    return parts


def _has_ids(path: Path) -> bool:
    """Return whether a text is a table with a usual column of ids."""
    try:
        header, _ = read_records(path, "")
    except UserError:
        return False
    return len(header) > 1 and any(plain_name(name) in IDS for name in header)


def _given_classes(classes: Any) -> tuple[str, ...]:
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise UserError(f"datamodule.classes={classes} must be a list, such as [nv,mel].")
    names = tuple(normalise_label(str(name)) or str(name) for name in classes)
    wrong = [problem.message for problem in _bad_classes(names, None, Path("datamodule.classes"))]
    if wrong:
        raise UserError(wrong[0])
    return names


def _sorted_classes(names: Iterable[str]) -> list[str]:
    """Return classes in the order of their labels: the alphabet's, numbers in theirs."""
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def _bad_classes(classes: Sequence[str], images: int | None, source: Path) -> Iterator[Problem]:
    """Yield what is wrong with classes, where `images` is the number of their images if known."""
    if len(classes) < 2:
        message = (
            f"{source} has {'only the class ' + classes[0] if classes else 'no classes'}, and "
            "diagnosis needs two; add folders or rows of another class, or name the table with "
            "datamodule.table=<file> or its column of the classes with "
            "datamodule.label_column=<column>."
        )
        yield Problem("too few classes", source, message)
    if images is not None and len(classes) == images > 2:
        message = (
            f"{source} has {images} classes, one for each image, such as {classes[0]}; name the "
            "column of the classes with datamodule.label_column=<column>."
        )
        yield Problem("a class for each image", source, message)
    alike: dict[str, str] = {}
    for name in classes:
        other = alike.get(name.casefold())
        alike[name.casefold()] = name
        if other is not None:
            message = (
                f"{source} has the classes {other} and {name}, which are equal but for upper and "
                "lower case; write one of them."
            )
            yield Problem("classes alike", source, message)
        if name in RESERVED or UNSAFE.match(name) or _is_garbled(name):
            message = (
                f"{source} has a class {name!a}, which cannot be the name of a column in tables of "
                "predictions; rename it."
            )
            yield Problem("class name", source, message)


def _unlabelled(table: Path, row: Diagnosis) -> Problem:
    return Problem(
        "image without label",
        table,
        f"{table} has no class for {row.name}; add it, or set datamodule.skip_unlabelled=true to "
        "leave such images out. In a table of 0 and 1, datamodule.rest_class=<class> is the class "
        "of rows of 0.",
    )


def _unknown_part(table: Path, row: Diagnosis) -> Problem:
    return Problem(
        "unknown part",
        table,
        f"{table} has the part {row.part!r} for {row.name}; write one of {', '.join(PART_NAMES)}, "
        "or choose another datamodule.split.",
    )


def _unclear(table: Path, row: Diagnosis, found: Sequence[Path]) -> Problem:
    return Problem(
        "several images of one row",
        found[1],
        f"{table} has a row of {row.name}, which may be {found[0]} or {found[1]}; write their paths"
        " into the table, or remove one of them.",
    )


def _two_rows(table: Path, first: Diagnosis, second: Diagnosis, image: Path) -> Problem:
    return Problem(
        "several rows of one image",
        table,
        f"{table} has two rows of {image}, {first.name} and {second.name}; remove one of them.",
    )


def _one_id(key: str, first: Path, second: Path) -> Problem:
    return Problem(
        "images of one id",
        second,
        f"Two images have the id {key}: {first} and {second}; remove one of them.",
    )
