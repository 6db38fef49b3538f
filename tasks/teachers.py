"""Finding, checking and loading the teacher of a distillation."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.runs import find_runs, main_score, read_results
from lightning_modules.teacher import FrozenTeacher
from tasks.build import build_module, build_network, describe_network, method_kind
from tasks.checkpoints import load_checkpoint, load_weights
from tasks.configuration import get_value

__all__ = ["find_teacher", "load_teacher"]


def find_teacher(config: dict[str, Any]) -> Path:
    """Return the teacher's checkpoint: the one given, or that of the newest fitting run.

    A run fits if it has finished, was no debugging run, and used the same data and image size.

    Raises:
        UserError: there is none; the message has the command that makes one.
    """
    teacher, data = config["teacher"], config["datamodule"]
    if teacher["checkpoint"]:
        return Path(teacher["checkpoint"])
    experiment = teacher["experiment"]
    if not experiment:
        raise UserError(
            "A distillation needs a teacher; set teacher.checkpoint=<file> or "
            "teacher.experiment=<name of the teacher's experiment>."
        )
    folder = Path(config["paths"]["runs"]) / experiment
    for run, results in find_runs(folder):
        checkpoint = run / "checkpoints" / "best.ckpt"
        if (
            results["status"] == "finished"
            and not results["debug"]
            and results["data"]["name"] == data["name"]
            and results["data"]["image_size"] == data["image_size"]
            and checkpoint.is_file()
        ):
            return checkpoint
    raise UserError(
        f"No finished run of {experiment} on {data['name']} at {data['image_size']} px was found "
        f"in {folder}. Train one with `python run.py experiment={experiment} "
        f"datamodule.image_size={data['image_size']}`, or set teacher.checkpoint=<file>."
    )


def load_teacher(config: dict[str, Any]) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Load the frozen teacher that a run's config asks for.

    Returns:
        The teacher, and what to say of it: `checkpoint`, `weights`, `objective`, `network` (name,
        parameters, GMAC), `calls_per_mask`, and `dice` or `balanced_accuracy`, the last ones as its
        own run tested it.

    Raises:
        UserError: there is none, it is broken, it was trained for another kind of task, with
            another image size, normalisation or other classes than the student will be, on another
            split of the same dataset or, where both denoise, with another noise schedule; or
            `teacher.sampler` is not for it.
    """
    path = find_teacher(config)
    checkpoint = load_checkpoint(path, key="teacher.checkpoint")
    trained = checkpoint["config"]
    kind, ours = method_kind(trained), method_kind(config)
    if (kind == "classification") != (ours == "classification"):
        raise UserError(
            f"The teacher {path} was trained for {kind}, and the student is for {ours}; choose "
            "another teacher."
        )
    denoises = kind == "diffusion"
    keys = [f"datamodule.{name}" for name in ("image_size", "normalization", "letterbox")]
    if denoises and ours == "diffusion":
        keys.insert(0, "schedule")
    if kind == "classification":
        keys.append("lightning_module.classes")
    for key in keys:
        its, wanted = get_value(trained, key), get_value(config, key)
        # A switch that is off need not be in an older checkpoint.
        if (its or None) != (wanted or None):
            raise UserError(
                f"The teacher {path} was trained with {key}={its}, the student has {wanted}; "
                "make them equal or choose another teacher."
            )
    _check_split(path, trained["datamodule"], config["datamodule"])
    sampler = config["teacher"].get("sampler")
    if sampler and not denoises:
        raise UserError(
            f"teacher.sampler is given, and the teacher {path} predicts in one pass; leave it out."
        )
    if sampler:
        # A sampler that is named is whole; otherwise its own is changed.
        own = {} if "name" in sampler else trained["sampler"]
        trained = {**trained, "sampler": {**own, **sampler}}
    turns = bool(config["teacher"].get("turns"))
    if turns and kind == "classification":
        raise UserError(
            "teacher.turns=true averages masks, and a classifier has none; set teacher.turns=false."
        )
    network = build_network(trained["network"])
    module = build_module(trained, network)
    load_weights(module, checkpoint, path, config["teacher"]["weights"], "teacher")
    results = read_results(path.parent.parent) or {}
    description = {
        "checkpoint": str(path),
        "weights": config["teacher"]["weights"],
        "objective": trained["lightning_module"].get("objective"),
        "network": describe_network(network, trained),
        "calls_per_mask": results.get("calls_per_mask"),
        **dict([main_score(results)]),
    }
    return FrozenTeacher(module, turns), description


def _check_split(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a teacher that was trained on images on which its student will be tested."""
    if theirs["name"] != ours["name"]:
        return
    for key in ("split", "split_file", "split_seed"):
        if theirs.get(key) != ours.get(key):
            raise UserError(
                f"The teacher {path} was trained with datamodule.{key}={theirs.get(key)}, the "
                f"student has {ours.get(key)}, so the teacher has seen images of the student's "
                "test; make them equal or choose another teacher."
            )
