"""Finding, checking and loading the teacher of a distillation."""

import functools
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from common.errors import UserError, check_choice
from common.runs import data_root, find_runs, main_scores, read_config, read_results
from datamodules.splits import read_parts
from lightning_modules.teacher import FrozenTeacher
from tasks.build import build_module, build_network, describe_network, method_kind
from tasks.checkpoints import load_checkpoint, load_weights, refuse_not_finite
from tasks.configuration import get_value
from tasks.seen_images import Seen, check_teacher, find_seen, is_own_data, leaks_by_id

__all__ = ["find_teachers", "load_teacher"]

# How images are prepared, apart from their size.
_PREPARED = ("normalization", "letterbox")
CONF = Path(__file__).resolve().parent.parent / "conf"


def find_teachers(
    config: dict[str, Any],
    find_parts: Callable[[], Mapping[str, str]] | None = None,
    find_images: Callable[[], Collection[str]] | None = None,
) -> list[Path]:
    """Return the teacher's checkpoints: those given, or those of the newest fitting runs.

    A run fits if it has finished, was no debugging run, used the same data and image size, and has
    seen no validation or test images of the student, unless `teacher.allow_leak`.

    Args:
        config: of the student.
        find_parts: returns the part of each of the student's images by id; without it no run is
            passed over for its images.
        find_images: returns the digests of some of the student's images.

    Raises:
        UserError: there are fewer than `teacher.members`; the message has the command that makes
            one.
    """
    teacher, data = config["teacher"], config["datamodule"]
    members, given = teacher.get("members", 1), teacher["checkpoint"]
    if not isinstance(members, int) or members < 1:
        raise UserError(f"teacher.members={members} must be a whole number, at least 1.")
    check_choice("teacher.allow_leak", teacher.get("allow_leak", False), (True, False))
    if given:
        return [Path(path) for path in ([given] if isinstance(given, str) else given)]
    experiment = teacher["experiment"]
    if not experiment:
        raise UserError(
            "A distillation needs a teacher; set teacher.checkpoint=<file> or "
            "teacher.experiment=<name of the teacher's experiment>."
        )
    found, leaking = [], 0
    for run in _fitting_runs(config, find_images):
        if find_parts and not teacher.get("allow_leak") and _leaks(run, find_parts()):
            leaking += 1
            continue
        found.append(run / "checkpoints" / "best.ckpt")
        if len(found) == members:
            return found
    number, verb = "No finished run", "was"
    if found:
        number, verb = f"teacher.members={members}, and only {len(found)} finished runs", "were"
    own = is_own_data(data)
    keys = (*_PREPARED, "split", "split_file", "split_seed")
    given = [shlex.quote(f"datamodule.{key}={data[key]}") for key in keys if data.get(key)]
    same = "".join(f" {argument}" for argument in given)
    place = f"the folder {data['root']}" if own else data["name"]
    passed = f" ({leaking} more have seen validation or test images of this student)"
    seeds = f" -m seed={','.join(map(str, range(members)))}" if members > 1 else ""
    folds = f" cross_validation={data['folds']}" if data.get("folds") else ""
    raise UserError(
        f"{number} of {experiment} on {place} at {data['image_size']} px {verb} found in "
        f"{config['paths']['runs']}{passed if leaking else ''}. Train with `python run.py{seeds} "
        f"{_recipe(config)} datamodule.image_size={data['image_size']}{same}{folds}`"
        f"{' with the same split' if own else ''}, or set teacher.checkpoint=<file>."
    )


def _recipe(config: Mapping[str, Any]) -> str:
    """Return the arguments that train `teacher.experiment` on the student's data."""
    experiment, data = config["teacher"]["experiment"], config["datamodule"]
    # Runs without an experiment are filed under their method.
    method = not (CONF / "experiment" / f"{experiment}.yaml").is_file()
    words = [f"lightning_module={experiment}" if method else f"experiment={experiment}"]
    label = config.get("data_label")
    if is_own_data(data):
        choice = {"Folder": "folder", "FolderDiagnosis": "folder_diagnosis"}.get(data["name"])
        words += [f"datamodule={choice}"] if choice else []
        words.append(shlex.quote(f"datamodule.root={data['root']}"))
    elif label and (method or not experiment.endswith(f"_{label}")):
        words.append(f"datamodule={label}")
    return " ".join(words)


def _fitting_runs(
    config: dict[str, Any], find_images: Callable[[], Collection[str]] | None
) -> list[Path]:
    """Return the finished runs of `teacher.experiment` on the student's data, newest first.

    Those whose images were prepared as the student's come before others. Folders of one's own are
    matched by the name under which their runs are filed, runs on the very folder first, then those
    that know some of its images.
    """
    data, runs = config["datamodule"], Path(config["paths"]["runs"])
    label, own = config.get("data_label"), is_own_data(data)
    experiment = config["teacher"]["experiment"]
    fitting = [
        run
        for folder in (experiment, f"{experiment}-{label}")
        for run, results in find_runs(runs / folder, ("data.name",))
        if results.get("status") == "finished"
        and not results.get("debug")
        and get_value(results, "data.name") == data["name"]
        and get_value(results, "data.image_size") == data["image_size"]
        and (not own or get_value(results, "data.label") == label)
        and (run / "checkpoints" / "best.ckpt").is_file()
        and (read_config(run) is not None or not (run / "config.yaml").exists())
    ]
    fitting.sort(key=lambda run: run.name, reverse=True)
    if own:
        root = Path(data["root"]).resolve()
        known = _known_images(fitting, find_images, root)
        fitting.sort(key=lambda run: (data_root(run) != root, run not in known))
    # Where none sees images as the student does, the first is refused by what differs.
    fitting.sort(key=lambda run: not _prepares_alike(run, data))
    return fitting


def _known_images(
    runs: Sequence[Path], find_images: Callable[[], Collection[str]] | None, root: Path
) -> set[Path]:
    """Return the runs that have seen some of the student's images, as far as a few of them tell."""
    if find_images is None or all(data_root(run) == root for run in runs):
        return set()
    digests = set(find_images())
    found = set()
    for run in runs:
        try:
            _, theirs = read_parts(run / "splits.csv")
        except UserError:
            continue
        if theirs is not None and digests & set(theirs.values()):
            found.add(run)
    return found


def _prepares_alike(run: Path, data: Mapping[str, Any]) -> bool:
    """Tell whether a run's images were normalised and letterboxed as the student's are."""
    theirs = (read_config(run) or {}).get("datamodule")
    return not isinstance(theirs, dict) or all(
        (theirs.get(name) or None) == (data.get(name) or None) for name in _PREPARED
    )


def load_teacher(
    config: dict[str, Any],
    find_parts: Callable[[], Mapping[str, str]] | None = None,
    find_images: Callable[[], Collection[str]] | None = None,
) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Load the frozen teacher that a run's config asks for.

    Args:
        config: of the student.
        find_parts: returns the part of each of the student's images by id, before they are
            decoded: a teacher that has seen those of validation or test is refused as far as their
            names tell. It is called once, after all that can be refused without the data.
        find_images: returns the digests of some of the student's images, by which a run on another
            folder of the same name is told from one on the same images.

    Returns:
        The teacher, and what to say of it: `checkpoint`, `weights`, `objective`, `network` (name,
        parameters, GMAC), `calls_per_mask`, and `dice` or `balanced_accuracy`, the last ones as its
        own run tested it. Of several: all checkpoints, a network that has the parameters and GMAC
        of all, and no score.

    Raises:
        UserError: there is none, it is broken, it was trained for another kind of task, with
            another image size, normalisation or other classes than the student will be or, where
            both denoise, with another noise schedule; it has seen images of the student's
            validation or test; `teacher.sampler` is not for it; or several classifiers.
    """
    find_parts = functools.cache(find_parts) if find_parts else None
    paths = find_teachers(config, find_parts, find_images)
    loaded = [_load_member(path, config) for path in paths]
    modules, descriptions, seen = zip(*loaded, strict=True)
    teacher = FrozenTeacher(*modules, turns=bool(config["teacher"].get("turns")))
    teacher.seen = seen
    if teacher.averages and method_kind(config) == "classification":
        raise UserError(
            "teacher.turns=true and several teachers average masks, and a classifier has none; set "
            "teacher.turns=false and give one teacher."
        )
    if find_parts:
        check_teacher(seen, config, find_parts())
    return teacher, descriptions[0] if len(paths) == 1 else _describe_all(descriptions)


def _load_member(
    path: Path, config: dict[str, Any]
) -> tuple[L.LightningModule, dict[str, Any], Seen]:
    """Return a teacher's module, what to say of it and which images it has seen."""
    checkpoint = load_checkpoint(path, key="teacher.checkpoint")
    trained = checkpoint["config"]
    kind, ours = method_kind(trained), method_kind(config)
    if (kind == "classification") != (ours == "classification"):
        raise UserError(
            f"The teacher {path} was trained for {kind}, and the student is for {ours}; choose "
            "another teacher."
        )
    denoises = kind == "diffusion"
    keys = [f"datamodule.{name}" for name in ("image_size", *_PREPARED)]
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
    seen = find_seen(path, checkpoint)
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
    refuse_not_finite(network, path, "teacher.checkpoint")
    results = read_results(path.parent.parent) or {}
    description = {
        "checkpoint": str(path),
        "weights": config["teacher"]["weights"],
        "objective": trained["lightning_module"].get("objective"),
        "network": describe_network(network, trained),
        "calls_per_mask": results.get("calls_per_mask"),
        **main_scores(results),
    }
    return module, description, seen


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


def _leaks(run: Path, parts: Mapping[str, str]) -> bool:
    """Tell whether a run on the student's data has seen its validation or test images."""
    try:
        theirs, _ = read_parts(run / "splits.csv")
    except UserError:
        return False  # Its checkpoint may still tell.
    return leaks_by_id(theirs, parts)
