"""Plain segmentation in one pass of a network."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_modules.losses import bce_loss, dice_loss, focal_loss
from lightning_modules.masks import MaskModule
from lightning_modules.one_pass import Answer, OnePass

__all__ = ["Segmentation"]


class Segmentation(OnePass, MaskModule):
    """Learns the logit of lesion for each pixel of a photograph.

    `network(image)` returns logits `(B, 1, H, W)`; so is the `probability` of `predict`, float32
    in [0, 1]. Everything else is as in `MaskModule`.
    """

    loss_functions: ClassVar = {"bce": bce_loss, "dice": dice_loss, "focal": focal_loss}
    loss_inputs: ClassVar[tuple[str, ...]] = ("logits", "mask")

    def truth(self, batch: Mapping[str, Any]) -> Answer:
        return {"mask": batch["mask"]}

    def prediction(self, answer: Answer) -> dict[str, Any]:
        logits = answer["logits"].detach()
        return {"probability": logits.sigmoid(), "logits": logits}
