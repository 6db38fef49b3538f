"""What every method that predicts lesion masks shares: how they are scored."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_modules.method import Method
from lightning_modules.metrics import (
    OverlapMetrics,
    SegmentationScores,
    lesion_masks,
    overlap_counts,
)

# Not the base class: what is listed here can be chosen as a method.
__all__: list[str] = []


class MaskModule(Method):
    """A network that learns to outline lesions, and what is logged of it.

    Args:
        network, losses, optimizer: as in `Method`.
        metrics: arguments of `SegmentationScores`, by which it is tested.
    """

    kind: ClassVar[str] = "segmentation"

    def __init__(
        self,
        network: nn.Module,
        losses: Mapping[str, Mapping[str, Any]],
        optimizer: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(network, losses, optimizer)
        self.val_overlap = OverlapMetrics()
        self.test_scores = SegmentationScores(**(metrics or {}))

    @abstractmethod
    def predict(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return `probability` float32 `(B, 1, H, W)`, and `uncertainty` where there is one."""

    def compute_validation_scores(self) -> dict[str, Tensor]:
        scores = self.val_overlap.compute()
        self.val_overlap.reset()
        return {name: scores[name] for name in ("dice", "iou")}

    def compute_test_scores(self) -> dict[str, Tensor]:
        return self.test_scores.compute()

    def score_validation(self, result: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        predicted = lesion_masks(result["probability"], batch["mask"])
        self.val_overlap.update(overlap_counts(predicted, batch["mask"]))

    def score_test(
        self, result: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        return self.test_scores.update(result, batch)
