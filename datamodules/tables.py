"""Tables that come with datasets: metadata, diagnoses, splits."""

import csv
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError

__all__ = ["read_table"]


def read_table(path: Path, key: str, columns: Sequence[str], source: str) -> dict[str, dict]:
    """Read a table separated by commas or tabs, a row for each image.

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
    rows: dict[str, dict] = {}
    try:
        # A file that is no text has no such columns either, and is refused for that.
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            separator = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            table = csv.DictReader(file, delimiter=separator)
            missing = {key, *columns} - set(table.fieldnames or ())
            if missing:
                raise UserError(f"{path} has no columns {' and '.join(sorted(missing))}; {source}.")
            for row in table:
                name = (row[key] or "").strip()
                if name in rows:
                    raise UserError(f"{path} has two rows of {name}; remove one of them.")
                if name:
                    rows[name] = {column: (row[column] or "").strip() for column in row if column}
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); {source}.") from error
    return rows
