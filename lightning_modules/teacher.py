"""A trained module that is only ever asked."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FrozenTeacher"]


class FrozenTeacher:
    """Holds a teacher outside its student: not a submodule, so never among the student's
    parameters, in its optimizer, state dict or moving average.

    Args:
        module: the trained LightningModule; it is frozen and put into evaluation mode, in which
            no statistics of a BatchNorm move and nothing is dropped.

    Attributes:
        objective: what a denoising teacher predicts, none for others.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)
        self.objective: str | None = getattr(module, "objective", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTeacher":
        # Weight averaging deep-copies the student; the teacher must not be copied with it.
        return self

    @property
    def network(self) -> nn.Module:
        """The teacher's network."""
        return self.module.network

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move the module, which no Trainer does for what is not a submodule.

        Args:
            device: of the student.
            dtype: that its network shall have, as the student's under `bf16-true`.
        """
        self.module.to(device)
        self.network.to(dtype=dtype)

    @torch.no_grad()
    def denoise(self, x_t: Tensor, image: Tensor, t: Tensor) -> Tensor:
        """Return the output of a denoising teacher's network, without graph."""
        return self.network(x_t, image, t)

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the teacher predicts for a batch, or what the batch brings of it.

        Args:
            batch: with `teacher_probability` where that was computed once for every image.
        """
        known = batch.get("teacher_probability")
        return self.module.predict(batch) if known is None else {"probability": known}
