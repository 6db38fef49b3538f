"""Sampled masks as pictures, on disk and in the loggers that show them."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from common.files import atomic_path
from common.pictures import (
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    draw_contour,
    enlarge,
    stretch,
    tile,
)

__all__ = ["Pictures"]

COLUMNS = ("image", "truth", "sample", "overlay")
SMALLEST_SIDE = 128


class Pictures(L.Callback):
    """Draws the first sampled masks of each validation and of the test.

    A row is: image, true mask, sampled probability, and both outlines on the image (truth green,
    prediction blue). They are written to `samples/step_<n>.png` and `samples/test.png`, and logged
    as a W&B table and to TensorBoard.

    Args:
        folder: the run folder.
        num_images: rows of a picture; 0 draws none.
    """

    def __init__(self, folder: str | Path, num_images: int = 8) -> None:
        self.folder = Path(folder) / "samples"
        self.num_images = num_images
        self._rows: list[list[np.ndarray]] = []
        self._ids: list[str] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows, self._ids = [], []

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        *args: Any,
    ) -> None:
        if not trainer.is_global_zero or "probability" not in (outputs or {}):
            return
        for index, probability in enumerate(outputs["probability"]):
            if len(self._rows) >= self.num_images:
                return
            self._rows.append(_row(batch["image"][index], batch["mask"][index], probability))
            self._ids.append(batch["id"][index])

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, f"step_{trainer.global_step:07d}", "val/samples")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "test", "test/samples")

    def _write(self, trainer: L.Trainer, name: str, key: str) -> None:
        if not self._rows or trainer.sanity_checking:
            return
        picture = tile(self._rows)
        with atomic_path(self.folder / f"{name}.png") as path:
            Image.fromarray(picture).save(path, format="PNG")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_table(logger, key, self._ids, self._rows)
            elif isinstance(logger, TensorBoardLogger):
                step = trainer.global_step
                logger.experiment.add_image(key, picture, step, dataformats="HWC")


def _row(image: Tensor, mask: Tensor, probability: Tensor) -> list[np.ndarray]:
    photo = enlarge(stretch(image.float().cpu().numpy()), SMALLEST_SIDE)
    values = probability[0].float().cpu().numpy()
    truth, shown, predicted = (
        enlarge(picture.astype(np.uint8), SMALLEST_SIDE)
        for picture in (mask[0].cpu().numpy() > 0.5, values * 255, values > 0.5)
    )
    overlay = draw_contour(photo, truth, TRUTH_COLOUR)
    overlay = draw_contour(overlay, predicted, PREDICTION_COLOUR)
    return [photo, _grey(truth * 255), _grey(shown), overlay]


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def _log_table(logger: WandbLogger, key: str, ids: list[str], rows: list[list[np.ndarray]]) -> None:
    import wandb  # Starting it costs seconds that runs without it need not pay.

    data = [
        [sample, *(wandb.Image(picture) for picture in row)]
        for sample, row in zip(ids, rows, strict=True)
    ]
    logger.log_table(key, columns=["id", *COLUMNS], data=data)
