"""What becomes of optimizer steps and of predictions that are not finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError, check_choice
from common.text import say
from lightning_modules.callbacks.monitor import gradient_norm

__all__ = ["NonFinite"]

# Images without a finite prediction that are named.
NAMED = 5


class NonFinite(L.Callback):
    """Stops a run before a step with an infinite or undefined loss, or leaves that step out.

    The gradient counts like the loss, except in `16-mixed` precision, whose scaler leaves out steps
    with such gradients by itself. One such batch makes the whole step of accumulated gradients and
    of all processes one.

    A prediction that is not finite stops nothing, since a network may still learn better: such
    images of a validation or test are counted in `val/not_finite` or `test/not_finite`, which are
    only there if there are any, and some are named on the screen. Every score takes its worst value
    for them.

    Args:
        action: `stop`, or `skip`: the step changes neither weights, nor what the optimizer and
            normalisation layers remember. `train/skipped` counts such steps, also in a resumed run.

    Raises:
        UserError: an unknown action. While training: such a step, with the ids of its images.
    """

    def __init__(self, action: str = "stop") -> None:
        check_choice("callbacks.non_finite.action", action, ("stop", "skip"))
        self.action = action
        self.skipped = 0
        self._skipped_ids: list[str] = []
        # Since the last step: the ids and the loss of each batch, and the buffers before them.
        self._batches: list[tuple[list[str], Tensor]] = []
        self._buffers: list[Tensor] = []
        self._ids: list[str] = []
        # Images of a validation or test, and the ids of those that have no finite prediction.
        self._predicted = 0
        self._undefined: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "ids": self._skipped_ids}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._skipped_ids = state_dict["skipped"], state_dict["ids"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._ids = list(batch["id"])
        if self.action == "skip" and not self._batches:
            # A forward pass is enough to spoil the running means of batch normalisation.
            self._buffers = [buffer.clone() for buffer in pl_module.buffers()]

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        self._batches.append((self._ids, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        batches, self._batches = self._batches, []
        checked = [loss for _, loss in batches]
        if trainer.precision != "16-mixed":
            checked.append(gradient_norm(optimizer))
        # Waits for the GPU in each step, since the next thing to happen changes the weights.
        finite = torch.stack([value.isfinite().all() for value in checked]).tolist()
        bad = not all(finite)
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            of_loss = [ids for (ids, _), fine in zip(batches, finite, strict=False) if not fine]
            ids = _of_all_processes(trainer, of_loss)
            what = "loss" if ids else "gradient"
            ids = ids or _of_all_processes(trainer, [ids for ids, _ in batches])
            if self.action == "stop":
                raise UserError(_explain(what, trainer.global_step, ids))
            self._leave_out(pl_module, optimizer, ids)
        if self.action == "skip":
            pl_module.log("train/skipped", float(self.skipped))

    def _leave_out(
        self, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, ids: list[str]
    ) -> None:
        self.skipped += 1
        self._skipped_ids = ids
        # Without any gradients an optimizer changes nothing, its own state included.
        optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(pl_module.buffers(), self._buffers, strict=True):
            buffer.copy_(before)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._predicted, self._undefined = 0, []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Mapping[str, Any],
        batch: Mapping[str, Any],
        *args: Any,
    ) -> None:
        # Masks may be sampled for the first images only.
        for sample, probability in zip(batch["id"], outputs.get("probability", ()), strict=False):
            self._predicted += 1
            if not probability.isfinite().all():
                self._undefined.append(sample)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        part = "test" if trainer.testing else "val"
        counts = torch.tensor([len(self._undefined), self._predicted], device=pl_module.device)
        undefined, predicted = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if not undefined:
            return
        pl_module.log(f"{part}/not_finite", float(undefined))
        ids = _of_all_processes(trainer, [self._undefined])
        if trainer.is_global_zero:
            say(_explain_predictions(part, ids, predicted))

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.skipped and trainer.is_global_zero:
            say(
                f"{self.skipped} optimizer steps were left out, since their loss or gradient was "
                f"not finite; the last one had the images {', '.join(self._skipped_ids)}."
            )


def _explain(what: str, step: int, ids: Sequence[str]) -> str:
    return (
        f"The {what} of optimizer step {step} is not finite, with the images {', '.join(ids)}; the "
        "run stops before it changes the weights. Lower lightning_module.optimizer.lr, set "
        "trainer.gradient_clip_val=1, leave such steps out with callbacks.non_finite.action=skip, "
        "or look at these images with task=check_data and task=show_data."
    )


def _explain_predictions(part: str, ids: Sequence[str], predicted: int) -> str:
    named = ", ".join(ids[:NAMED]) + (", ..." if len(ids) > NAMED else "")
    return (
        f"{part}: what the network predicts is not finite for {len(ids)} of {predicted} images "
        f"({named}); they count as the worst in every score. If masks are sampled, "
        "sampler.clip_x0=true keeps every step within bounds."
    )


def _of_all_processes(trainer: L.Trainer, ids: Sequence[Sequence[str]]) -> list[str]:
    """Return the ids of some batches of each process in one list."""
    gathered = [list(ids)]
    if trainer.world_size > 1:
        gathered = [[] for _ in range(trainer.world_size)]
        dist.all_gather_object(gathered, list(ids))
    return [sample for batches in gathered for batch in batches for sample in batch]
