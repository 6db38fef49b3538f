"""The resolved config inside every checkpoint."""

from typing import Any

import lightning as L

__all__ = ["ConfigRecord"]


class ConfigRecord(L.Callback):
    """Stores the run's config, plain types only, under `config` in every checkpoint.

    Args:
        config: resolved and free of any library's types.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
