"""What a prediction of diagnoses leaves behind: a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tasks.photograph_writer import PhotographWriter

__all__ = ["DiagnosisWriter"]


class DiagnosisWriter(PhotographWriter):
    """Writes the most probable class of each photograph, and the probability of every one.

    Args:
        folder, total, progress: as in `PhotographWriter`.
        classes: names in the order of the probabilities.
    """

    def __init__(
        self, folder: Path, classes: Sequence[str], total: int, progress: bool = True
    ) -> None:
        super().__init__(folder, total, progress)
        self.classes = tuple(classes)
        self.columns = (
            *("file", "name", "height", "width", "predicted", "confidence"),
            *self.classes,
            *("seconds", "error"),
        )

    def describe(
        self, row: dict[str, Any], outputs: dict[str, Tensor], index: int, size: list[int]
    ) -> None:
        chances = outputs["probability"][index].tolist()
        best = max(range(len(chances)), key=chances.__getitem__)
        row |= {name: round(c, 6) for name, c in zip(self.classes, chances, strict=True)}
        row |= {"predicted": self.classes[best], "confidence": round(chances[best], 6)}
