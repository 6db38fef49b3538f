"""What a prediction leaves behind: masks and maps as pictures, and a table."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import cv2
import lightning as L
import numpy as np
from PIL import Image
from torch import Tensor

from common.files import atomic_path
from common.geometry import restore
from common.pictures import PREDICTION_COLOUR, draw_contour
from datamodules.decoding import read_image
from lightning_modules.metrics import doubt, expected_dice
from tasks.photograph_writer import PhotographWriter

__all__ = ["FORMATS", "PredictionWriter"]

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


class PredictionWriter(PhotographWriter):
    """Writes what a segmentation module predicts for photographs, at their own size.

    Args:
        folder, total, progress: as in `PhotographWriter`.
        output_format: `png` writes a mask of 0 and 255, the probability and the uncertainty
            (0.5 is white) as grey pictures, and the photograph with the outline; `mediqa_tiff` only
            the mask, as the MEDIQA-MAGIC challenge wants it.
        threshold: probability above which a pixel is lesion, after resizing.
        letterbox: whether the network's square keeps the proportions of the photograph.
    """

    columns: ClassVar[tuple[str, ...]] = COLUMNS

    def __init__(
        self,
        folder: Path,
        output_format: str,
        threshold: float,
        letterbox: bool,
        total: int,
        progress: bool = True,
    ) -> None:
        super().__init__(folder, total, progress)
        self.names = FORMATS[output_format]
        self.threshold = threshold
        self.letterbox = letterbox
        self._jobs: list[Future] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pool = ThreadPoolExecutor(THREADS)
        super().on_predict_start(trainer, pl_module)

    def describe(
        self, row: dict[str, Any], outputs: dict[str, Tensor], index: int, size: list[int]
    ) -> None:
        maps = outputs["probability"][index], doubt(outputs)[index]
        self._jobs.append(self._pool.submit(self._write, row, size, *maps))
        # Photographs that wait to be written must not fill the memory.
        while len(self._jobs) > 2 * THREADS:
            self._jobs.pop(0).result()

    def close(self) -> None:
        super().close()
        self._pool.shutdown()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for job in self._jobs:
            job.result()
        super().on_predict_end(trainer, pl_module)

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
