"""Tables that come with datasets: metadata, diagnoses, splits."""

import codecs
import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from common.errors import UserError

__all__ = ["column_names", "read_records", "read_table"]

SEPARATORS = (",", ";", "\t")
# Records by which the separator is chosen.
SEEN = 50
# Of a message: columns that are named, and letters of a name.
MOST, LONGEST = 30, 40
# The first line with which Excel names the separator.
EXCEL_HINT = "sep="


def read_table(path: Path, key: str, columns: Sequence[str], source: str) -> dict[str, dict]:
    """Read a table with a row for each image, in any form that `read_records` reads.

    Args:
        path: the file.
        key: the column that names the image.
        columns: others that must be there.
        source: how to get the right file, for the message.

    Returns:
        The rows by their key, as texts by column, in the file's order.

    Raises:
        UserError: the file cannot be read, a column is missing, or an image has two rows.
    """
    header, records = read_records(path, source, (key, *columns))
    # As people write them, such as ID.
    others = {name: _alike(name, header) for name in (key, *columns) if name not in header}
    for row in records:
        row |= {name: row[other] for name, other in others.items() if other}
    header = [*header, *(name for name, other in others.items() if other)]
    missing = {key, *columns} - set(header)
    if missing:
        raise UserError(
            f"{path} has no columns {' and '.join(sorted(missing))}; {source}. Its columns are "
            f"{column_names(header)}."
        )
    rows: dict[str, dict] = {}
    for row in records:
        name = row[key]
        if name in rows:
            raise UserError(f"{path} has two rows of {name}; remove one of them.")
        if name:
            rows[name] = row
    return rows


def read_records(
    path: Path, source: str, columns: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, str]]]:
    """Read the header and the rows of a table.

    Fields are separated by commas, semicolons or tabs. The text is UTF-8 or UTF-16 of either byte
    order, with or without a byte order mark, otherwise Windows-1252.

    Args:
        path: the file.
        source: how to get the right file, for the message.
        columns: known names of columns; a separator that gives them all is preferred.

    Returns:
        The names of the columns, and the rows that are not blank as texts by column in the file's
        order. White space around names and texts is removed; a field that is missing is empty.

    Raises:
        UserError: the file cannot be read, two columns have one name, or a row has more fields
            than there are columns.
    """
    try:
        text = _decode(path.read_bytes())
        separator = _separator(text, columns)
        if text.startswith(EXCEL_HINT):
            text = text.partition("\n")[2]
        lines = [[field.strip() for field in fields] for fields in _reader(text, separator)]
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); {source}.") from error
    filled = [(number, fields) for number, fields in enumerate(lines, 1) if any(fields)]
    if not filled:
        return [], []
    (_, header), *rest = filled
    double = next((name for name in header if name and header.count(name) > 1), None)
    if double is not None:
        raise UserError(f"{path} has two columns {double}; rename or remove one of them.")
    records = []
    for number, fields in rest:
        if any(fields[len(header) :]):
            raise UserError(
                f"Row {number} of {path} has {len(fields)} fields, and the header has "
                f"{len(header)}; put fields that hold a separator into quotes."
            )
        padded = fields + [""] * (len(header) - len(fields))
        records.append({name: text for name, text in zip(header, padded, strict=False) if name})
    return header, records


def _alike(name: str, header: Sequence[str]) -> str | None:
    """Return the column that differs from a name in its case alone."""
    found = [column for column in header if column.casefold() == name.casefold()]
    return found[0] if len(found) == 1 else None


def column_names(header: Sequence[str]) -> str:
    """Return the names of a table's columns for a message, without what is too long for one."""
    names = [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in header if name]
    more = [f"{len(names) - MOST} more"] if len(names) > MOST else []
    return ", ".join([*names[:MOST], *more]) or "none"


def _reader(text: str, separator: str) -> Iterator[list[str]]:
    # A quote that is never closed would take all further rows into one field.
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)


def _decode(content: bytes) -> str:
    """Return the text of a file.

    Raises:
        csv.Error: it is none.
    """
    # Tables begin with plain letters or a quote: of each such letter UTF-16 has one byte zero.
    start = content[:2]
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    elif len(start) == 2 and start.count(0) == 1:
        encoding = "utf-16-le" if start[1] == 0 else "utf-16-be"
    else:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            encoding = "cp1252"
    text = content.decode(encoding, errors="replace")
    if "\0" in text or "\ufffe" in text:
        raise csv.Error("it is no text")
    return text


def _separator(text: str, columns: Sequence[str]) -> str:
    """Return what separates the fields of a table."""
    if text.startswith(EXCEL_HINT):
        hint = text[len(EXCEL_HINT) : len(EXCEL_HINT) + 1]
        if hint in SEPARATORS:
            return hint

    def fit(separator: str) -> tuple[bool, int, int]:
        seen: list[list[str]] = []
        # Other separators break the rules of quotes.
        with contextlib.suppress(csv.Error):
            seen.extend(filter(any, islice(_reader(text, separator), SEEN)))
        header = [name.strip() for name in seen[0]] if seen else []
        # A name of a column may hold another separator, and then rarely every row as many.
        alike = sum(len(fields) == len(header) for fields in seen) if len(header) > 1 else 0
        folded = {name.casefold() for name in header}
        known = bool(columns) and {name.casefold() for name in columns} <= folded
        return known, alike, len(header)

    return max(SEPARATORS, key=fit)
