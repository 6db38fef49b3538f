"""What every method that predicts lesion masks shares: loss terms, scores and their keys."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_modules.losses import WeightedSum
from lightning_modules.metrics import (
    LossMeans,
    OverlapMetrics,
    SegmentationScores,
    overlap_counts,
)
from lightning_modules.optimizers import build_optimizer

# Not the base class: what is listed here can be chosen as a method.
__all__: list[str] = []


class MaskModule(L.LightningModule):
    """A network that learns to outline lesions, and what is logged of it.

    Args:
        network: what is trained.
        losses: term name to `{weight, **options}`, see `WeightedSum`.
        optimizer: `{name, lr, **arguments}`, see `build_optimizer`.
        metrics: arguments of `SegmentationScores`, by which it is tested.
    """

    # The terms that a method offers, everything that they may ask for, and which of that needs a
    # teacher, who need not be there any more when a student is tested.
    loss_functions: ClassVar[dict[str, Callable[..., Tensor]]]
    loss_inputs: ClassVar[tuple[str, ...]]
    teacher_inputs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        network: nn.Module,
        losses: Mapping[str, Mapping[str, Any]],
        optimizer: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.losses = WeightedSum(losses, self.loss_functions, self.loss_inputs)
        self.test_terms = self.losses.without(*self.teacher_inputs)
        self.optimizer_settings = dict(optimizer)
        self.val_overlap = OverlapMetrics()
        self.test_scores = SegmentationScores(**(metrics or {}))
        self.val_losses = LossMeans(["loss", *self.losses.weights])
        self.test_losses = LossMeans(
            ["loss", *(self.test_terms.weights if self.test_terms else ())]
        )

    @property
    @abstractmethod
    def calls_per_mask(self) -> int:
        """Network calls that one predicted mask costs."""

    @abstractmethod
    def network_calls(self, num_val: int, num_test: int) -> tuple[int, int]:
        """Return how many single-image network calls one validation and the test make."""

    @abstractmethod
    def predict(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return `probability` float32 `(B, 1, H, W)`, and `uncertainty` where there is one."""

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Return what the optimizer changes."""
        return self.network.parameters()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.trained_parameters(), self.optimizer_settings)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.predict(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_losses("val", self.val_losses)
        scores = self.val_overlap.compute()
        self.val_overlap.reset()
        self.log_dict({f"val/{k}": scores[k] for k in ("dice", "iou")}, prog_bar=True)

    def on_test_epoch_end(self) -> None:
        if self.test_terms is not None:
            self._log_losses("test", self.test_losses)
        self.log_dict({f"test/{k}": v for k, v in self.test_scores.compute().items()})

    def log_training(self, loss: Tensor, terms: Mapping[str, Tensor], size: int) -> None:
        """Log the loss of a training step on `size` images, and its terms."""
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train/loss/{k}": v for k, v in terms.items()}, batch_size=size)

    def score_validation(self, result: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Add the predicted masks of a batch to the scores of a validation."""
        self.val_overlap.update(overlap_counts(result["probability"] > 0.5, batch["mask"]))

    def _log_losses(self, part: str, means: LossMeans) -> None:
        total, *terms = means.compute().items()
        means.reset()
        self.log(f"{part}/loss", total[1])
        self.log_dict({f"{part}/loss/{name}": value for name, value in terms})
