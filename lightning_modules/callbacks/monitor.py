"""How training goes: its rate, the size of its gradients, its speed and its memory."""

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

__all__ = ["Monitor", "gradient_norm", "process_memory"]


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the l2 norm of all gradients of the parameters that an optimizer changes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Monitor(L.Callback):
    """Logs how training goes, in the rows of `train/loss`: every `trainer.log_every_n_steps`.

    - `train/lr`: the learning rate of the first parameter group.
    - `train/grad_norm`: the l2 norm of the gradients of the step, unscaled and before clipping.
    - `train/images_per_second`: of all processes since the last such row. What validates and what
      is written with a validation does not count. A run's first step has none.
    - `system/memory_gb`: in 1e9 bytes; on CUDA the most that tensors have taken so far, else what
      this process takes now.
    """

    def __init__(self) -> None:
        self._images = 0
        self._since: float | None = None
        self._paused: float | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._since is not None and self._paused is not None:
            self._since += time.monotonic() - self._paused
        self._paused = None
        self._images += len(batch["id"])

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:
            # The Trainer would round a rate such as 1e-4 to the nearest float32.
            rate = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
            pl_module.log("train/lr", rate)
            pl_module.log("train/grad_norm", gradient_norm(optimizer))
            cuda = pl_module.device.type == "cuda"
            taken = torch.cuda.max_memory_allocated(pl_module.device) if cuda else process_memory()
            pl_module.log("system/memory_gb", taken / 1e9)
            if self._since is not None:
                # Each process is dealt equally many.
                images = self._images * trainer.world_size
                speed = images / max(time.monotonic() - self._since, 1e-9)
                pl_module.log("train/images_per_second", speed)
            self._since = None
        # From here in one step to here in another, so that each image counts with a whole step.
        if self._since is None:
            self._images, self._since = 0, time.monotonic()


def process_memory() -> int:
    """Return the memory in bytes that this process takes now; on macOS the most it has taken."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # Only Linux has this file.
        import resource  # Windows has none.

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * os.sysconf("SC_PAGE_SIZE")
