"""Which images a network was trained on, and whether a student may learn from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

import datamodules
from common.errors import UserError
from common.rooms import look_up
from datamodules.identity import image_keys
from datamodules.splits import read_parts
from tasks.build import takes_teacher

__all__ = [
    "Seen",
    "check_same_photographs",
    "check_teacher",
    "find_seen",
    "is_own_data",
    "leaks_by_id",
    "seen_record",
]

NAMES = {"test": "test", "val": "validation"}


@dataclass(frozen=True)
class Seen:
    """The keys of the images that a checkpoint, and every teacher of it, has seen.

    Attributes:
        path: the checkpoint.
        train: keys of images that weights were fitted to.
        val: keys of images by which weights were chosen.
        complete: whether nothing is missing, such as the images of imported weights.
    """

    path: Path
    train: frozenset[str] = frozenset()
    val: frozenset[str] = frozenset()
    complete: bool = True


def seen_record(
    config: Mapping[str, Any], datamodule: L.LightningDataModule, teachers: Sequence[Seen]
) -> dict[str, Any]:
    """Return what a run's checkpoints keep of the images that it sees.

    Args:
        config: of the run.
        datamodule: set up.
        teachers: of the run, none where it is no distillation.

    Returns:
        `train` and `val`, int64 tensors of the keys of `image_keys`, those of the teachers
        included, and `complete`.
    """
    namespace = _namespace(config["datamodule"])
    keys = image_keys(datamodule.parts, namespace, datamodule.digests)
    record: dict[str, Any] = {"complete": all(teacher.complete for teacher in teachers)}
    for part in ("train", "val"):
        own = _of_part(keys, datamodule.parts, part)
        values = sorted(int(key, 16) for key in own.union(*(getattr(t, part) for t in teachers)))
        record[part] = torch.from_numpy(np.array(values, np.uint64).view(np.int64))
    return record


def find_seen(path: Path, checkpoint: Mapping[str, Any]) -> Seen:
    """Return what a checkpoint has seen: by its own record, or by the `splits.csv` of its run.

    Args:
        path: where the checkpoint lies.
        checkpoint: as loaded.
    """
    record = checkpoint.get("seen_images")
    if record is not None:
        try:
            train, val = (_from_tensor(record[part]) for part in ("train", "val"))
            return Seen(path, train, val, record["complete"] is True)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return Seen(path, complete=False)
    try:
        parts, digests = read_parts(path.parent.parent / "splits.csv")
    except UserError:
        return Seen(path, complete=False)
    config = checkpoint["config"]
    namespace = _namespace(config["datamodule"])
    # Without digests, own files can be compared with those of the same folder alone, and the
    # images of its own teacher were not recorded then.
    complete = not takes_teacher(config) and (digests is not None or namespace is not None)
    if digests is None and namespace is None:
        namespace = _place(config["datamodule"])
    keys = image_keys(parts, namespace, digests)
    train, val = (_of_part(keys, parts, part) for part in ("train", "val"))
    return Seen(path, train, val, complete)


def check_teacher(
    teachers: Sequence[Seen],
    config: Mapping[str, Any],
    parts: Mapping[str, str],
    digests: Mapping[str, str] | None = None,
) -> dict[str, int] | None:
    """Refuse teachers that have seen images on which their student is validated or tested.

    A teacher must not be trained on validation or test images of the student, nor chosen by test
    images. Images that the student itself learns from under another name do not count: the split
    has that leak with any teacher.

    Args:
        teachers: what each of them has seen.
        config: of the student; `teacher.allow_leak` allows it.
        parts: of the student's images by id.
        digests: of these; without, only images that are known by name are found.

    Returns:
        How many `val` and `test` images of the student they have seen, or `None` where that is
        not known of all teachers.

    Raises:
        UserError: with the teacher's path and the number of images.
    """
    namespace, place = _namespace(config["datamodule"]), _place(config["datamodule"])
    keys = image_keys(parts, namespace, digests)
    if namespace is None:
        # Runs of the same folder from before there were digests.
        by_place = image_keys(parts, place)
        keys = {key: found | by_place[key] for key, found in keys.items()}
    learned = _of_part(keys, parts, "train")
    known = learned | _of_part(keys, parts, "val")
    seen: dict[str, set[str]] = {part: set() for part in NAMES}
    for teacher in teachers:
        found: dict[str, list[str]] = {"val": [], "test": [], "chosen": []}
        for key, part in parts.items():
            if part != "train" and keys[key] & teacher.train and not keys[key] & learned:
                found[part].append(key)
            elif part == "test" and keys[key] & teacher.val and not keys[key] & known:
                found["chosen"].append(key)
        if any(found.values()) and not config["teacher"].get("allow_leak"):
            raise UserError(
                f"The teacher {teacher.path} {_described(found)}; train a teacher on the same "
                "split, or set teacher.allow_leak=true to reproduce a paper that has this leak."
            )
        seen["val"].update(found["val"])
        seen["test"].update(found["test"], found["chosen"])
    counts = {part: len(ids) for part, ids in seen.items()}
    return counts if all(teacher.complete for teacher in teachers) else None


def check_same_photographs(
    teachers: Sequence[Seen], config: Mapping[str, Any], datamodule: L.LightningDataModule
) -> None:
    """Refuse a teacher that was found by the name of a folder and knows none of its photographs.

    Args:
        teachers: what each of them has seen.
        config: of the student.
        datamodule: of the student, set up.

    Raises:
        UserError: with the teacher's path.
    """
    if not is_own_data(config["datamodule"]):
        return
    keys = image_keys(datamodule.parts, None, datamodule.digests)
    ours = _of_part(keys, datamodule.parts, "train")
    for teacher in teachers:
        if teacher.train and not teacher.train & ours:
            raise UserError(
                f"The newest run of teacher.experiment={config['teacher']['experiment']} on a "
                f"folder named {config['data_label']} has learned from none of the training images "
                f"in {datamodule.root}; train a teacher on these, or set "
                f"teacher.checkpoint={teacher.path} to learn from that one."
            )


def is_own_data(data: Mapping[str, Any]) -> bool:
    """Tell whether a config's dataset is a folder of one's own, not a published or made-up one."""
    return _namespace(data) is None


def leaks_by_id(theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Tell whether a teacher on the same dataset has seen validation or test images of a student.

    Args:
        theirs, ours: parts of the teacher's and of the student's images by id.
    """
    held_out = {"train": ("val", "test"), "val": ("test",)}
    return any(ours.get(key) in held_out.get(part, ()) for key, part in theirs.items())


def _described(found: Mapping[str, Sequence[str]]) -> str:
    """Return a message's words for which images of a student a teacher has seen."""
    counts = [f"{len(found[part])} {name}" for part, name in NAMES.items() if found[part]]
    phrases = [f"was trained on {' and '.join(counts)} images"] if counts else []
    if found["chosen"]:
        phrases.append(f"was chosen by {len(found['chosen'])} test images")
    first = next(ids[0] for ids in (found["test"], found["val"], found["chosen"]) if ids)
    return f"{' and '.join(phrases)} of this student, first {first}"


def _of_part(
    keys: Mapping[str, frozenset[str]], parts: Mapping[str, str], part: str
) -> frozenset[str]:
    return frozenset().union(*(keys[key] for key, its in parts.items() if its == part))


def _from_tensor(values: torch.Tensor) -> frozenset[str]:
    numbers = values.to(torch.int64).numpy().view(np.uint64)
    return frozenset(f"{number:016x}" for number in numbers.tolist())


def _namespace(data: Mapping[str, Any]) -> str | None:
    """Return in which an id is always one photograph, none for own files."""
    try:
        published = bool(look_up(datamodules, data["name"], "datamodule.name").source)
    except UserError:
        published = False
    if published:
        return data["name"]
    if "content_seed" in data:
        return f"{data['name']} {data['content_seed']}"
    return None


def _place(data: Mapping[str, Any]) -> str:
    return f"{data['name']} {Path(data.get('root') or '.').resolve()}"
