"""Test a checkpoint: sample masks for the test images and score them."""

import time
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from common.errors import UserError
from datamodules.classification import ClassificationDataModule
from tasks.baselines import majority_baseline, trivial_baselines
from tasks.build import build_datamodule, build_module, method_kind
from tasks.checkpoints import load_checkpoint, load_weights, network_from_checkpoint
from tasks.configuration import check_image_settings, checkpoint_config
from tasks.inference import accelerate
from tasks.records import RunRecord
from tasks.screen import print_results, print_start
from tasks.statistics import (
    bootstrap_interval,
    percentile_interval,
    read_predictions,
    read_scores,
    resampled_scores,
)
from tasks.training import build_trainer, shown

__all__ = ["check_data", "chosen_resolution", "evaluate", "run"]


def run(config: dict[str, Any]) -> None:
    """Test `checkpoint` and write `results.json` and the other records to the run folder.

    Raises:
        UserError: there is no usable checkpoint, or the data is missing or broken.
    """
    if not config["checkpoint"]:
        raise UserError(
            "task=test needs checkpoint=<file>, such as "
            "checkpoint=runs/demo_teacher/<time>/checkpoints/best.ckpt."
        )
    checkpoint = load_checkpoint(config["checkpoint"])
    trained = checkpoint["config"]
    config = checkpoint_config(config, trained)
    check_image_settings(config["datamodule"])
    L.seed_everything(config["seed"], workers=True, verbose=False)
    network = network_from_checkpoint(checkpoint, config["checkpoint"], "ema", "checkpoint")
    datamodule = build_datamodule(config["datamodule"])
    check_data(config, network, datamodule)
    # A method that learns from a teacher does not need it any more.
    module = build_module(config, network, teacher=None)
    trainer = build_trainer(config)
    datamodule.prepare_data()
    datamodule.setup()
    check_data(config, network, datamodule)
    datamodule.check_testable()
    datamodule.check_processes(trainer.num_devices * trainer.num_nodes, ["test"])

    record = RunRecord(config, network, module, datamodule, writes=trainer.is_global_zero)
    record.results |= {"checkpoint": str(config["checkpoint"]), "trained_as": trained["run_name"]}
    with record.running(), shown(trainer, config, record.results):
        if trainer.is_global_zero:
            print_start(config, network, record.results, module, datamodule)
        record.add(**evaluate(trainer, module, datamodule, Path(config["checkpoint"]), config))
    if trainer.is_global_zero:
        print_results(record.results, record.folder)


def check_data(
    config: dict[str, Any], network: nn.Module, datamodule: L.LightningDataModule
) -> None:
    """Refuse data that a trained network cannot be tested on.

    Args:
        config: of the test, with the checkpoint's method.
        network: of the checkpoint.
        datamodule: of the test, set up or not yet.

    Raises:
        UserError: it has diagnoses where the network makes masks, or masks where that names
            diagnoses, or other classes, or too little metadata.
    """
    name, checkpoint = config["datamodule"]["name"], config["checkpoint"]
    diagnoses = isinstance(datamodule, ClassificationDataModule)
    if diagnoses != (method_kind(config) == "classification"):
        has, makes, other = (
            ("diagnoses", "masks", "isic2018") if diagnoses else ("masks", "diagnoses", "isic2019")
        )
        raise UserError(
            f"datamodule.name={name} has {has}, and checkpoint={checkpoint} makes {makes}; choose "
            f"other data, such as datamodule={other}."
        )
    if not diagnoses:
        return
    theirs, ours = config["lightning_module"]["classes"], list(datamodule.classes)
    # Classes that only the files tell are known once they are read.
    if ours and ours != list(theirs):
        raise UserError(
            f"datamodule.name={name} has the classes {', '.join(ours)}, and "
            f"checkpoint={checkpoint} names {', '.join(theirs)}; test it on data of its own "
            "classes."
        )
    needed = getattr(network, "metadata_inputs", 0)
    if needed and len(datamodule.metadata_columns) != needed:
        raise UserError(
            f"checkpoint={checkpoint} needs {needed} numbers of metadata for each image, and "
            f"datamodule.name={name} gives {len(datamodule.metadata_columns)}; choose data that "
            "has them, with datamodule.metadata=true."
        )


def evaluate(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    checkpoint: Path,
    config: dict[str, Any],
) -> dict[str, Any]:
    """Load a checkpoint's averaged weights into a module and test it.

    Returns:
        `test` (the metrics by key), `test_intervals` (the 95 % bootstrap intervals over images of
        those that are means over images, and of all scores of diagnoses), `tested_images`,
        `resolution` (at which sizes masks were scored: `model`, `native` or `both`),
        `test_seconds` and `baselines`, at the network's size.
    """
    diagnoses = method_kind(config) == "classification"
    resolution = "model" if diagnoses else chosen_resolution(config, datamodule)
    if not diagnoses:
        module.test_scores.resolution = resolution
    if resolution != "model":
        datamodule.test_at_native_size()
    load_weights(module, load_checkpoint(checkpoint), checkpoint, "ema", "checkpoint")
    accelerate(module, config["inference"])
    started = time.monotonic()
    (metrics,) = trainer.test(module, datamodule=datamodule, verbose=False)
    seconds = time.monotonic() - started
    baselines, intervals, tested = {}, {}, 0
    if trainer.is_global_zero:
        folder = Path(config["paths"]["run"])
        scores = read_scores(folder)
        tested = len(next(iter(scores.values()), ()))
        train, test = (datamodule.datasets[part] for part in ("train", "test"))
        if diagnoses:
            drawn = resampled_scores(read_predictions(folder), config["metrics"])
            intervals = {f"test/{name}": percentile_interval(v) for name, v in drawn.items()}
            baselines = majority_baseline(train.labels, test.labels[:tested])
        else:
            intervals = {
                f"test/{name}": bootstrap_interval(values)
                for name, values in scores.items()
                if f"test/{name}" in metrics
            }
            baselines = trivial_baselines(train.cache.lesions(train.indices), test)
    return {
        "test": metrics,
        "test_intervals": intervals,
        "tested_images": tested,
        "resolution": resolution,
        "test_seconds": round(seconds, 1),
        "baselines": baselines,
    }


def chosen_resolution(config: dict[str, Any], datamodule: L.LightningDataModule) -> str:
    """Return at which sizes masks are scored.

    Original masks add nothing where none of them is larger than the network's image.
    """
    chosen = config["metrics"]["resolution"]
    test = datamodule.datasets["test"]
    larger = bool((test.cache.sizes[test.indices] > datamodule.image_size).any())
    return "model" if chosen == "both" and not larger else chosen
