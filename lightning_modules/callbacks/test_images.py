"""A table with a row per test image."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L

from common.tables import gather_rows, write_rows

__all__ = ["TestImages", "TestRows"]


class TestRows(L.Callback):
    """Collects a row of each test image, and hands them over when the test ends.

    Subclasses say what is in a row and what becomes of them.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    @abstractmethod
    def rows(
        self, pl_module: L.LightningModule, outputs: dict[str, Any], batch: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Yield a row with an `id` for each image of a batch, or none at all."""

    @abstractmethod
    def write(
        self, trainer: L.Trainer, pl_module: L.LightningModule, rows: list[dict[str, Any]]
    ) -> None:
        """Write the rows of all processes, sorted by `id`; only one process is asked to."""

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
        self._rows.extend(self.rows(pl_module, outputs, batch))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows = gather_rows(self._rows)
        if trainer.is_global_zero and rows:
            self.write(trainer, pl_module, sorted(rows, key=lambda row: row["id"]))


class TestImages(TestRows):
    """Writes `test_images.csv`: the id of each test image and its values in `per_image`.

    For masks they are the scores at one or both resolutions, and `finite`, which is 0 where a
    prediction is not finite and therefore has the worst scores.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "test_images.csv"

    def rows(
        self, pl_module: L.LightningModule, outputs: dict[str, Any], batch: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        columns = {name: values.tolist() for name, values in outputs["per_image"].items()}
        for index, sample in enumerate(batch["id"]):
            yield {"id": sample} | {k: v[index] for k, v in columns.items()}

    def write(
        self, trainer: L.Trainer, pl_module: L.LightningModule, rows: list[dict[str, Any]]
    ) -> None:
        write_rows(self.path, rows)
