"""The losses and scores of a run as a table."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from common.errors import UserError
from common.files import write_text_atomic

__all__ = ["MetricsFile"]


class MetricsFile(Logger):
    """Keeps `metrics.csv`: a row each time something is logged, a column for each key.

    The file is always whole, and a resumed run continues it as if it had never been stopped; the
    Trainer's own logger for such files deletes it then.

    Args:
        folder: the run folder.
        interval: least time in seconds between two writings; the last one is when the run ends.
    """

    def __init__(self, folder: str | Path, interval: float = 30) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.interval = interval
        self._rows: list[dict[str, Any]] = []
        self._written = time.monotonic()

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Do nothing: the run folder has the config as a file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        self._rows.append({**values, "step": step})

    @rank_zero_only
    def save(self) -> None:
        """Write the file if it is time; the Trainer calls this whenever it has logged."""
        if time.monotonic() - self._written >= self.interval:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the file now."""
        self._written = time.monotonic()
        if not self._rows:
            return
        text = io.StringIO()
        columns = sorted(set().union(*self._rows))
        writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text_atomic(self.path, text.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.write()

    @rank_zero_only
    def restore(self, steps: int, validated: bool) -> None:
        """Read the rows that a checkpoint knows of.

        Args:
            steps: optimizer steps that the checkpoint has made; rows of later ones are dropped.
            validated: whether the checkpoint has seen the validation after its last step.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.is_file():
            return
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, strict=True))
            numbers = [int(row["step"]) for row in rows]
            if any(None in row or None in row.values() for row in rows):
                raise ValueError("rows of other lengths")
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(
                f"{self.path} is damaged ({type(error).__name__}), so the run cannot continue it; "
                "restore it, or remove it to go on without the earlier rows."
            ) from error
        for step, row in zip(numbers, rows, strict=True):
            # A step's own row comes before what its validation says.
            known = validated or row.get("train/loss")
            if step < steps - 1 or (step == steps - 1 and known):
                self._rows.append({key: value for key, value in row.items() if value != ""})
