"""The images that a run learned from, inside every checkpoint."""

from typing import Any

import lightning as L

__all__ = ["SeenImages"]


class SeenImages(L.Callback):
    """Stores `record`, plain types and tensors only, under `seen_images` in every checkpoint.

    A checkpoint that is copied away from its run folder then still tells whether it may teach a
    student.

    Attributes:
        record: set after the data is; nothing is stored before.
    """

    record: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.record is not None:
            checkpoint["seen_images"] = self.record
