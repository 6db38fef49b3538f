"""Metrics that stay exact where a module has half precision."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric

__all__ = ["ExactMetric"]


class ExactMetric(Metric):
    """A metric whose states move with its module to a device, and never to another precision.

    Sums and counts over images would be worthless in bfloat16, which has eight bits.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)
