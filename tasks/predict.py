"""Predict photographs: masks at their own size with a statement of doubt, or diagnoses."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from common.errors import UserError, check_choice
from datamodules.photographs import Photographs, find_photographs, output_names
from tasks.build import build_module
from tasks.checkpoints import load_checkpoint, network_from_checkpoint
from tasks.configuration import TRAINED_FOR, checkpoint_config, given_keys
from tasks.diagnosis_writer import DiagnosisWriter
from tasks.inference import accelerate, refuse_metadata
from tasks.onnx_module import OnnxModule
from tasks.photograph_writer import PhotographWriter
from tasks.prediction_writer import FORMATS, PredictionWriter
from tasks.training import build_trainer

__all__ = ["run"]

console = Console(highlight=False)
# What an exported file has decided.
_EXPORTED = ("inference", "lightning_module", "network", "sampler", "schedule")
EXAMPLE = "checkpoint=runs/teacher_isic2018/<time>/checkpoints/best.ckpt"


def run(config: dict[str, Any]) -> None:
    """Predict `input` with `checkpoint` and write to `output`.

    See `PredictionWriter` for masks and `DiagnosisWriter` for diagnoses.

    Raises:
        UserError: an argument is missing or illegal, there are no photographs; or, when the rest is
            done, some of them could not be decoded.
    """
    for key, example in (("input", "input=photo.jpg"), ("checkpoint", EXAMPLE)):
        if not config[key]:
            raise UserError(f"task=predict needs {key}, such as {example}.")
    check_choice("output_format", config["output_format"], FORMATS)
    if not 0 < config["threshold"] < 1:
        raise UserError(f"threshold={config['threshold']} must lie between 0 and 1.")
    output = Path(config["output"])
    files = find_photographs(config["input"])
    if output.resolve() in {path.parent.resolve() for path in files}:
        raise UserError(f"output={output} holds photographs of the input; choose another folder.")
    names = output_names(files)
    config, module, settings = _load(config)
    classes = getattr(module, "classes", None)
    if config["skip_existing"]:
        if classes:
            done = _diagnosed(output)
        else:
            mask = FORMATS[config["output_format"]][0]
            done = {name for name in names if (output / mask.format(name)).is_file()}
        left = [(f, n) for f, n in zip(files, names, strict=True) if n not in done]
        console.print(f"{len(files) - len(left)} of {len(files)} photographs are done already.")
        files, names = [file for file, _ in left], [name for _, name in left]
        if not files:
            return

    L.seed_everything(config["seed"], workers=True, verbose=False)
    shown = len(files), config["trainer"]["enable_progress_bar"]
    writer: PhotographWriter
    if classes:
        writer = DiagnosisWriter(output, classes, *shown)
    else:
        letterbox = settings.get("letterbox", False)
        writer = PredictionWriter(
            output, config["output_format"], config["threshold"], letterbox, *shown
        )
    # The writer has a bar of its own, in images.
    quiet = config["trainer"] | {"enable_progress_bar": False}
    trainer = build_trainer(config | {"trainer": quiet}, writer)
    on_gpu = trainer.strategy.root_device.type != "cpu"
    photographs = Photographs(
        files,
        names,
        batch_size=config["batch_size"] or (16 if on_gpu else 1),
        num_workers=config["num_workers"],
        **settings,
    )
    trainer.predict(module, datamodule=photographs, return_predictions=False)
    if trainer.is_global_zero:
        console.print(f"{len(files)} photographs: {output}")
        _report_failures(writer.rows)


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
    network = network_from_checkpoint(checkpoint, path, "ema", "checkpoint")
    refuse_metadata(network, path)
    module = build_module(config, network, teacher=None)
    accelerate(module, config["inference"])
    data = config["datamodule"]
    return config, module, {name: data[name] for name in TRAINED_FOR if name in data}


def _diagnosed(output: Path) -> set[str]:
    """Return the names of the photographs that an earlier run could read and diagnosed."""
    path = output / "predictions.csv"
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return {row["name"] for row in rows if row.get("predicted")}


def _report_failures(rows: list[dict[str, Any]]) -> None:
    failed = [row for row in rows if row["error"]]
    for row in failed:
        console.print(f"skipped: {row['error']}", style="yellow", markup=False)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(rows)} photographs could not be predicted, first "
            f"{failed[0]['file']}; the others are done, and predictions.csv has the reasons."
        )
