"""What a test of a classifier predicted: a table and figures."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from common.files import atomic_path
from common.tables import write_rows
from lightning_modules.callbacks.test_images import TestRows
from lightning_modules.metrics import confusion_matrix, reliability, roc_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Diagnoses"]

DPI = 150


class Diagnoses(TestRows):
    """Writes what a classifier says of each test image, and draws how good that is.

    `predictions.csv` has a row per image: its id, its true and its predicted class, whether they
    are the same (1 or 0), the probability of the predicted class, and that of every class in a
    column of its name. Where these are not finite, `predicted` is empty and `confidence` nan.
    `figures/confusion_matrix.png`, `figures/roc.png` and `figures/reliability.png` are also logged
    to W&B and to TensorBoard. Class names are those of the module's `classes`. Modules that predict
    masks leave nothing.

    Args:
        folder: the run folder.
        bins: of the reliability diagram.
    """

    def __init__(self, folder: str | Path, bins: int = 15) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.bins = bins

    def rows(
        self, pl_module: L.LightningModule, outputs: dict[str, Any], batch: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        probability = (outputs or {}).get("probability")
        if not isinstance(probability, torch.Tensor) or probability.ndim != 2:
            return
        chances = probability.detach().float().cpu().numpy()
        for sample, label, chance in zip(
            batch["id"], batch["label"].tolist(), chances, strict=True
        ):
            yield {"id": sample, "label": label, "chance": chance}

    def write(
        self, trainer: L.Trainer, pl_module: L.LightningModule, rows: list[dict[str, Any]]
    ) -> None:
        classes = list(pl_module.classes)
        label = np.array([row["label"] for row in rows])
        probability = np.stack([row["chance"] for row in rows])
        finite = np.isfinite(probability).all(1)
        predicted = np.where(finite, probability.argmax(1), -1)
        write_rows(
            self.folder / "predictions.csv",
            [
                {
                    "id": row["id"],
                    "label": classes[row["label"]],
                    "predicted": classes[guess] if guess >= 0 else "",
                    "correct": int(guess == row["label"]),
                    # As float32, which is written in as few digits as tell it from its neighbours.
                    "confidence": row["chance"][guess] if guess >= 0 else math.nan,
                    **dict(zip(classes, row["chance"], strict=True)),
                }
                for row, guess in zip(rows, predicted, strict=True)
            ],
        )
        figures = {
            "confusion_matrix": _draw_confusion(predicted, label, classes),
            "roc": _draw_roc(probability, label, classes),
            "reliability": _draw_reliability(probability, label, self.bins),
        }
        for name, figure in figures.items():
            path = self.folder / "figures" / f"{name}.png"
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image(f"test/{name}", [str(path)])
                elif isinstance(logger, TensorBoardLogger):
                    with Image.open(path) as image:
                        picture = np.asarray(image.convert("RGB"))
                    step = trainer.global_step
                    logger.experiment.add_image(f"test/{name}", picture, step, dataformats="HWC")


def _new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches that no window system knows of."""
    from matplotlib.figure import Figure  # Its import is paid only by tests of classifiers.

    return Figure(figsize=(width, height), layout="constrained")


def _draw_confusion(predicted: np.ndarray, label: np.ndarray, classes: Sequence[str]) -> "Figure":
    counts = confusion_matrix(predicted, label, len(classes))
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]
    side = max(4.0, 0.8 * len(classes))
    figure = _new_figure(side + 2.2, side + 1)
    axis: Axes = figure.subplots()
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        share = f"\n{shares[row, column]:.0%}" if totals[row] else ""
        axis.text(
            *(column, row, f"{counts[row, column]}{share}"),
            ha="center",
            va="center",
            fontsize=9,
            color="white" if shares[row, column] > 0.5 else "black",
        )
    ticks = range(len(classes))
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(ticks, classes, **(slanted if max(map(len, classes)) > 5 else {}))
    axis.set_yticks(ticks, [f"{name} ({n})" for name, n in zip(classes, totals, strict=True)])
    axis.set(xlabel="predicted class", ylabel="true class (images)")
    missing = len(label) - counts.sum()
    rest = f"; {missing} without a prediction are left out" if missing else ""
    axis.set_title(f"{counts.trace()} of {len(label)} images are right{rest}")
    bar = figure.colorbar(picture, ax=axis, fraction=0.046, pad=0.02)
    bar.set_label("share of the true class")
    return figure


def _draw_roc(probability: np.ndarray, label: np.ndarray, classes: Sequence[str]) -> "Figure":
    from matplotlib import colormaps

    curves = roc_curves(probability, label)
    figure = _new_figure(8.6, 5.6)
    axis: Axes = figure.subplots()
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20"].colors
    for key, (fpr, tpr, auc) in curves.items():
        if key in ("macro", "micro"):
            style = {"color": "black", "linewidth": 2, "linestyle": "-" if key == "macro" else ":"}
            name = f"{key} average"
        else:
            style = {"color": palette[key % len(palette)], "linewidth": 1.3}
            name = classes[key]
        axis.plot(fpr, tpr, label=f"{name}: {auc:.3f}", **style)
    axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="chance: 0.500")
    axis.set(
        xlabel="false positive rate (1 - specificity)",
        ylabel="true positive rate (sensitivity)",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
    )
    axis.set_title("Each class against the others")
    axis.grid(alpha=0.3)
    axis.legend(title="area under the curve", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _draw_reliability(probability: np.ndarray, label: np.ndarray, bins: int) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    found = reliability(probability, label, bins)
    edges = np.linspace(0, 1, bins + 1)
    figure = _new_figure(5.6, 6.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bars = {"x": edges[:-1], "width": 1 / bins, "align": "edge", "edgecolor": "white"}
    upper.bar(height=np.nan_to_num(found.accuracy), color="tab:blue", label="accuracy", **bars)
    upper.plot(found.confidence, found.accuracy, "o", color="black", label="mean", clip_on=False)
    upper.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    upper.set_title(f"Expected calibration error {found.error:.3f} ({bins} bins)")
    upper.legend(loc="upper left")
    lower.bar(height=found.count, color="tab:grey", **bars)
    lower.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    lower.set(xlabel="confidence (highest probability)", ylabel="images")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure
