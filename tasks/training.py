"""The Trainer of a run, with its callbacks and loggers."""

import os
import warnings
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
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
        UserError: the Trainer, a callback or a logger refuses an argument.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("WANDB_SILENT", "true")
    callbacks = [
        _instantiate(settings, f"callbacks.{name}")
        for name, settings in (config["callbacks"] or {}).items()
        if settings
    ]
    loggers = [
        _instantiate(settings, f"logger.{name}")
        for name, settings in (config["logger"] or {}).items()
        if settings
    ]
    trainer = _instantiate(
        config["trainer"], "trainer", callbacks=[*callbacks, ConfigRecord(config)], logger=loggers
    )
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(config)
    return trainer


def _instantiate(settings: dict[str, Any], key: str, **arguments: Any) -> Any:
    try:
        return instantiate(settings, **arguments)
    except InstantiationException as error:
        reason = error.__cause__ or error
        raise UserError(f"{key} is refused by {settings['_target_']}: {reason}") from error
