"""The Trainer of a run, with its callbacks and loggers."""

import logging
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf

from common.cluster import external_launch, slurm_job
from common.errors import UserError, check_choice
from common.runs import read_results
from lightning_modules.callbacks import ConfigRecord
from tasks.batch_norm import SyncedBatchNorm
from tasks.checkpoints import AtomicCheckpointIO

__all__ = ["build_trainer", "name_wandb_run", "shown"]

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
    ".*`srun` command is available.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)
_STRATEGIES = (
    *("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"),
    "single_device",
)


def build_trainer(config: dict[str, Any], *callbacks: L.Callback) -> L.Trainer:
    """Build the Trainer from the `trainer`, `callbacks` and `logger` groups.

    Args:
        config: of the run.
        callbacks: further ones, after those of the config.

    Raises:
        UserError: the Trainer, a callback or a logger refuses an argument, the strategy is none of
            those that work here, or torchrun or srun has started another number of processes than
            the config says.
    """
    settings = dict(config["trainer"])
    _check_strategy(settings["strategy"])
    plugins = [AtomicCheckpointIO(), *_join_launched(settings)]
    # The Trainer's own way is for GPUs alone.
    if settings.pop("sync_batchnorm"):
        plugins.append(SyncedBatchNorm())
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
    asked = _wandb_settings(config).get("log_model", False)
    check_choice("logger.wandb.log_model", asked, (True, False))
    loggers = [
        # W&B's logger would do without the scores of the test and forget about resumed runs.
        _instantiate({k: v for k, v in settings.items() if k != "log_model"}, f"logger.{name}")
        for name, settings in (config["logger"] or {}).items()
        if settings
    ]
    return _instantiate(
        settings,
        "trainer",
        callbacks=[*chosen, *callbacks, ConfigRecord(config)],
        logger=loggers,
        plugins=plugins,
    )


@contextmanager
def shown(trainer: L.Trainer, config: dict[str, Any], results: Mapping[str, Any]) -> Iterator[None]:
    """Show a run in its loggers, from its config to its best checkpoint.

    W&B is told how it ended, so that what runs next in this process is a run of its own.

    Args:
        trainer, config: of the run.
        results: as in `results.json`.
    """
    _log_config(trainer, config, results)
    try:
        yield
    except BaseException:
        _finish_wandb(trainer, exit_code=1)
        raise
    if _wandb_settings(config).get("log_model"):
        _log_best(trainer, config)
    _finish_wandb(trainer, exit_code=0)


def _log_config(trainer: L.Trainer, config: dict[str, Any], results: Mapping[str, Any]) -> None:
    """Hand config, code revision and command to the loggers that show them."""
    origin = {key: results[key] for key in ("revision", "command")}
    described = {**config, **origin, "run_folder": config["paths"]["run"]}
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_hyperparams(described)
            if isinstance(logger, TensorBoardLogger):
                text = OmegaConf.to_yaml(described)
                logger.experiment.add_text("config", f"```yaml\n{text}```")


def name_wandb_run(config: dict[str, Any]) -> None:
    """Give a new run its W&B id, under which it goes on when it is resumed.

    An agent of a W&B sweep has chosen it.
    """
    settings = _wandb_settings(config)
    if settings and settings.get("id") is None:
        settings["id"] = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


def _wandb_settings(config: dict[str, Any]) -> dict[str, Any]:
    return (config["logger"] or {}).get("wandb") or {}


def _log_best(trainer: L.Trainer, config: dict[str, Any]) -> None:
    """Hand the best checkpoint of a run to W&B, with its scores."""
    folder = Path(config["paths"]["run"])
    best = folder / "checkpoints" / "best.ckpt"
    # Testing a checkpoint leaves none.
    if not trainer.is_global_zero or not best.is_file():
        return
    import wandb  # Starting it costs seconds that runs without it need not pay.

    results = read_results(folder) or {}
    kept = ("experiment", "revision", "command", "val", "test")
    name = re.sub("[^A-Za-z0-9_.-]", "-", config["run_name"])
    for logger in _wandb_loggers(trainer):
        metadata = {key: results.get(key) for key in kept}
        artifact = wandb.Artifact(name, type="model", metadata=metadata)
        artifact.add_file(str(best), name=best.name)
        logger.experiment.log_artifact(artifact)


def _finish_wandb(trainer: L.Trainer, exit_code: int) -> None:
    if trainer.is_global_zero:
        for logger in _wandb_loggers(trainer):
            logger.experiment.finish(exit_code=exit_code)


def _wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _join_launched(settings: dict[str, Any]) -> list[ClusterEnvironment]:
    """Let the Trainer join the processes that torchrun or srun has started, if one has.

    Their number is then known, so the settings need not say it.
    """
    launch = external_launch()
    if launch is None:
        # In a batch script without srun there is one process, whatever SLURM's variables say.
        return [LightningEnvironment()] if slurm_job() else []
    counts = {"devices": launch.local_world_size, "num_nodes": launch.num_nodes}
    for key, count in counts.items():
        if settings[key] not in (1, -1, "auto", count):
            raise UserError(
                f"trainer.{key}={settings[key]} is not what {launch.launcher} has started, which "
                f"is {count}; leave it out, or make them equal."
            )
    settings |= counts
    if launch.launcher == "torchrun":
        return [TorchElasticEnvironment()]
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.local_world_size))
    # Saving and queueing again is ours, see LastCheckpoint and run.py.
    return [SLURMEnvironment(auto_requeue=False)]


def _check_strategy(strategy: Any) -> None:
    """Refuse strategies under which the promises of a run would not hold."""
    # One with arguments is given by its class, such as lightning.pytorch.strategies.DDPStrategy.
    name = strategy.get("_target_", "") if isinstance(strategy, dict) else str(strategy)
    if name in _STRATEGIES or name.rsplit(".", 1)[-1] in ("DDPStrategy", "SingleDeviceStrategy"):
        return
    raise UserError(
        f"trainer.strategy={name} is not supported: the moving average, the checkpoints and "
        "resuming bit for bit need all weights in every process, and every process started by its "
        f"own command. Choose one of {', '.join(_STRATEGIES)}."
    )


def _instantiate(settings: dict[str, Any], key: str, **arguments: Any) -> Any:
    try:
        return instantiate(settings, **arguments)
    except InstantiationException as error:
        reason = error.__cause__ or error
        raise UserError(f"{key} is refused by {settings['_target_']}: {reason}") from error
