"""The Trainer of a run, with its callbacks and loggers."""

import os
import warnings
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger

from common.errors import UserError
from lightning_modules.callbacks import ConfigRecord

__all__ = ["build_trainer"]

# What Lightning says on every run and a user can do nothing about.
_NOISE = (
    ".*does not have many workers.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*smaller than the logging interval.*",
    ".*GPU available but not used.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)


def build_trainer(config: dict[str, Any]) -> L.Trainer:
    """Build the Trainer from the `trainer`, `callbacks` and `logger` groups.

    Raises:
        UserError: Lightning refuses an argument.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("WANDB_SILENT", "true")
    callbacks = [instantiate(c) for c in (config["callbacks"] or {}).values() if c]
    loggers = [instantiate(c) for c in (config["logger"] or {}).values() if c]
    try:
        trainer = instantiate(
            config["trainer"],
            callbacks=[*callbacks, ConfigRecord(config)],
            logger=loggers,
        )
    except Exception as error:
        # Hydra wraps whatever the Trainer says of its arguments.
        raise UserError(f"trainer is refused by Lightning: {error}") from error
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(config)
    return trainer
