"""An end of training when the validation loss has stopped falling."""

from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from common.errors import check_choice
from lightning_modules.callbacks.best_checkpoint import TIES
from lightning_modules.callbacks.last_checkpoint import between_epochs

__all__ = ["EarlyStop"]

_OR_EQUAL = {torch.lt: torch.le, torch.gt: torch.ge}


class EarlyStop(EarlyStopping):
    """Ends training after `patience` validations without a better score.

    Only validations of the schedule count, and each before the checkpoint of it is written, so that
    a resumed run ends where one that was never stopped would.

    Args:
        monitor: key of the score.
        patience: validations to wait, at least 1.
        mode: `min` or `max`, which of two scores is better.
        ties: whether a score that equals the best one counts as another validation without a better
            score (`first`), or starts the count anew (`later`, as the D-KD repository does).

    Raises:
        UserError: `ties` is neither.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        patience: int = 15,
        mode: str = "min",
        ties: str = "first",
    ) -> None:
        check_choice("callbacks.early_stopping.ties", ties, TIES)
        # The base class recognises its mode by the strict comparison.
        self.ties = "first"
        super().__init__(monitor, patience=patience, mode=mode, check_on_train_epoch_end=False)
        self.ties = ties

    @property
    def monitor_op(self) -> Callable[..., Tensor]:
        """The comparison by which a score counts as better than the best one."""
        strict = super().monitor_op
        return _OR_EQUAL[strict] if self.ties == "later" else strict

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not between_epochs(trainer):
            super().on_validation_end(trainer, pl_module)
