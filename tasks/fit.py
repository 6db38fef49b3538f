"""Train, then test the best checkpoint."""

from pathlib import Path
from typing import Any

import lightning as L

from common.cluster import global_rank
from common.errors import UserError
from common.files import refuse_full, remove_leftovers
from common.runs import read_results
from lightning_modules.callbacks import SeenImages
from lightning_modules.callbacks.last_checkpoint import interrupting
from tasks.acceleration import (
    accelerate_teacher,
    accelerate_training,
    check_fused,
    plan_batch,
    resumed_batch,
)
from tasks.build import (
    build_datamodule,
    build_module,
    build_network,
    check_batch,
    complete,
    giga_macs,
    takes_teacher,
)
from tasks.configuration import choices
from tasks.records import RunRecord
from tasks.resume import check_same_data, goes_on, last_checkpoint, resumed_config
from tasks.screen import print_batch, print_choices, print_results, print_start
from tasks.seen_images import check_same_photographs, check_teacher, seen_record
from tasks.teacher_maps import attach_teacher, check_cacheable
from tasks.teachers import load_teacher
from tasks.test import evaluate
from tasks.training import build_trainer, name_wandb_run, shown

__all__ = ["run"]

# best.ckpt, last.ckpt and one that is being written.
CHECKPOINTS = 3


def run(config: dict[str, Any]) -> None:
    """Train the network of a config and test its best checkpoint; or go on where a run stopped.

    Everything that the user may have got wrong is checked before the first step.

    Raises:
        UserError: bad data, teacher or arguments.
        Interrupted: a signal stopped the training; `last.ckpt` is there to go on from.
    """
    resuming = goes_on(config)
    if resuming:
        config = resumed_config(config)
    folder = Path(config["paths"]["run"])
    L.seed_everything(config["seed"], workers=True, verbose=False)
    complete(config)
    if not resuming and global_rank() == 0:
        print_choices(config, choices())
    # Counting refuses a network or image size that does not work before any data is read.
    giga_macs(config["network"], config["datamodule"]["image_size"])
    check_batch(config)
    check_fused(config)
    datamodule = build_datamodule(config["datamodule"])
    datamodule.check_trainable()
    teacher, description, searched = None, None, False
    if takes_teacher(config):
        searched = not config["teacher"]["checkpoint"]
        teacher, description = load_teacher(
            config, datamodule.find_parts, datamodule.find_some_digests
        )
        # A newer teacher must not take over when the run is resumed.
        config["teacher"]["checkpoint"] = description["checkpoint"]
    earlier = (read_results(folder) or {}) if resuming else {}
    size, rule = config["datamodule"]["batch_size"], config["training"]["scale_lr"]
    config["datamodule"]["batch_size"] = resumed_batch(size, rule, earlier.get("batch"))
    network = build_network(config["network"], pretrained=not resuming)
    module = build_module(config, network, teacher)
    if getattr(module, "wants_views", False) and not config["datamodule"]["views"]:
        raise UserError(
            "lightning_module.losses has terms that learn from rotated images, which are not "
            "loaded; set datamodule.views=true, or the weights of these terms to 0."
        )
    cached = description and config["teacher"].get("cached")
    if cached:
        check_cacheable(module)
    refuse_full(folder, CHECKPOINTS * _checkpoint_bytes(module))
    module.configure_optimizers()  # Refuses bad optimizer settings now, not after the caching.
    name_wandb_run(config)
    seen = SeenImages()
    trainer = build_trainer(config, seen)
    accelerate_training(module, config["training"])
    if teacher:
        accelerate_teacher(teacher, config["training"])
    batch = plan_batch(
        module,
        config["training"]["scale_lr"],
        config["datamodule"]["batch_size"],
        trainer.num_devices * trainer.num_nodes,
        trainer.accumulate_grad_batches,
    )
    if not config["trainer"]["sync_batchnorm"]:
        check_batch(config, batch["per_process"])
    datamodule.batch_size = batch["per_process"]
    if not trainer.limit_val_batches:
        raise UserError("trainer.limit_val_batches=0 leaves no best checkpoint; give at least 1.")
    datamodule.prepare_data()
    datamodule.setup()
    datamodule.check_processes(trainer.num_devices * trainer.num_nodes)
    if searched:
        check_same_photographs(teacher.seen, config, datamodule)
    if description:
        own = (config, datamodule.parts, datamodule.digests)
        description["leaked_images"] = check_teacher(teacher.seen, *own)
    seen.record = seen_record(config, datamodule, teacher.seen if teacher else ())
    if cached:
        attach_teacher(teacher, datamodule, config, trainer.strategy.root_device)
    if resuming:
        check_same_data(folder, datamodule.split_sha, datamodule.digests)
        if trainer.is_global_zero:
            remove_leftovers(folder)

    record = RunRecord(config, network, module, datamodule, writes=trainer.is_global_zero)
    record.results["batch"] = batch
    if description:
        record.results["teacher"] = description
    with record.running(), interrupting(trainer), shown(trainer, config, record.results):
        if trainer.is_global_zero:
            print_start(config, network, record.results, module, datamodule)
            print_batch(batch, earlier.get("batch"), config["datamodule"]["batch_size"])
        start = last_checkpoint(folder) if resuming else None
        trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:4] == "val/"}
        # A resumed run that had nothing left to train was validated when it ended.
        record.add(val=metrics or earlier.get("val"))
        record.add(best=_best(trainer))
        # Some challenges publish their test part without masks.
        if datamodule.testable:
            best = folder / "checkpoints" / "best.ckpt"
            record.add(**evaluate(trainer, module, datamodule, best, config))
    if trainer.is_global_zero:
        print_results(record.results, record.folder)


def _checkpoint_bytes(module: L.LightningModule) -> int:
    """Return about how large a checkpoint is: weights, their average and Adam's two moments."""
    tensors = [*module.parameters(), *module.buffers()]
    return 4 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _best(trainer: L.Trainer) -> dict[str, Any] | None:
    """Return which score chose the best checkpoint, its value, and if `min` or `max` is best."""
    checkpoint = trainer.checkpoint_callback
    score = getattr(checkpoint, "best_model_score", None)
    if score is None:
        return None
    return {"monitor": checkpoint.monitor, "score": float(score), "mode": checkpoint.mode}
