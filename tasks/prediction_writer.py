"""What a prediction leaves behind: masks and maps as pictures, and a table."""

import csv
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from common.files import atomic_path
from common.geometry import restore
from common.pictures import PREDICTION_COLOUR, draw_contour
from common.tables import gather_rows, write_rows
from datamodules.transforms import read_image
from lightning_modules.metrics import doubt, expected_dice

__all__ = ["FORMATS", "PredictionWriter", "read_table"]

# What is written of each photograph, by `output_format`; the first is written last.
FORMATS = {
    "png": ("{}_mask.png", "{}_probability.png", "{}_uncertainty.png", "{}_overlay.jpg"),
    "mediqa_tiff": ("{}_mask_ann1.tiff",),
}
COLUMNS = (
    "file",
    "name",
    "height",
    "width",
    "lesion_pixels",
    "lesion_fraction",
    "components",
    "expected_dice",
    "mean_uncertainty",
    "boundary_uncertainty",
    "seconds",
    "error",
)
# Half the width of the band along the outline, as a share of the image's diagonal.
BAND = 0.01
THREADS = 4


class PredictionWriter(L.Callback):
    """Writes what a segmentation module predicts for photographs, at their own size.

    Args:
        folder: where to.
        output_format: `png` writes a mask of 0 and 255, the probability and the uncertainty
            (0.5 is white) as grey pictures, and the photograph with the outline; `mediqa_tiff` only
            the mask, as the MEDIQA-MAGIC challenge wants it.
        threshold: probability above which a pixel is lesion, after resizing.
        letterbox: whether the network's square keeps the proportions of the photograph.
        total: photographs of all processes, for the progress bar.
        progress: whether to show one.
    """

    def __init__(
        self,
        folder: Path,
        output_format: str,
        threshold: float,
        letterbox: bool,
        total: int,
        progress: bool = True,
    ) -> None:
        self.folder = folder
        self.names = FORMATS[output_format]
        self.threshold = threshold
        self.letterbox = letterbox
        self.total = total
        self.rows: list[dict[str, Any]] = []
        self._progress = progress
        self._jobs: list[Future] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pool = ThreadPoolExecutor(THREADS)
        self._bar = Progress(
            TextColumn("Predicting"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.2f} images/s"),
            TimeRemainingColumn(),
            disable=not (self._progress and trainer.is_global_zero),
        )
        self._bar.start()
        share = -(-self.total // trainer.world_size)
        self._task = self._bar.add_task("", total=share, rate=0.0)
        self._started = time.perf_counter()

    def on_predict_batch_start(self, *args: Any) -> None:
        self._batch_started = time.perf_counter()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Any],
        *args: Any,
    ) -> None:
        count = len(batch["id"])
        # Copying to the host waits until the device has done all of it.
        probability, uncertainty = outputs["probability"].float().cpu(), doubt(outputs).cpu()
        seconds = (time.perf_counter() - self._batch_started) / count
        for index in range(count):
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            row |= {key: batch[key][index] for key in ("file", "name", "error")}
            self.rows.append(row)
            if not row["error"]:
                size = batch["size"][index].tolist()
                row["seconds"] = round(seconds, 4)
                maps = probability[index], uncertainty[index]
                self._jobs.append(self._pool.submit(self._write, row, size, *maps))
        # Photographs that wait to be written must not fill the memory.
        while len(self._jobs) > 2 * THREADS:
            self._jobs.pop(0).result()
        rate = len(self.rows) / (time.perf_counter() - self._started)
        self._bar.update(self._task, advance=count, rate=rate)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        for job in self._jobs:
            job.result()
        self.rows = gather_rows(self.rows)
        if trainer.is_global_zero:
            path = self.folder / "predictions.csv"
            rows = {row["name"]: row for row in [*read_table(path), *self.rows]}
            if rows:
                write_rows(path, sorted(rows.values(), key=lambda row: row["name"]))

    def on_exception(self, *args: Any) -> None:
        self._close()

    def _close(self) -> None:
        self._bar.stop()
        self._pool.shutdown()

    def _write(
        self, row: dict[str, Any], size: list[int], probability: Tensor, uncertainty: Tensor
    ) -> None:
        """Write the files of a photograph and complete its row."""
        whole = restore(probability, size, self.letterbox)
        chance = whole[0].numpy()
        unsure = restore(uncertainty, size, self.letterbox)[0].numpy()
        mask = (chance > self.threshold).astype(np.uint8)
        near = _band(mask, BAND * float(np.hypot(*size)))
        row |= {
            "height": size[0],
            "width": size[1],
            "lesion_pixels": int(mask.sum()),
            "lesion_fraction": round(float(mask.mean()), 6),
            "components": cv2.connectedComponents(mask, connectivity=8)[0] - 1,
            "expected_dice": round(float(expected_dice(whole[None], self.threshold)), 6),
            "mean_uncertainty": round(float(unsure.mean()), 6),
            "boundary_uncertainty": round(float(unsure[near].mean()), 6) if near.any() else "",
        }
        pictures: list[Callable[[], np.ndarray]] = [
            lambda: mask * 255,
            lambda: _grey(chance),
            lambda: _grey(unsure * 2),
            lambda: _overlay(read_image(Path(row["file"])), mask),
        ]
        # The mask comes last: where it is, all is there.
        for name, draw in reversed(list(zip(self.names, pictures, strict=False))):
            path = self.folder / name.format(row["name"])
            with atomic_path(path) as temporary:
                kind = {".jpg": "JPEG", ".tiff": "TIFF"}.get(path.suffix, "PNG")
                Image.fromarray(draw()).save(temporary, format=kind)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier `predictions.csv`, none where there is none of ours."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        return list(table) if tuple(table.fieldnames or ()) == COLUMNS else []


def _band(mask: np.ndarray, width: float) -> np.ndarray:
    """Return the pixels within a distance of a mask's outline."""
    if mask.min() == mask.max():
        return np.zeros(mask.shape, dtype=bool)
    inside, outside = (
        cv2.distanceTransform(values, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        for values in (mask, 1 - mask)
    )
    return np.maximum(inside, outside) <= max(width, 1.0)


def _grey(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _overlay(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    thickness = max(1, round(max(mask.shape) / 400))
    return draw_contour(photo, mask, PREDICTION_COLOUR, thickness)
