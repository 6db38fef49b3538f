"""Plain segmentation in one pass of a network."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_modules.losses import WeightedSum, bce_loss, dice_loss, focal_loss
from lightning_modules.masks import MaskModule

__all__ = ["Segmentation"]

Answer = dict[str, Any]


class Segmentation(MaskModule):
    """Learns the logit of lesion for each pixel of a photograph.

    `network(image)` returns logits `(B, 1, H, W)`. Everything else is as in `MaskModule`.
    """

    loss_functions: ClassVar = {"bce": bce_loss, "dice": dice_loss, "focal": focal_loss}
    loss_inputs: ClassVar[tuple[str, ...]] = ("logits", "mask")

    @property
    def calls_per_mask(self) -> int:
        """Network calls that one predicted mask costs."""
        return 1

    def network_calls(self, num_val: int, num_test: int) -> tuple[int, int]:
        """Return how many single-image network calls one validation and the test make."""
        return num_val, num_test

    def respond(self, batch: Mapping[str, Any], losses: WeightedSum | None) -> Answer:
        """Call the network once and return what the loss terms take of it, `logits` at least."""
        return {"logits": self.network(batch["image"]).float()}

    def extra_loss_inputs(self, losses: WeightedSum, batch: Mapping[str, Any]) -> Answer:
        """Return what the loss terms of a subclass need beyond `respond` and the mask."""
        return {}

    def segmentation_losses(
        self, batch: Mapping[str, Any], losses: WeightedSum | None
    ) -> tuple[dict[str, Tensor], Answer]:
        """Return the weighted `loss` with its terms, and the network's answer.

        Args:
            batch: with `image` and `mask`.
            losses: the terms; where there are none, nor are there losses.
        """
        # Before the network is called: its graph need not be held meanwhile.
        extra = self.extra_loss_inputs(losses, batch) if losses is not None else {}
        answer = self.respond(batch, losses)
        if losses is None:
            return {}, answer
        with torch.autocast(self.device.type, enabled=False):
            loss, terms = losses(**answer, **extra, mask=batch["mask"])
        return {"loss": loss, **terms}, answer

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        losses, _ = self.segmentation_losses(batch, self.losses)
        loss = losses.pop("loss")
        self.log_training(loss, losses, len(batch["image"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        losses, answer = self.segmentation_losses(batch, self.losses)
        self.val_losses.update(losses, len(batch["id"]))
        result = self.prediction(answer)
        self.score_validation(result, batch)
        return result

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        losses, answer = self.segmentation_losses(batch, self.test_terms)
        if losses:
            self.test_losses.update(losses, len(batch["id"]))
        result = self.prediction(answer)
        return {**result, "per_image": self.test_scores.update(result, batch)}

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the lesion's probability for each pixel.

        Args:
            batch: with `image`; nothing else is read.

        Returns:
            `probability` float32 `(B, 1, H, W)` in [0, 1], and the `logits` that it is made of.
        """
        return self.prediction(self.respond(batch, None))

    def prediction(self, answer: Answer) -> dict[str, Any]:
        """Return what `predict` does of a network's answer."""
        logits = answer["logits"].detach()
        return {"probability": logits.sigmoid(), "logits": logits}
