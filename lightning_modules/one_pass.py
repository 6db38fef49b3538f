"""What every method shares whose network is called once for a prediction."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.losses import WeightedSum
from lightning_modules.method import Method

# Not the base class: what is listed here can be chosen as a method.
__all__: list[str] = []

Answer = dict[str, Any]


class OnePass(Method):
    """A `Method` whose loss terms take what one call of the network answers, and the truth."""

    @abstractmethod
    def truth(self, batch: Mapping[str, Any]) -> Answer:
        """Return what the loss terms take of the labels of a batch."""

    @abstractmethod
    def prediction(self, answer: Answer) -> dict[str, Any]:
        """Return what `predict` does of a network's answer."""

    def respond(self, batch: Mapping[str, Any], losses: WeightedSum | None) -> Answer:
        """Call the network once and return what the loss terms take of it, `logits` at least."""
        return {"logits": self.network(batch["image"]).float()}

    def extra_loss_inputs(self, losses: WeightedSum, batch: Mapping[str, Any]) -> Answer:
        """Return what the loss terms of a subclass need beyond `respond` and `truth`."""
        return {}

    def weighted_losses(
        self, batch: Mapping[str, Any], losses: WeightedSum | None
    ) -> tuple[dict[str, Tensor], Answer]:
        """Return the weighted `loss` with its terms, and the network's answer.

        Args:
            batch: of the project's contract, with the truth.
            losses: the terms; where there are none, nor are there losses.
        """
        # Before the network is called: its graph need not be held meanwhile.
        extra = self.extra_loss_inputs(losses, batch) if losses is not None else {}
        answer = self.respond(batch, losses)
        if losses is None:
            return {}, answer
        with torch.autocast(self.device.type, enabled=False):
            loss, terms = losses(**answer, **extra, **self.truth(batch))
        return {"loss": loss, **terms}, answer

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        losses, _ = self.weighted_losses(batch, self.losses)
        loss = losses.pop("loss")
        self.log_training(loss, losses, len(batch["image"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        losses, answer = self.weighted_losses(batch, self.val_terms)
        self.val_losses.update(losses, len(batch["id"]))
        result = self.prediction(answer)
        self.score_validation(result, batch)
        return result

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        losses, answer = self.weighted_losses(batch, self.test_terms)
        if losses:
            self.test_losses.update(losses, len(batch["id"]))
        result = self.prediction(answer)
        return {**result, "per_image": self.score_test(result, batch)}

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `probability` of each pixel or class, and the `logits` it is made of.

        Args:
            batch: with `image`; nothing else is read.
        """
        return self.prediction(self.respond(batch, None))
