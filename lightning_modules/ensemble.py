"""Several trained modules that predict together, such as the folds of a cross-validation."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

# Not a method: it learns nothing.
__all__: list[str] = []


class Ensemble(L.LightningModule):
    """Predicts the mean over the probabilities of its members.

    Args:
        members: trained modules of one kind, with `predict`; at least one.

    Attributes:
        classes: names of the classes of classifiers, none of other members.
    """

    def __init__(self, members: Sequence[L.LightningModule]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.classes: tuple[str, ...] = tuple(getattr(members[0], "classes", None) or ())

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self.predict(batch)

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Predict a batch with every member.

        Args:
            batch: what the members need.

        Returns:
            `probability`, float32 as the members' own; of masks also `uncertainty`, the standard
            deviation over the members. Where members sample several masks each, their variance is
            added to that between the members (the law of total variance), so that it is the
            deviation over all samples.
        """
        results = [member.predict(batch) for member in self.members]
        probabilities = torch.stack([result["probability"].float() for result in results])
        mean = probabilities.mean(0)
        if self.classes:
            return {"probability": mean}
        variance = probabilities.var(0, correction=0)
        for result in results:
            if "uncertainty" in result:
                variance = variance + result["uncertainty"].float().square() / len(results)
        return {"probability": mean, "uncertainty": variance.sqrt()}
