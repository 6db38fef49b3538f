"""Plain diagnosis: the class of a photograph in one pass of a network."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_modules.losses import WeightedSum, cross_entropy_loss
from lightning_modules.metrics import ClassificationScores
from lightning_modules.one_pass import Answer, OnePass

__all__ = ["Classification"]

VALIDATION_SCORES = ("balanced_accuracy", "accuracy", "top2_accuracy")


class Classification(OnePass):
    """Learns the class of a photograph.

    `network(image)` returns logits `(B, C)`, one that has `metadata_inputs`
    `network(image, metadata)`. The `probability` of `predict` is their softmax, float32 `(B, C)`.
    `val/loss` and `test/loss` are the weighted cross-entropy, whatever is trained.

    Args:
        network: what is trained.
        losses: term name to `{weight, **options}`, see `WeightedSum`.
        optimizer: `{name, lr, **arguments}`, see `build_optimizer`.
        classes: names in the order of the labels.
        weighted: whether a class weighs in the cross-entropy as much as it is rare, by the
            datamodule's `class_weights`.
        metrics: arguments of `ClassificationScores`, by which it is tested.
    """

    kind: ClassVar[str] = "classification"
    loss_functions: ClassVar = {"cross_entropy": cross_entropy_loss}
    loss_inputs: ClassVar[tuple[str, ...]] = ("logits", "label", "class_weights")

    def __init__(
        self,
        network: nn.Module,
        losses: Mapping[str, Mapping[str, Any]],
        optimizer: Mapping[str, Any],
        classes: Sequence[str],
        weighted: bool = True,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(network, losses, optimizer)
        self.classes = tuple(classes)
        self.weighted = weighted
        # Kept in checkpoints, so that a test has the weights of the training.
        self.register_buffer("class_weights", torch.ones(len(self.classes)))
        self.val_scores, self.test_scores = (
            ClassificationScores(self.classes, **(metrics or {})) for _ in range(2)
        )
        plain = {"cross_entropy": cross_entropy_loss}
        scored = WeightedSum(
            {"cross_entropy": {"weight": 1}}, plain, ("logits", "label", "class_weights")
        )
        self.choose_scored_terms(scored, scored)

    @property
    def wants_views(self) -> bool:
        """Whether it learns from the four rotations of an image."""
        return False

    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.weighted and datamodule is not None:
            self.class_weights.copy_(torch.tensor(datamodule.class_weights))

    def truth(self, batch: Mapping[str, Any]) -> Answer:
        return {"label": batch["label"], "class_weights": self.class_weights.float()}

    def respond(self, batch: Mapping[str, Any], losses: WeightedSum | None) -> Answer:
        if getattr(self.network, "metadata_inputs", 0):
            return {"logits": self.network(batch["image"], batch["metadata"]).float()}
        return super().respond(batch, losses)

    def prediction(self, answer: Answer) -> dict[str, Any]:
        logits = answer["logits"].detach()
        return {"probability": logits.softmax(1), "logits": logits}

    def score_validation(self, result: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        self.val_scores.update(result["probability"], batch["label"])

    def score_test(
        self, result: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        return self.test_scores.update(result["probability"], batch["label"])

    def compute_validation_scores(self) -> dict[str, Tensor]:
        scores = self.val_scores.compute()
        return {name: scores[name] for name in VALIDATION_SCORES}

    def compute_test_scores(self) -> dict[str, Tensor]:
        return self.test_scores.compute()
