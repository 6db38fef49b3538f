"""What every prediction of photographs leaves behind: a table, written while a bar moves."""

import csv
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from common.tables import gather_rows, write_rows

__all__ = ["PhotographWriter"]


class PhotographWriter(L.Callback):
    """Writes `predictions.csv`, a row for each photograph; rows of earlier runs stay.

    A photograph that could not be read, or whose prediction is not finite, has only an `error`.

    Args:
        folder: where to.
        total: photographs of all processes, for the progress bar.
        progress: whether to show one.
    """

    columns: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path, total: int, progress: bool = True) -> None:
        self.folder = folder
        self.total = total
        self.rows: list[dict[str, Any]] = []
        self._progress = progress

    @abstractmethod
    def describe(
        self, row: dict[str, Any], outputs: dict[str, Tensor], index: int, size: list[int]
    ) -> None:
        """Complete the row of a photograph.

        Args:
            row: to be completed.
            outputs: of the module for the batch, on the CPU.
            index: of the photograph in the batch.
            size: of the photograph, height and width in px.
        """

    def close(self) -> None:
        """End what is under way."""
        self._bar.stop()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar = Progress(
            TextColumn("Predicting"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.2f} images/s"),
            TimeRemainingColumn(),
            disable=not (self._progress and trainer.is_global_zero),
        )
        self._bar.start()
        share = -(-self.total // trainer.world_size)
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
            row: dict[str, Any] = dict.fromkeys(self.columns, "")
            row |= {key: batch[key][index] for key in ("file", "name", "error")}
            self.rows.append(row)
            if not row["error"] and not maps["probability"][index].isfinite().all():
                row["error"] = (
                    f"What the network predicts for {row['file']} is not finite; if it samples "
                    "masks, sampler.clip_x0=true keeps every step within bounds."
                )
            if not row["error"]:
                size = batch["size"][index].tolist()
                row |= {"height": size[0], "width": size[1], "seconds": round(seconds, 4)}
                self.describe(row, maps, index, size)
        rate = len(self.rows) / (time.perf_counter() - self._started)
        self._bar.update(self._task, advance=count, rate=rate)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()
        self.rows = gather_rows(self.rows)
        if trainer.is_global_zero:
            path = self.folder / "predictions.csv"
            rows = {row["name"]: row for row in [*_read_table(path, self.columns), *self.rows]}
            if rows:
                write_rows(path, sorted(rows.values(), key=lambda row: row["name"]))

    def on_exception(self, *args: Any) -> None:
        self.close()


def _read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of an earlier `predictions.csv`, none where there is none of this kind."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        return list(table) if tuple(table.fieldnames or ()) == columns else []
