"""One more validation when training ends between two of them."""

from typing import Any

import lightning as L

__all__ = ["FinalValidation"]


class FinalValidation(L.Callback):
    """Validates when training ends, unless the last step has just been validated.

    A run stopped by time or steps thus always has a best checkpoint. It must come before the weight
    averaging among the callbacks, whose end of training overwrites the online weights.
    """

    def __init__(self) -> None:
        self._validated_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"validated_step": self._validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated_step = state_dict["validated_step"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._validated_step == trainer.global_step or not trainer.enable_validation:
            return
        trainer.validating = True
        loop = trainer.fit_loop.epoch_loop.val_loop
        # A resumed run with nothing left to train would go on where the last validation ended.
        loop.restarting = False
        loop.run()
        trainer.training = True
