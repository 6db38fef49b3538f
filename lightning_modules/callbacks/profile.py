"""What a training step spends its time on."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity

from common.files import atomic_path, write_text_atomic

__all__ = ["Profile"]

OPERATIONS = 10


class Profile(L.Callback):
    """Profiles a few training steps: forward, loss, backward, optimizer and moving average.

    Writes `profile/operations.txt`, the ten dearest operations, which is also printed, and
    `profile/trace.json`, which opens in chrome://tracing or ui.perfetto.dev.

    Args:
        folder: the run folder.
        skip: steps before, in which memory is allocated and kernels are chosen.
        steps: steps that are profiled.
    """

    def __init__(self, folder: str | Path, skip: int = 2, steps: int = 3) -> None:
        self.folder = Path(folder) / "profile"
        self.skip = skip
        self.steps = steps
        self._profiler: torch.profiler.profile | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and trainer.fit_loop.total_batch_idx == self.skip:
            kinds = [ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        last = self.skip + self.steps - 1
        if self._profiler is None or trainer.fit_loop.total_batch_idx < last:
            return
        self._profiler.stop()
        key = f"self_{pl_module.device.type}_time_total"
        table = self._profiler.key_averages().table(sort_by=key, row_limit=OPERATIONS)
        write_text_atomic(self.folder / "operations.txt", table)
        with atomic_path(self.folder / "trace.json") as path:
            self._profiler.export_chrome_trace(str(path))
        Console(soft_wrap=True, highlight=False).print(table, markup=False)
        self._profiler = None
