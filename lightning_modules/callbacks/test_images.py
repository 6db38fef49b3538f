"""A table with a row per test image."""

from pathlib import Path
from typing import Any

import lightning as L

from common.tables import gather_rows, write_rows

__all__ = ["TestImages"]


class TestImages(L.Callback):
    """Writes `test_images.csv`: the id of each test image and what `test_step` says of it.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "test_images.csv"
        self._rows: list[dict[str, Any]] = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows = []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        *args: Any,
    ) -> None:
        columns = {name: values.tolist() for name, values in outputs["per_image"].items()}
        for index, sample in enumerate(batch["id"]):
            self._rows.append({"id": sample} | {k: v[index] for k, v in columns.items()})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows = gather_rows(self._rows)
        if trainer.is_global_zero and rows:
            write_rows(self.path, sorted(rows, key=lambda row: row["id"]))
