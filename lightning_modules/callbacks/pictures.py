"""Sampled masks as pictures, on disk and in the loggers that show them."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from common.files import atomic_path
from common.pictures import draw_outlines, enlarge, stretch, tile
from common.runs import NATIVE
from common.tables import gather_rows

__all__ = ["CASES", "Pictures"]

COLUMNS = ("image", "truth", "sample", "overlay")
SMALLEST_SIDE = 128
CASES = ("best", "median", "worst")
CASE_IMAGES = 3


class Pictures(L.Callback):
    """Draws the first sampled masks of each validation and of the test, where there are masks.

    A row is: image, true mask, sampled probability, and both outlines on the image (truth green,
    prediction blue). They are written to `samples/step_<n>.png` and `samples/test.png`, and logged
    as a W&B table and to TensorBoard. The test also leaves `samples/best.png`, `median.png` and
    `worst.png`: the images of the highest, middle and lowest Dice.

    Args:
        folder: the run folder.
        num_images: rows of a picture; 0 draws none.
    """

    def __init__(self, folder: str | Path, num_images: int = 8) -> None:
        self.folder = Path(folder) / "samples"
        self.num_images = num_images
        self._rows: list[list[np.ndarray]] = []
        self._ids: list[str] = []
        self._tested: list[dict[str, Any]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows, self._ids, self._tested = [], [], []

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        *args: Any,
    ) -> None:
        if not trainer.is_global_zero or not _shows_masks(outputs, batch):
            return
        for index, probability in enumerate(outputs["probability"]):
            if len(self._rows) >= self.num_images:
                return
            self._rows.append(_row(batch["image"][index], batch["mask"][index], probability))
            self._ids.append(batch["id"][index])

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        *args: Any,
    ) -> None:
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, *args)
        if not self.num_images or not _shows_masks(outputs, batch):
            return
        scores = outputs["per_image"]
        # A test at native resolution alone has no other Dice.
        for index, dice in enumerate(scores.get("dice", scores.get(f"{NATIVE}dice")).tolist()):
            # At one byte a value, a thousand images of 128 px take 80 MB.
            image = torch.from_numpy(stretch(batch["image"][index].float().cpu().numpy()))
            self._tested.append(
                {
                    "id": batch["id"][index],
                    "dice": dice,
                    "image": image.permute(2, 0, 1),
                    "mask": (batch["mask"][index] > 0.5).to(torch.uint8).cpu(),
                    "probability": (outputs["probability"][index] * 255).to(torch.uint8).cpu(),
                }
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, f"step_{trainer.global_step:07d}", "val/samples")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "test", "test/samples")
        tested = sorted(self._tested, key=lambda case: (case["dice"], case["id"]))
        chosen = {key: tested[rows] for key, rows in _cases(len(tested)).items()}
        for name in CASES:
            cases = gather_rows([{**case, "kind": name} for case in chosen[name]])
            # Of several processes' best the best, and so on.
            cases.sort(key=lambda case: (case["dice"], case["id"]))
            cases = cases[_cases(len(cases))[name]]
            if trainer.is_global_zero and cases:
                rows = [_row(c["image"], c["mask"], c["probability"] / 255) for c in cases]
                with atomic_path(self.folder / f"{name}.png") as path:
                    Image.fromarray(tile(rows)).save(path, format="PNG")
        self._tested = []

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


def _shows_masks(outputs: dict[str, Any] | None, batch: dict[str, Any]) -> bool:
    """Say whether a step returns mask probabilities and their truth is known."""
    # Those of diagnoses are (B, C), and their batches have no masks.
    probability = (outputs or {}).get("probability")
    return "mask" in batch and probability is not None and probability.ndim == 4


def _cases(count: int) -> dict[str, slice]:
    """Return where the cases lie among images sorted by their Dice."""
    middle = max(0, (count - CASE_IMAGES) // 2)
    return {
        "best": slice(max(0, count - CASE_IMAGES), count),
        "median": slice(middle, middle + CASE_IMAGES),
        "worst": slice(0, CASE_IMAGES),
    }


def _row(image: Tensor, mask: Tensor, probability: Tensor) -> list[np.ndarray]:
    photo = enlarge(stretch(image.float().cpu().numpy()), SMALLEST_SIDE)
    values = probability[0].float().cpu().numpy()
    truth, shown, predicted = (
        enlarge(picture.astype(np.uint8), SMALLEST_SIDE)
        for picture in (mask[0].float().cpu().numpy() > 0.5, values * 255, values > 0.5)
    )
    overlay = draw_outlines(photo, truth, predicted)
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
