"""A learning rate that falls at given epochs."""

from collections.abc import Sequence

import lightning as L

from common.errors import UserError

__all__ = ["Steps"]


class Steps(L.Callback):
    """Multiplies the learning rate by `factor` at the start of each epoch in `milestones`.

    The rate is a function of the epoch alone, so a resumed run has it too.

    Args:
        milestones: epochs, counted from 0.
        factor: in (0, 1).

    Raises:
        UserError: an argument is outside its range.
    """

    def __init__(self, milestones: Sequence[int], factor: float = 0.1) -> None:
        if not 0 < factor < 1:
            raise UserError(f"callbacks.steps.factor={factor} must lie between 0 and 1.")
        if not all(isinstance(epoch, int) and epoch >= 0 for epoch in milestones):
            raise UserError(
                f"callbacks.steps.milestones={list(milestones)} must be epochs, such as [30, 45]."
            )
        self.milestones = sorted(milestones)
        self.factor = factor

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        passed = sum(epoch <= trainer.current_epoch for epoch in self.milestones)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = pl_module.optimizer_settings["lr"] * self.factor**passed
