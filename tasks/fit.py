"""Train, then test the best checkpoint."""

from pathlib import Path
from typing import Any

import lightning as L

from tasks.build import build_datamodule, build_module, build_network, giga_macs, takes_teacher
from tasks.records import RunRecord
from tasks.screen import print_results, print_start
from tasks.teachers import load_teacher
from tasks.test import evaluate
from tasks.training import build_trainer, log_config

__all__ = ["run"]


def run(config: dict[str, Any]) -> None:
    """Train the network of a config and test its best checkpoint.

    Everything that the user may have got wrong is checked before the first step.

    Raises:
        UserError: bad data, teacher or arguments.
    """
    L.seed_everything(config["seed"], workers=True, verbose=False)
    # Counting refuses a network or image size that does not work before any data is read.
    giga_macs(config["network"], config["datamodule"]["image_size"])
    datamodule = build_datamodule(config["datamodule"])
    teacher, description = load_teacher(config) if takes_teacher(config) else (None, None)
    network = build_network(config["network"])
    module = build_module(config, network, teacher)
    module.configure_optimizers()  # Refuses bad optimizer settings now, not after the caching.
    trainer = build_trainer(config)
    datamodule.prepare_data()
    datamodule.setup()

    record = RunRecord(config, network, module, datamodule, writes=trainer.is_global_zero)
    if description:
        record.results["teacher"] = description
    with record.running():
        log_config(trainer, config)
        if trainer.is_global_zero:
            print_start(config, network, record.results, module, datamodule)
        trainer.fit(module, datamodule=datamodule)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        record.add(val={k: v for k, v in metrics.items() if k.startswith("val/")})
        best = Path(config["paths"]["run"]) / "checkpoints" / "best.ckpt"
        record.add(**evaluate(trainer, module, datamodule, best))
    if trainer.is_global_zero:
        print_results(record.results, record.folder)
