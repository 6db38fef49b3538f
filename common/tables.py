"""Tables of rows as CSV files, from one process or several."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.files import write_text_atomic
from common.text import cell

__all__ = ["gather_rows", "write_rows"]


def gather_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all processes of a distributed run, in every one of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys as a CSV with a header; texts are as `cell` makes them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: cell(v) if isinstance(v, str) else v for k, v in row.items()})
    write_text_atomic(path, text.getvalue())
