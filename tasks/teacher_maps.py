"""What a teacher predicts for every image of a student's training, computed once."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from filelock import FileLock
from rich.progress import track

from common.arrays import ArrayWriter, array_bytes, is_whole_array
from common.errors import UserError
from common.files import atomic_path, refuse_full
from datamodules.shared_batches import collate
from lightning_modules.teacher import FrozenTeacher

__all__ = ["attach_teacher", "check_cacheable"]


def check_cacheable(module: L.LightningModule) -> None:
    """Refuse a student that needs more of its teacher than a probability for each image.

    Raises:
        UserError: a loss term does, or the student diagnoses.
    """
    if module.kind == "classification":
        raise UserError(
            "teacher.cached=true keeps a teacher's masks, and a classifier has none; set "
            "teacher.cached=false."
        )
    for term in module.live_terms():
        raise UserError(
            f"teacher.cached=true keeps the teacher's probability alone, and "
            f"lightning_module.losses.{term} needs more; set its weight to 0, or "
            "teacher.cached=false."
        )


def attach_teacher(
    teacher: FrozenTeacher,
    datamodule: L.LightningDataModule,
    config: dict[str, Any],
    device: torch.device,
) -> None:
    """Have a datamodule's training and validation batches carry `teacher_probability`.

    The maps, one grey level fine, lie beside the decoded images, under a name that changes with
    the teacher, its sampler, the images and their order. A map is moved with its image by the
    augmentation; what that does to colours the teacher does not see.

    Args:
        teacher: predicts in batches of the training's size.
        datamodule: set up.
        config: of the run.
        device: where the teacher predicts.

    Raises:
        UserError: the disk of the decoded images has no room for the maps.
    """
    given = config["teacher"]["checkpoint"]
    files = [given] if isinstance(given, str) else given
    weights = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    for part in ("train", "val"):
        dataset = datamodule.datasets[part]
        settings = [
            *weights,
            config["teacher"]["weights"],
            config["teacher"].get("sampler"),
            teacher.turns,
            dataset.cache.folder.name,
            dataset.normalization,
            part,
            dataset.ids,
        ]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        path = dataset.cache.folder.with_name(f"{dataset.cache.folder.name}-teacher-{digest}.npy")
        kind = ((len(dataset), *dataset.cache.masks.shape[1:]), "uint8")
        # Of several processes one computes and the others wait.
        lock = path.with_name(f".{path.name}.lock")
        with FileLock(lock):
            try:
                if not is_whole_array(path, *kind):
                    needed = array_bytes(*kind)
                    refuse_full(path.parent, needed, "the teacher's predictions", "paths.cache")
                    maps = _predict(teacher, dataset, config["datamodule"]["batch_size"], device)
                    with atomic_path(path) as temporary, ArrayWriter(temporary, *kind) as file:
                        for index, row in enumerate(maps):
                            file[index] = row
            finally:
                lock.unlink(missing_ok=True)
        dataset.teacher_maps = np.load(path, mmap_mode="r")


def _predict(
    teacher: FrozenTeacher, dataset: Any, batch_size: int, device: torch.device
) -> np.ndarray:
    """Return the probability of every image, uint8 `(N, S, S)` from 0 to 255."""
    teacher.to(device)
    rows = []
    starts = range(0, len(dataset), batch_size)
    for start in track(starts, f"Teacher on {len(dataset)} images"):
        indices = range(start, min(start + batch_size, len(dataset)))
        batch = collate([dataset.plain(index) for index in indices])
        inputs = {"image": batch["image"].to(device), "id": batch["id"]}
        probability = teacher.predict(inputs)["probability"][:, 0]
        for image, values in zip(batch["id"], probability, strict=True):
            if not values.isfinite().all():
                raise UserError(
                    f"What the teacher predicts for the image {image} is not finite; choose "
                    "another teacher, or sampler.clip_x0=true in teacher.sampler where it samples."
                )
        rows.append((probability * 255).round().to(torch.uint8).cpu().numpy())
    return np.concatenate(rows)
