"""Tables of diagnoses in the forms in which people keep them."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from datamodules.tables import column_names, read_records

__all__ = [
    "IDS",
    "Columns",
    "Diagnosis",
    "join_groups",
    "normalise_label",
    "plain_name",
    "read_diagnoses",
]

# Usual names of columns, in lower case with underscores.
IDS = (
    *("image_id", "isic_id", "image_name", "img_id", "image", "img", "filename", "file_name"),
    *("file", "image_path", "filepath", "file_path", "path", "id"),
)
LABELS = (
    *("label", "class", "dx", "diagnosis", "diagnostic", "target", "benign_malignant"),
    "diagnosis_1",
)
GROUPS = ("lesion_id", "lesion", "group", "group_id")
PATIENTS = ("patient_id", "patient")
SPLITS = ("split", "partition", "subset")
# Which of several labels is meant, by columns that only these tables have: ISIC 2020, and what the
# ISIC archive's client writes.
KNOWN_TABLES = (
    ({"image_name", "benign_malignant", "target"}, "benign_malignant"),
    ({"isic_id", "diagnosis_1", "diagnosis_2"}, "diagnosis_1"),
)
MISSING = {"", "nan", "na", "n/a", "nat", "none", "null", "<na>"}


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table of diagnoses; None looks for the usual names.

    Attributes:
        id: file name or id of the photograph.
        label: its class, or several columns of 0 and 1, one for each class.
        group, patient: lesion and patient, whose images stay together.
        split: the part, such as `train`.
    """

    id: str | None = None
    label: str | Sequence[str] | None = None
    group: str | None = None
    patient: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """A row of a table of diagnoses.

    Attributes:
        name: id or file name of the photograph as written.
        label: its class, None where there is none.
        lesion, patient: None where unknown.
        part: text of the split column, None without such a column.
    """

    name: str
    label: str | None
    lesion: str | None = None
    patient: str | None = None
    part: str | None = None


def read_diagnoses(
    path: Path, columns: Columns, known: Callable[[str], bool], rest_class: str | None = None
) -> list[Diagnosis]:
    """Read the rows of a table of diagnoses.

    Args:
        path: a table in any form that `read_records` reads.
        columns: what its columns are.
        known: whether there is a photograph of this id or file name; of several usual columns of
            ids the one with the most photographs is taken.
        rest_class: the class of rows that are 0 in every column of a class.

    Raises:
        UserError: the table cannot be read, a column is missing or ambiguous, that of ids is empty,
            or a row is 1 in several columns of classes.
    """
    hint = "give datamodule.table a table with a row for each photograph"
    given = [columns.id, columns.group, columns.patient, columns.split]
    given += [columns.label] if isinstance(columns.label, str) else columns.label or ()
    header, rows = read_records(path, hint, [name for name in given if name])
    if not rows:
        raise UserError(f"{path} has no rows; {hint}.")
    table = _Table(path, header, rows)
    id_column = table.find_ids(columns.id, known)
    if not any(row[id_column] for row in rows):
        raise UserError(
            f"{path} has nothing in its column {id_column}; choose that of the photographs with "
            f"datamodule.id_column=<column>. Its columns are {column_names(table.header)}."
        )
    lesion = table.find("group_column", columns.group, GROUPS)
    patient = table.find("patient_column", columns.patient, PATIENTS)
    split = table.find("split_column", columns.split, SPLITS)
    used = [id_column, lesion, patient, split]
    labels = table.labels(columns.label, [name for name in used if name], rest_class)

    def value(row: dict[str, str], column: str | None) -> str | None:
        return None if column is None or _missing(row[column]) else row[column]

    return [
        Diagnosis(
            row[id_column],
            label,
            value(row, lesion),
            value(row, patient),
            None if split is None else row[split],
        )
        for row, label in zip(rows, labels, strict=True)
        if row[id_column]
    ]


class _Table:
    """A table whose columns are being found."""

    def __init__(self, path: Path, header: list[str], rows: list[dict[str, str]]) -> None:
        self.path = path
        self.header = [name for name in header if name]
        self.rows = rows

    def find(self, key: str, given: str | None, usual: Sequence[str]) -> str | None:
        """Return the column of a key, None where there is no such column."""
        if given is not None:
            return self._given(key, given)
        found = self._usual(usual)
        if len(found) > 1:
            raise self._ambiguous(key, found)
        return found[0] if found else None

    def find_ids(self, given: str | None, known: Callable[[str], bool]) -> str:
        """Return the column that names the photographs."""
        if given is not None:
            return self._given("id_column", given)
        found = self._usual(IDS)
        if not found:
            raise self._unknown("id_column", "file names or ids of the photographs")
        return max(found, key=lambda name: sum(known(row[name]) for row in self.rows))

    def labels(
        self, given: str | Sequence[str] | None, used: Sequence[str], rest: str | None
    ) -> list[str | None]:
        """Return the class of each row."""
        if given is not None and not isinstance(given, str):
            return self._one_hot([self._given("label_column", str(name)) for name in given], rest)
        column = self._given("label_column", given) if given is not None else self._find_label()
        if column is not None:
            return [normalise_label(row[column]) for row in self.rows]
        hot = [name for name in self.header if name not in used and self._is_hot(name)]
        if not hot:
            raise self._unknown("label_column", "the diagnosis")
        return self._one_hot(hot, rest)

    def _find_label(self) -> str | None:
        plain = {plain_name(name): name for name in self.header}
        for needed, label in KNOWN_TABLES:
            if needed <= plain.keys():
                return plain[label]
        found = self._usual(LABELS)
        if len(found) > 1:
            raise self._ambiguous("label_column", found)
        return found[0] if found else None

    def _is_hot(self, column: str) -> bool:
        """Return whether a column holds 0 and 1 alone; single cells may be empty."""
        bits = [_bit(row[column]) for row in self.rows if row[column]]
        return bool(bits) and None not in bits

    def _one_hot(self, columns: Sequence[str], rest: str | None) -> list[str | None]:
        labels: list[str | None] = []
        for number, row in enumerate(self.rows, 2):
            bits = {name: _bit(row[name]) for name in columns}
            hot = [name for name, bit in bits.items() if bit]
            if None in bits.values() or len(hot) > 1:
                wrong = hot if len(hot) > 1 else [name for name in columns if bits[name] is None]
                cells = " and ".join(f"{name}={row[name]}" for name in wrong)
                raise UserError(
                    f"Row {number} of {self.path} has {cells}, where one column of the classes "
                    f"{column_names(columns)} should be 1 and the others 0; correct it, or name "
                    "the columns of the classes as datamodule.label_column=[<column>,<column>]. "
                    f"Its columns are {column_names(self.header)}."
                )
            labels.append(hot[0] if hot else rest)
        return labels

    def _given(self, key: str, name: str) -> str:
        name = str(name)
        if name in self.header:
            return name
        alike = [column for column in self.header if plain_name(column) == plain_name(name)]
        if len(alike) != 1:
            raise UserError(
                f"datamodule.{key}={name} is no column of {self.path}; its columns are "
                f"{column_names(self.header)}."
            )
        return alike[0]

    def _usual(self, names: Sequence[str]) -> list[str]:
        found = [column for column in self.header if plain_name(column) in names]
        return sorted(found, key=lambda column: names.index(plain_name(column)))

    def _ambiguous(self, key: str, found: Sequence[str]) -> UserError:
        return UserError(
            f"{self.path} has the columns {' and '.join(found)}; choose one with "
            f"datamodule.{key}=<column>. Its columns are {column_names(self.header)}."
        )

    def _unknown(self, key: str, what: str) -> UserError:
        return UserError(
            f"{self.path} has no column with a usual name for {what}; set datamodule.{key}=<column>"
            f". Its columns are {column_names(self.header)}."
        )


def normalise_label(text: str) -> str | None:
    """Return a class as it is compared: 1.0 is 1, white space is single; None where missing."""
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if _missing(text):
        return None
    number = _number(text)
    return str(int(number)) if number is not None and number == int(number) else text


def join_groups(rows: Sequence[Diagnosis]) -> list[str]:
    """Return a group for each row: rows of one lesion or of one patient have the same.

    Lesions that share a patient, and patients that share a lesion, are one group; a row without
    both is a group of its own.
    """
    parent: dict[str, str] = {}

    def top(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    nodes = []
    for row in rows:
        own = [f"patient {row.patient}"] if row.patient else []
        own += [f"lesion {row.lesion}"] if row.lesion else []
        own = own or [f"image {row.name}"]
        nodes.append(own[0])
        # The smaller name stays, so that the order of the rows does not matter.
        tops = sorted({top(node) for node in own})
        for other in tops[1:]:
            parent[other] = tops[0]
    return [top(node) for node in nodes]


def plain_name(name: str) -> str:
    """Return the name of a column as usual names are written: `Image-ID` is `image_id`."""
    return "_".join(name.casefold().replace("-", " ").split())


def _missing(text: str) -> bool:
    return text.casefold() in MISSING


def _number(text: str) -> float | None:
    """Return a number, also with a decimal comma; None for other texts and for huge numbers."""
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    return number if abs(number) < 1e15 and "_" not in text else None


def _bit(text: str) -> bool | None:
    """Return whether a text is 1 or 0, in numbers or words; None for anything else."""
    number = {"true": 1.0, "false": 0.0}.get(text.casefold(), _number(text))
    return bool(number) if number in (0, 1) else None
