"""What a prediction leaves behind: masks and maps as pictures, and a table."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import cv2
import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import atomic_path
from common.geometry import fitted, restore, restoring_weights
from common.pictures import PREDICTION_COLOUR, draw_contour
from datamodules.large import WHOLE_PIXELS, read_photograph
from datamodules.problems import BadFileError
from lightning_modules.metrics import doubt
from tasks.photograph_writer import PhotographWriter, Predicted

__all__ = ["FORMATS", "PredictionWriter", "restored_rows"]

# What is written of each photograph, by `output_format`; the first is written last.
FORMATS = {
    "png": ("{}_mask.png", "{}_probability.png", "{}_uncertainty.png", "{}_overlay.jpg"),
    "mediqa_tiff": ("{}_mask_ann1.tiff",),
}
# Half the width of the band along the outline, as a share of the image's diagonal.
BAND = 0.01
THREADS = 4
# Of a map that are restored at once.
STRIP_PIXELS = 4_000_000
# At which the outline of a large photograph is measured.
OUTLINE_PIXELS = 4_000_000


class PredictionWriter(PhotographWriter):
    """Writes what a segmentation module predicts for photographs, at their own size.

    Of photographs above `WHOLE_PIXELS` the picture with the outline has a reduced size, and
    `boundary_uncertainty` is measured at a reduced size.

    Args:
        folder, settings, names, progress: as in `PhotographWriter`.
        output_format: `png` writes a mask of 0 and 255, the probability and the uncertainty
            (0.5 is white) as grey pictures, and the photograph with the outline; `mediqa_tiff` only
            the mask, as the MEDIQA-MAGIC challenge wants it.
        threshold: probability above which a pixel is lesion, after resizing.
        letterbox: whether the network's square keeps the proportions of the photograph.
        max_megapixels: as in `read_photograph`.
    """

    described: ClassVar[tuple[str, ...]] = (
        "lesion_pixels",
        "lesion_fraction",
        "components",
        "expected_dice",
        "mean_uncertainty",
        "boundary_uncertainty",
    )

    def __init__(
        self,
        folder: Path,
        output_format: str,
        threshold: float,
        letterbox: bool,
        max_megapixels: float,
        settings: str,
        names: Sequence[str],
        progress: bool = True,
    ) -> None:
        super().__init__(folder, settings, names, progress)
        self.templates = FORMATS[output_format]
        self.threshold = threshold
        self.letterbox = letterbox
        self.max_megapixels = max_megapixels
        self._jobs: list[Future] = []
        self._pool = ThreadPoolExecutor(THREADS)
        # Maps of one large photograph at a time are held at its own size.
        self._large = threading.Lock()

    def describe(
        self, row: dict[str, Any], outputs: dict[str, Tensor], index: int, photograph: Predicted
    ) -> None:
        maps = outputs["probability"][index], doubt(outputs)[index]
        self._jobs.append(self._pool.submit(self._finish, row, photograph, *maps))
        # Photographs that wait to be written must not fill the memory.
        while len(self._jobs) > 2 * THREADS:
            self._jobs.pop(0).result()

    def close(self) -> None:
        super().close()
        # After an error or a signal, what has not begun is left to the next run.
        self._pool.shutdown(cancel_futures=True)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for job in self._jobs:
            job.result()
        super().on_predict_end(trainer, pl_module)

    def _finish(
        self, row: dict[str, Any], photograph: Predicted, probability: Tensor, uncertainty: Tensor
    ) -> None:
        """Write the files of a photograph, then its row."""
        height, width = photograph.size
        try:
            if height * width > WHOLE_PIXELS:
                with self._large:
                    self._write(row, photograph, probability, uncertainty)
            else:
                self._write(row, photograph, probability, uncertainty)
        except (BadFileError, OSError, MemoryError) as error:
            # Such as a name that becomes too long; a full disk is another error.
            why = str(error) or "there is too little memory"
            row |= dict.fromkeys(self.described, "")
            row["error"] = f"What was predicted for {row['file']} cannot be written: {why}."
        self.record(row)

    def _write(
        self, row: dict[str, Any], photograph: Predicted, probability: Tensor, uncertainty: Tensor
    ) -> None:
        """Write the files of a photograph and complete its row."""
        size = photograph.size
        overlay = None
        if len(self.templates) > 1:
            # First, so that decoding and the maps do not add up in memory.
            overlay = self._overlay(photograph, probability)
        outline = self._along_outline(probability, uncertainty, size)
        mask = np.empty(size, dtype=np.uint8)
        chances = overlap = unsure = 0.0
        for rows, values in restored_rows(probability, size, self.letterbox):
            strip = values > self.threshold
            mask[rows] = strip
            chances += float(values.sum(dtype=np.float64))
            overlap += float(values.sum(dtype=np.float64, where=strip))
        for _, values in restored_rows(uncertainty, size, self.letterbox):
            unsure += float(values.sum(dtype=np.float64))
        pixels = int(np.count_nonzero(mask))
        total = chances + pixels
        row |= {
            "lesion_pixels": pixels,
            "lesion_fraction": round(pixels / mask.size, 6),
            "components": _count_components(mask),
            "expected_dice": round(2 * overlap / total if total > 0 else 1.0, 6),
            "mean_uncertainty": round(unsure / mask.size, 6),
            "boundary_uncertainty": outline,
        }
        pictures: list[Callable[[], np.ndarray]] = [
            lambda: mask * np.uint8(255),
            lambda: _grey(probability, size, self.letterbox),
            lambda: _grey(uncertainty * 2, size, self.letterbox),
            lambda: overlay,
        ]
        for template, draw in reversed(list(zip(self.templates, pictures, strict=False))):
            path = self.folder / template.format(photograph.name)
            with atomic_path(path) as temporary:
                kind = {".jpg": "JPEG", ".tiff": "TIFF"}.get(path.suffix, "PNG")
                Image.fromarray(draw()).save(temporary, format=kind)

    def _mask(self, probability: Tensor, size: tuple[int, int]) -> np.ndarray:
        """Return the mask at a size, uint8 of {0, 1}."""
        whole = restore(probability, size, self.letterbox)[0].numpy()
        return (whole > self.threshold).astype(np.uint8)

    def _overlay(self, photograph: Predicted, probability: Tensor) -> np.ndarray:
        """Return the photograph with the outline of the mask, at the size that is decoded."""
        least = probability.shape[-1]
        photo = read_photograph(photograph.file, least, self.max_megapixels).image
        thickness = max(1, round(max(photo.shape) / 400))
        mask = self._mask(probability, photo.shape[:2])
        return draw_contour(photo, mask, PREDICTION_COLOUR, thickness)

    def _along_outline(
        self, probability: Tensor, uncertainty: Tensor, size: tuple[int, int]
    ) -> float | str:
        """Return the mean uncertainty in the band along the outline, empty without an outline."""
        pixels = size[0] * size[1]
        shrink = (pixels / OUTLINE_PIXELS) ** 0.5 if pixels > WHOLE_PIXELS else 1.0
        height, width = (max(1, round(length / shrink)) for length in size)
        mask = self._mask(probability, (height, width))
        near = _band(mask, BAND * float(np.hypot(height, width)))
        if not near.any():
            return ""
        values = restore(uncertainty, (height, width), self.letterbox)[0].numpy()
        return round(float(values[near].mean()), 6)


def restored_rows(
    values: Tensor, size: tuple[int, int], letterbox: bool
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield a square map `(1, S, S)` at an image's own size in strips of rows.

    Together they are `restore(values, size, letterbox)`, but only a strip is held at a time.

    Yields:
        The rows, and float32 `(rows, W)`.
    """
    height, width = size
    side = values.shape[-1]
    down, across = map(torch.from_numpy, restoring_weights(size, side, letterbox))
    box = fitted(size, side, letterbox)
    square = values[0].float()
    inside = square[box.rows, box.columns]
    count = max(1, STRIP_PIXELS // width)
    for top in range(0, height, count):
        rows = slice(top, min(top + count, height))
        strip = down[rows] @ square @ across.T
        yield rows, strip.clamp(inside.min(), inside.max()).numpy()


def _count_components(mask: np.ndarray) -> int:
    """Return the number of 8-connected lesions: their outer outlines, also those within a hole.

    Labels of all pixels would take four times the memory of the mask.
    """
    _, above = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return 0 if above is None else int((above[0, :, 3] < 0).sum())


def _band(mask: np.ndarray, width: float) -> np.ndarray:
    """Return the pixels within a distance of a mask's outline."""
    if mask.min() == mask.max():
        return np.zeros(mask.shape, dtype=bool)
    inside, outside = (
        cv2.distanceTransform(values, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        for values in (mask, 1 - mask)
    )
    return np.maximum(inside, outside) <= max(width, 1.0)


def _grey(values: Tensor, size: tuple[int, int], letterbox: bool) -> np.ndarray:
    """Return a map at an image's own size as a grey picture, 1 as white."""
    picture = np.empty(size, dtype=np.uint8)
    for rows, strip in restored_rows(values, size, letterbox):
        picture[rows] = (strip.clip(0, 1) * 255).round()
    return picture
