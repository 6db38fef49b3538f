"""Finding, checking and loading the teacher of a distillation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from common.errors import UserError
from common.runs import find_runs, main_scores, read_results
from lightning_modules.teacher import FrozenTeacher
from tasks.build import build_module, build_network, describe_network, method_kind
from tasks.checkpoints import load_checkpoint, load_weights
from tasks.configuration import get_value

__all__ = ["find_teachers", "load_teacher"]


def find_teachers(config: dict[str, Any]) -> list[Path]:
    """Return the teacher's checkpoints: those given, or those of the newest fitting runs.

    A run fits if it has finished, was no debugging run, and used the same data and image size.

    Raises:
        UserError: there are fewer than `teacher.members`; the message has the command that makes
            one.
    """
    teacher, data = config["teacher"], config["datamodule"]
    members, given = teacher.get("members", 1), teacher["checkpoint"]
    if not isinstance(members, int) or members < 1:
        raise UserError(f"teacher.members={members} must be a whole number, at least 1.")
    if given:
        return [Path(path) for path in ([given] if isinstance(given, str) else given)]
    experiment = teacher["experiment"]
    if not experiment:
        raise UserError(
            "A distillation needs a teacher; set teacher.checkpoint=<file> or "
            "teacher.experiment=<name of the teacher's experiment>."
        )
    folder = Path(config["paths"]["runs"]) / experiment
    found = []
    for run, results in find_runs(folder):
        checkpoint = run / "checkpoints" / "best.ckpt"
        if (
            results["status"] == "finished"
            and not results["debug"]
            and results["data"]["name"] == data["name"]
            and results["data"]["image_size"] == data["image_size"]
            and checkpoint.is_file()
        ):
            found.append(checkpoint)
            if len(found) == members:
                return found
    number, verb = "No finished run", "was"
    if found:
        number, verb = f"teacher.members={members}, and only {len(found)} finished runs", "were"
    seeds = f" -m seed={','.join(map(str, range(members)))}" if members > 1 else ""
    raise UserError(
        f"{number} of {experiment} on {data['name']} at {data['image_size']} px {verb} found in "
        f"{folder}. Train with `python run.py{seeds} "
        f"experiment={experiment} datamodule.image_size={data['image_size']}`, or set "
        "teacher.checkpoint=<file>."
    )


def load_teacher(config: dict[str, Any]) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Load the frozen teacher that a run's config asks for.

    Returns:
        The teacher, and what to say of it: `checkpoint`, `weights`, `objective`, `network` (name,
        parameters, GMAC), `calls_per_mask`, and `dice` or `balanced_accuracy`, the last ones as its
        own run tested it. Of several: all checkpoints, a network that has the parameters and GMAC
        of all, and no score.

    Raises:
        UserError: there is none, it is broken, it was trained for another kind of task, with
            another image size, normalisation or other classes than the student will be, on another
            split of the same dataset or, where both denoise, with another noise schedule;
            `teacher.sampler` is not for it; or several classifiers.
    """
    paths = find_teachers(config)
    loaded = [_load_member(path, config) for path in paths]
    modules, descriptions = zip(*loaded, strict=True)
    teacher = FrozenTeacher(*modules, turns=bool(config["teacher"].get("turns")))
    if teacher.averages and method_kind(config) == "classification":
        raise UserError(
            "teacher.turns=true and several teachers average masks, and a classifier has none; set "
            "teacher.turns=false and give one teacher."
        )
    return teacher, descriptions[0] if len(paths) == 1 else _describe_all(descriptions)


def _load_member(path: Path, config: dict[str, Any]) -> tuple[L.LightningModule, dict[str, Any]]:
    """Return a teacher's module and what to say of it."""
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
        **main_scores(results),
    }
    return module, description


def _describe_all(descriptions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what to say of several teachers, each of which is asked for every image."""
    networks = [description["network"] for description in descriptions]
    sums = {key: sum(network[key] for network in networks) for key in networks[0] if key != "name"}
    names = dict.fromkeys(network["name"] for network in networks)
    calls = {description["calls_per_mask"] for description in descriptions}
    return {
        "checkpoint": [description["checkpoint"] for description in descriptions],
        "weights": descriptions[0]["weights"],
        "objective": None,
        "network": {"name": f"{len(networks)} x {', '.join(names)}", **sums},
        "calls_per_mask": calls.pop() if len(calls) == 1 else None,
    }


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
