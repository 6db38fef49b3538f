"""Predict photographs: masks at their own size with their uncertainty, or diagnoses."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from common.cluster import global_rank
from common.errors import UserError, check_choice
from common.text import say
from datamodules.photographs import Photographs, find_photographs
from tasks.build import build_module, giga_macs
from tasks.checkpoints import load_checkpoint, network_from_checkpoint
from tasks.configuration import (
    TRAINED_FOR,
    check_image_settings,
    checkpoint_config,
    given_keys,
)
from tasks.diagnosis_writer import DiagnosisWriter
from tasks.ensembles import find_checkpoints, load_ensemble
from tasks.inference import accelerate, refuse_metadata
from tasks.onnx_module import OnnxModule
from tasks.photograph_writer import PhotographWriter
from tasks.prediction_writer import FORMATS, PredictionWriter
from tasks.training import build_trainer

__all__ = ["run"]

# What an exported file has decided.
_EXPORTED = ("datamodule", "inference", "lightning_module", "network", "sampler", "schedule")
EXAMPLE = "checkpoint=runs/teacher_isic2018/<time>/checkpoints/best.ckpt"


def run(config: dict[str, Any]) -> None:
    """Predict `input` with `checkpoint` and write to `output`.

    Several checkpoints, or the runs of a multirun, predict together, see `Ensemble`.
    See `PredictionWriter` for masks and `DiagnosisWriter` for diagnoses. With `skip_existing`
    photographs are left out that an earlier run has done with the same settings.

    Raises:
        UserError: an argument is missing or illegal, there are no photographs; or, when the rest is
            done, some of them could not be predicted.
    """
    _check(config)
    output = Path(config["output"])
    files, names = find_photographs(config["input"], output)
    config, module, settings = load_ensemble(config, _load)
    classes = getattr(module, "classes", None)
    common = (
        _digest(config, settings, classes),
        names,
        config["trainer"]["enable_progress_bar"],
    )
    writer: PhotographWriter
    if classes:
        writer = DiagnosisWriter(output, classes, *common)
    else:
        writer = PredictionWriter(
            output,
            config["output_format"],
            config["threshold"],
            settings.get("letterbox", False),
            config["max_megapixels"],
            *common,
        )
    done = writer.done(files, names)
    if config["skip_existing"]:
        left = [(f, n) for f, n in zip(files, names, strict=True) if n not in done]
        say(f"{len(files) - len(left)} of {len(files)} photographs are done already.")
        files, names = [file for file, _ in left], [name for _, name in left]
        writer.names = names
        if not files:
            if global_rank() == 0:
                writer.finish()
            return

    L.seed_everything(config["seed"], workers=True, verbose=False)
    # The writer has a bar of its own, in images.
    quiet = config["trainer"] | {"enable_progress_bar": False}
    trainer = build_trainer(config | {"trainer": quiet}, writer)
    on_gpu = trainer.strategy.root_device.type != "cpu"
    photographs = Photographs(
        files,
        names,
        batch_size=config["batch_size"] or (16 if on_gpu else 1),
        num_workers=config["num_workers"],
        max_megapixels=config["max_megapixels"],
        **settings,
    )
    trainer.predict(module, datamodule=photographs, return_predictions=False)
    if trainer.is_global_zero:
        say(f"{len(files)} photographs: {output}")
        _report_remarks(writer.rows)
        _report_failures(writer.rows)


def _check(config: Mapping[str, Any]) -> None:
    """Refuse missing and illegal arguments."""
    for key, example in (("input", "input=photo.jpg"), ("checkpoint", EXAMPLE)):
        if not config[key]:
            raise UserError(f"task=predict needs {key}, such as {example}.")
    check_choice("output_format", config["output_format"], FORMATS)
    check_choice("skip_existing", config["skip_existing"], (True, False))
    threshold, largest = config["threshold"], config["max_megapixels"]
    if not _is_number(threshold) or not 0 < threshold < 1:
        raise UserError(f"threshold={threshold} must lie between 0 and 1.")
    if not _is_number(largest) or not largest > 0:
        raise UserError(f"max_megapixels={largest} must be a number above 0, such as 200.")
    for key, least in (("batch_size", 1), ("num_workers", 0)):
        value = config[key]
        if key == "batch_size" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{key}={value} must be a whole number, at least {least}.")
    output = Path(config["output"])
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; give a folder, which need not exist.")
    for key in given_keys():
        if key.split(".")[0] == "datamodule" and key.split(".")[-1] not in TRAINED_FOR:
            own = {"datamodule.batch_size": "batch_size", "datamodule.num_workers": "num_workers"}
            use = f"use {own[key]}" if key in own else "leave it out"
            raise UserError(
                f"{key} has no effect on task=predict, which reads the photographs of input; {use}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _load(config: dict[str, Any]) -> tuple[dict[str, Any], L.LightningModule, dict[str, Any]]:
    """Return the config to predict with, the module, and how it wants its photographs."""
    path = Path(config["checkpoint"])
    if path.suffix == ".onnx":
        given = given_keys()
        fixed = sorted(key for key in given if key.split(".")[0] in _EXPORTED)
        if fixed:
            raise UserError(f"{fixed[0]} is part of {path}; leave it out, or export anew with it.")
        module = OnnxModule(path, config["seed"] if "seed" in given else None)
        settings = {name: module.metadata[name] for name in TRAINED_FOR}
        # It normalises by itself.
        return config, module, settings | {"normalization": "none"}
    checkpoint = load_checkpoint(path)
    config = checkpoint_config(config, checkpoint["config"])
    data = config["datamodule"]
    check_image_settings(data)
    # An image size that the network does not take is an error here.
    giga_macs(config["network"], data["image_size"])
    network = network_from_checkpoint(checkpoint, path, "ema", "checkpoint")
    refuse_metadata(network, path)
    module = build_module(config, network, teacher=None)
    accelerate(module, config["inference"])
    return config, module, {name: data[name] for name in TRAINED_FOR if name in data}


def _digest(config: Mapping[str, Any], settings: Mapping[str, Any], classes: Any) -> str:
    """Return a digest of all that shapes a prediction, apart from the photograph."""
    weights = []
    for path in find_checkpoints(config["checkpoint"]):
        with path.open("rb") as file:
            weights.append(hashlib.file_digest(file, "sha256").hexdigest())
    shaping = [weights, dict(settings), config["seed"], config["sampler"]]
    shaping.append(config["trainer"]["precision"])
    shaping.append(None if classes else config["threshold"])
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:8]


def _report_remarks(rows: list[dict[str, Any]]) -> None:
    marked = [row for row in rows if row["remark"]]
    if marked:
        text = f"{marked[0]['file']}: {marked[0]['remark']}"
        more = f", and {len(marked) - 1} more, see predictions.csv" if len(marked) > 1 else ""
        say(f"{text}{more}")


def _report_failures(rows: list[dict[str, Any]]) -> None:
    failed = [row for row in rows if row["error"]]
    for row in failed:
        say(f"skipped: {row['error']}", style="yellow")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(rows)} photographs could not be predicted, first "
            f"{failed[0]['file']}; the others are done, and predictions.csv has the reasons."
        )
