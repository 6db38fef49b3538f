"""The Trainer of a run, with its callbacks and loggers."""

import logging
import os
import secrets
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from common.errors import UserError
from lightning_modules.callbacks import ConfigRecord
from tasks.checkpoints import AtomicCheckpointIO

__all__ = ["build_trainer", "log_config", "name_wandb_run"]

# What Lightning says on every run and a user can do nothing about.
_NOISE = (
    ".*does not have many workers.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*smaller than the logging interval.*",
    ".*GPU available but not used.*",
    # A teacher's own network, where only heads on it are trained.
    ".*module.s. in eval mode at the start of training.*",
    # Scores are merged over processes by their metric, before they are logged.
    ".*when logging on epoch level in distributed setting.*",
    # Ours is: the datamodule leaves out what the epoch has had.
    ".*your dataloader is not resumable.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)


def build_trainer(config: dict[str, Any], *callbacks: L.Callback) -> L.Trainer:
    """Build the Trainer from the `trainer`, `callbacks` and `logger` groups.

    Args:
        config: of the run.
        callbacks: further ones, after those of the config.

    Raises:
        UserError: the Trainer, a callback or a logger refuses an argument.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    # Devices, limits and advertisements.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    os.environ.setdefault("WANDB_SILENT", "true")
    # W&B keeps the pictures of an offline run's tables in the home folder unless told otherwise.
    os.environ["WANDB_DATA_DIR"] = str(Path(config["paths"]["run"]) / "wandb")
    chosen = [
        _instantiate(settings, f"callbacks.{name}")
        for name, settings in (config["callbacks"] or {}).items()
        if settings and (name != "progress_bar" or config["trainer"]["enable_progress_bar"])
    ]
    loggers = [
        _instantiate(settings, f"logger.{name}")
        for name, settings in (config["logger"] or {}).items()
        if settings
    ]
    return _instantiate(
        config["trainer"],
        "trainer",
        callbacks=[*chosen, *callbacks, ConfigRecord(config)],
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
    )


def log_config(trainer: L.Trainer, config: dict[str, Any]) -> None:
    """Hand the config to the loggers that show one; the run folder has it as a file."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


def name_wandb_run(config: dict[str, Any]) -> None:
    """Give a new run its W&B id, under which it goes on when it is resumed."""
    settings = (config["logger"] or {}).get("wandb")
    if settings and settings.get("id") is None:
        settings["id"] = secrets.token_hex(4)


def _instantiate(settings: dict[str, Any], key: str, **arguments: Any) -> Any:
    try:
        return instantiate(settings, **arguments)
    except InstantiationException as error:
        reason = error.__cause__ or error
        raise UserError(f"{key} is refused by {settings['_target_']}: {reason}") from error
