"""The checkpoint of the best validation, also where two are equally good."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from common.errors import check_choice

__all__ = ["TIES", "BestCheckpoint"]

TIES = ("first", "later")


class BestCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` that can take the later of two equal scores.

    Args:
        ties: which of several validations with the best score is kept: `first`, as Lightning does,
            or `later`, as the D-KD repository does.
        settings: everything that `ModelCheckpoint` takes.

    Raises:
        UserError: `ties` is neither.
    """

    def __init__(self, *, ties: str = "first", **settings: Any) -> None:
        check_choice("callbacks.best.ties", ties, TIES)
        super().__init__(**settings)
        self.ties = ties

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        better = super().check_monitor_top_k(trainer, current)
        if better or self.ties == "first" or current is None:
            return better
        equal = torch.eq(current, self.best_k_models[self.kth_best_model_path])
        return trainer.strategy.reduce_boolean_decision(bool(equal))
