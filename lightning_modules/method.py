"""What every method shares: a network, weighted loss terms, an optimizer and what is logged."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from lightning_modules.losses import WeightedSum
from lightning_modules.metrics import LossMeans
from lightning_modules.optimizers import build_optimizer

# Not the base class: what is listed here can be chosen as a method.
__all__: list[str] = []


class Method(L.LightningModule):
    """A network that learns from weighted loss terms, and what is logged of it.

    Args:
        network: what is trained.
        losses: term name to `{weight, **options}`, see `WeightedSum`.
        optimizer: `{name, lr, **arguments}`, see `build_optimizer`.
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
    ) -> None:
        super().__init__()
        self.network = network
        self.losses = WeightedSum(losses, self.loss_functions, self.loss_inputs)
        self.optimizer_settings = dict(optimizer)
        self.choose_scored_terms(self.losses, self.losses.without(*self.teacher_inputs))

    def choose_scored_terms(self, validation: WeightedSum, test: WeightedSum | None) -> None:
        """Set the terms of `val/loss`, and those of `test/loss`, of which there may be none."""
        self.val_terms, self.test_terms = validation, test
        self.val_losses, self.test_losses = (
            LossMeans(["loss", *(terms.weights if terms else ())]) for terms in (validation, test)
        )

    @property
    def calls_per_mask(self) -> int:
        """Network calls that one prediction costs."""
        return 1

    def network_calls(self, num_val: int, num_test: int) -> tuple[int, int]:
        """Return how many single-image network calls one validation and the test make."""
        return num_val, num_test

    @abstractmethod
    def predict(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return `probability`, and `uncertainty` of the same shape where there is one."""

    @abstractmethod
    def score_validation(self, result: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Add the predictions of a batch to the scores of a validation."""

    @abstractmethod
    def score_test(
        self, result: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Add a batch to the scores of a test; return what is said of each image by name."""

    @abstractmethod
    def compute_validation_scores(self) -> dict[str, Tensor]:
        """Return the scores of the validation that has ended, by name, and forget them."""

    @abstractmethod
    def compute_test_scores(self) -> dict[str, Tensor]:
        """Return the scores of the test that has ended, by name, and forget them."""

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Return what the optimizer changes."""
        return self.network.parameters()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.trained_parameters(), self.optimizer_settings)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.trainer.precision == "bf16-mixed":
            # The Trainer refuses a fused optimizer in mixed precision, since it unscales gradients
            # itself; with bfloat16 none are scaled.
            kind = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            plugin = self.trainer.precision_plugin
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, kind)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.predict(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_losses("val", self.val_losses)
        scores = self.compute_validation_scores()
        self.log_dict({f"val/{k}": v for k, v in scores.items()}, prog_bar=True)

    def on_test_epoch_end(self) -> None:
        if self.test_terms is not None:
            self._log_losses("test", self.test_losses)
        scores = self.compute_test_scores()
        self.log_dict({f"test/{k}": v for k, v in scores.items()})

    def log_training(self, loss: Tensor, terms: Mapping[str, Tensor], size: int) -> None:
        """Log the loss of a training step on `size` images, and its terms."""
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train/loss/{k}": v for k, v in terms.items()}, batch_size=size)

    def _log_losses(self, part: str, means: LossMeans) -> None:
        total, *terms = means.compute().items()
        means.reset()
        self.log(f"{part}/loss", total[1])
        self.log_dict({f"{part}/loss/{name}": value for name, value in terms})
