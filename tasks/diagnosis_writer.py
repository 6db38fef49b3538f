"""What a prediction of diagnoses leaves behind: a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.text import cell
from tasks.photograph_writer import PhotographWriter, Predicted

__all__ = ["DiagnosisWriter"]


class DiagnosisWriter(PhotographWriter):
    """Writes the most probable class of each photograph, and the probability of every one.

    Args:
        folder, settings, names, progress: as in `PhotographWriter`.
        classes: names in the order of the probabilities.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        settings: str,
        names: Sequence[str],
        progress: bool = True,
    ) -> None:
        super().__init__(folder, settings, names, progress)
        self.classes = tuple(classes)
        self.described = ("predicted", "confidence", *map(cell, self.classes))

    def describe(
        self, row: dict[str, Any], outputs: dict[str, Tensor], index: int, photograph: Predicted
    ) -> None:
        chances = outputs["probability"][index].tolist()
        best = max(range(len(chances)), key=chances.__getitem__)
        columns = self.described[2:]
        row |= {name: round(c, 6) for name, c in zip(columns, chances, strict=True)}
        row |= {"predicted": self.classes[best], "confidence": round(chances[best], 6)}
        self.record(row)
