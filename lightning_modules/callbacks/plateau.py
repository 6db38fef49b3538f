"""A learning rate that falls when the validation loss stops falling."""

from typing import Any

import lightning as L
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common.errors import UserError
from lightning_modules.callbacks.last_checkpoint import between_epochs

__all__ = ["Plateau"]

# What the late schedule takes for the best loss before the first validation, as published.
NONE_YET = 1000.0


class Plateau(L.Callback):
    """Multiplies the learning rate by `factor` after `patience` validations without a lower loss.

    `val/loss` is taken at fixed times and noise, so that a fall is one of the network and not of
    chance. The Trainer's own handling of this scheduler loses a step when a run resumes.

    Args:
        factor: in (0, 1).
        patience: validations to wait, at least 0.
        min_lr: no rate below this.
        late: take each validation for the best one before it, as the D-KD repository does, so that
            the rate falls one validation later.

    Raises:
        UserError: an argument is outside its range.
    """

    def __init__(
        self, factor: float = 0.5, patience: int = 5, min_lr: float = 0.0, late: bool = False
    ) -> None:
        for key, value, legal in (
            ("factor", factor, 0 < factor < 1),
            ("patience", patience, isinstance(patience, int) and patience >= 0),
            ("min_lr", min_lr, min_lr >= 0),
        ):
            if not legal:
                raise UserError(f"callbacks.plateau.{key}={value} is out of range; see Plateau.")
        self.settings = {"factor": factor, "patience": patience, "min_lr": min_lr}
        self.late = late
        self._best = NONE_YET
        self._scheduler: ReduceLROnPlateau | None = None
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        if self._scheduler is None:
            return {}
        state = self._scheduler.state_dict()
        kept = {key: state[key] for key in ("best", "num_bad_epochs")}
        return kept | ({"best_validation": self._best} if self.late else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)
        self._best = self._loaded.pop("best_validation", NONE_YET)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._scheduler = ReduceLROnPlateau(trainer.optimizers[0], **self.settings)
        self._scheduler.load_state_dict(self._loaded)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The extra validation after training is not one that an uninterrupted run would have had.
        if self._scheduler is None or between_epochs(trainer):
            return
        loss = float(trainer.callback_metrics["val/loss"])
        seen = self._best if self.late else loss
        self._best = min(self._best, loss)
        self._scheduler.step(seen)
