"""Exponential moving average of the weights, with the references' warm-up."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from common.errors import UserError

__all__ = ["EMA", "ema_decay"]


def ema_decay(
    step: int,
    beta: float,
    update_after_step: int,
    update_every: int,
    inv_gamma: float,
    power: float,
) -> float | None:
    """Return the decay of one update: `average <- average + (1 - decay)(online - average)`.

    With `k = step - update_after_step` the decay is `min(beta, 1 - (1 + k / inv_gamma)^-power)`.
    Up to and including the first update with `k > 0` it is 0, a plain copy.

    Args:
        step: updates before this one, from 0.
        beta: largest decay, in [0, 1].
        update_after_step: updates that are plain copies.
        update_every: only every such update counts.
        inv_gamma, power: speed of the warm-up, positive.

    Returns:
        The decay, or `None` where this update is skipped.

    Source: the EMA warm-up of K. Crowson's notes as in the ema_pytorch library, version 0.2.3.
    """
    if step % update_every:
        return None
    first_average = (update_after_step // update_every + 1) * update_every
    if step <= first_average:
        return 0.0
    k = step - update_after_step
    return min(beta, max(0.0, 1 - (1 + k / inv_gamma) ** -power))


class EMA(WeightAveraging):
    """Keeps averaged weights; validates, tests and stores them.

    A checkpoint's `state_dict` holds the average and `current_model_state` the online weights.

    Args:
        beta, update_after_step, update_every, inv_gamma, power: see `ema_decay`.

    Raises:
        UserError: an argument is outside its range.
    """

    def __init__(
        self,
        beta: float = 0.9999,
        update_after_step: int = 500,
        update_every: int = 1,
        inv_gamma: float = 1.0,
        power: float = 0.9,
    ) -> None:
        for key, legal in (
            ("beta", 0 <= beta <= 1),
            ("update_after_step", update_after_step >= 0),
            ("update_every", update_every >= 1),
            ("inv_gamma", inv_gamma > 0),
            ("power", power > 0),
        ):
            if not legal:
                raise UserError(f"callbacks.ema.{key} is out of range; see callbacks.EMA.")
        self.settings = {
            "beta": beta,
            "update_after_step": update_after_step,
            "update_every": update_every,
            "inv_gamma": inv_gamma,
            "power": power,
        }
        super().__init__(use_buffers=True, multi_avg_fn=self._average)

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], online: list[Tensor], num_averaged: Tensor) -> None:
        decay = ema_decay(int(num_averaged), **self.settings)
        if decay is None:
            return
        if decay == 0 or not averaged[0].is_floating_point():
            torch._foreach_copy_(averaged, online)
        else:
            torch._foreach_lerp_(averaged, online, 1 - decay)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Outside of fitting, the averaged weights that were just loaded are what is wanted.
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Fitting left the average in the module; a later validation must not swap anything.
        self._average_model = None
