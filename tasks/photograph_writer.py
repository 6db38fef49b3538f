"""What every prediction of photographs leaves behind: a table, written while a bar moves."""

import csv
import hashlib
import io
import os
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from common.errors import UserError
from common.files import append_line, lock_path, locked, write_text_atomic
from common.tables import gather_rows
from common.text import cell, from_cell, printable
from datamodules.photographs import TABLE

__all__ = ["PhotographWriter", "Predicted"]

Row = dict[str, Any]


class Predicted(NamedTuple):
    """A photograph that was predicted.

    Attributes:
        file: its path.
        name: what is written of it begins with this, in the output folder.
        size: height and width in px.
    """

    file: Path
    name: str
    size: tuple[int, int]


class PhotographWriter(L.Callback):
    """Writes `predictions.csv`, a row for each photograph as soon as it is done.

    Rows of other photographs in the table stay; at the end it is sorted by name. A photograph that
    could not be read or written, or whose prediction is not finite, has only an `error`. Names are
    printable, and those that a spreadsheet would run as a formula begin with an apostrophe.

    Args:
        folder: where to.
        settings: digest of all that shapes a prediction; the column of that name also tells whether
            a photograph has changed.
        names: of the photographs of all processes.
        progress: whether to show one.
    """

    # Between file, name, height, width and seconds, settings, remark, error.
    described: ClassVar[tuple[str, ...]]
    # What is written of each photograph beside its row.
    templates: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, folder: Path, settings: str, names: Sequence[str], progress: bool = True
    ) -> None:
        self.folder = folder
        self.table = folder / TABLE
        self.settings = settings
        self.names = list(names)
        self.rows: list[Row] = []
        self._progress = progress
        self._bar = Progress(disable=True)

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the table."""
        ends = ("seconds", "settings", "remark", "error")
        return ("file", "name", "height", "width", *self.described, *ends)

    @abstractmethod
    def describe(
        self, row: Row, outputs: dict[str, Tensor], index: int, photograph: Predicted
    ) -> None:
        """Complete the row of a photograph and hand it to `record`, now or later.

        Args:
            row: to be completed.
            outputs: of the module for the batch, on the CPU.
            index: of the photograph in the batch.
            photograph: which it is.
        """

    def done(self, files: Iterable[Path], names: Iterable[str]) -> set[str]:
        """Return the names of the photographs that were predicted with the same settings.

        They have their row, without error, and all their files, and have not changed since.

        Raises:
            UserError: the table is of another kind, or has another photograph of one of the names.
        """
        rows = {row["name"]: row for row in self._read_table()}
        finished = set()
        for file, name in zip(files, names, strict=True):
            row = rows.get(cell(name))
            if row is None:
                continue
            if not _same_file(row["file"], file) and Path(from_cell(row["file"])).is_file():
                raise UserError(
                    f"{printable(str(self.folder))} has a prediction of {row['file']}, which that "
                    f"of {printable(str(file))} would replace; give another output."
                )
            if (
                not row["error"]
                and row["settings"] == self._digest(file)
                and _same_file(row["file"], file)
                and all(_has_content(self.folder / t.format(name)) for t in self.templates)
            ):
                finished.add(name)
        return finished

    def _digest(self, file: Path) -> str:
        """Return a digest of the settings and of the photograph's size and time of change."""
        try:
            known = file.stat()
        except OSError:
            return self.settings
        text = f"{self.settings} {known.st_size} {known.st_mtime_ns}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def prepare(self) -> None:
        """Remove the rows of photographs that are about to be predicted, and half-written files.

        Raises:
            UserError: the table is of another kind.
        """
        coming = {cell(name) for name in self.names}
        unfinished: dict[Path, set[str]] = {self.folder: {TABLE}}
        for path in (self.folder / t.format(name) for name in self.names for t in self.templates):
            unfinished.setdefault(path.parent, set()).add(path.name)
        with locked(self.table):
            self._write_table([row for row in self._read_table() if row["name"] not in coming])
            for folder, files in unfinished.items():
                for path in folder.glob(".*.part"):
                    # .<name>.<eight characters>.part
                    if path.name[1:].rsplit(".", 2)[0] in files:
                        path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Sort the table by name, once nothing is under way."""
        with locked(self.table):
            self._write_table(self._read_table())
            lock_path(self.table).unlink(missing_ok=True)

    def record(self, row: Row) -> None:
        """Write the row of a photograph that is done."""
        text = {key: cell(v) if isinstance(v, str) else v for key, v in row.items()}
        append_line(self.table, _csv([text], self.columns).rstrip("\n"))

    def close(self) -> None:
        """End what is under way."""
        self._bar.stop()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.prepare()
        trainer.strategy.barrier()
        self._bar = Progress(
            TextColumn("Predicting"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.2f} images/s"),
            TimeRemainingColumn(),
            disable=not (self._progress and trainer.is_global_zero),
        )
        self._bar.start()
        share = -(-len(self.names) // trainer.world_size)
        self._task = self._bar.add_task("", total=share, rate=0.0)
        self._started = time.perf_counter()

    def on_predict_batch_start(self, *args: Any) -> None:
        self._batch_started = time.perf_counter()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Any],
        *args: Any,
    ) -> None:
        count = len(batch["id"])
        # Copying to the host waits until the device has done all of it.
        maps = {k: v.float().cpu() for k, v in outputs.items() if isinstance(v, Tensor)}
        seconds = (time.perf_counter() - self._batch_started) / count
        for index in range(count):
            row: Row = dict.fromkeys(self.columns, "")
            row |= {key: batch[key][index] for key in ("file", "name", "remark", "error")}
            row["settings"] = self._digest(Path(row["file"]))
            self.rows.append(row)
            if not row["error"] and not all(v[index].isfinite().all() for v in maps.values()):
                row["error"] = (
                    f"What the network predicts for {row['file']} is not finite; if it samples "
                    "masks, sampler.clip_x0=true keeps every step within bounds."
                )
            if row["error"]:
                self.record(row)
                continue
            size = tuple(batch["size"][index].tolist())
            row |= {"height": size[0], "width": size[1], "seconds": round(seconds, 4)}
            photograph = Predicted(Path(row["file"]), row["name"], size)
            self.describe(row, maps, index, photograph)
        rate = len(self.rows) / (time.perf_counter() - self._started)
        self._bar.update(self._task, advance=count, rate=rate)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()
        # Waits for the other processes, too.
        self.rows = gather_rows(self.rows)
        if trainer.is_global_zero:
            self.finish()

    def on_exception(self, *args: Any) -> None:
        self.close()

    def _read_table(self) -> list[Row]:
        """Return the whole rows of the table, none where there is no table.

        Raises:
            UserError: its columns are others.
        """
        if not self.table.is_file():
            return []
        text = self.table.read_bytes()
        # A killed process may have left the beginning of a row.
        lines = text[: text.rfind(b"\n") + 1].decode("utf-8-sig", errors="replace")
        table = csv.DictReader(io.StringIO(lines))
        if table.fieldnames and tuple(table.fieldnames) != self.columns:
            raise UserError(
                f"{printable(str(self.table))} has other columns than this prediction writes; give "
                "another output, or move that file."
            )
        return [row for row in table if None not in row and None not in row.values()]

    def _write_table(self, rows: Sequence[Row]) -> None:
        """Write the table, sorted, with the last row of each name."""
        named = {row["name"]: row for row in rows}
        ordered = sorted(named.values(), key=lambda row: row["name"])
        header = dict(zip(self.columns, self.columns, strict=True))
        write_text_atomic(self.table, _csv([header, *ordered], self.columns))


def _csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _same_file(shown: str, file: Path) -> bool:
    return shown == cell(str(file)) or os.path.abspath(shown) == printable(os.path.abspath(file))
