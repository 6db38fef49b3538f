"""An end of training when the validation loss has stopped falling."""

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping

from lightning_modules.callbacks.last_checkpoint import between_epochs

__all__ = ["EarlyStop"]


class EarlyStop(EarlyStopping):
    """Ends training after `patience` validations without a better score.

    Only validations of the schedule count, and each before the checkpoint of it is written, so that
    a resumed run ends where one that was never stopped would.

    Args:
        monitor: key of the score.
        patience: validations to wait, at least 1.
        mode: `min` or `max`, which of two scores is better.
    """

    def __init__(self, monitor: str = "val/loss", patience: int = 15, mode: str = "min") -> None:
        super().__init__(monitor, patience=patience, mode=mode, check_on_train_epoch_end=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not between_epochs(trainer):
            super().on_validation_end(trainer, pl_module)
