"""All runs on one page: scores against cost, curves and cases."""

import csv
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from common.errors import UserError
from common.files import write_text_atomic
from common.markup import html_page, html_picture, html_table, markdown_table
from common.runs import find_runs, name_runs
from lightning_modules.callbacks.pictures import CASES

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["run"]

console = Console(highlight=False)

HEADER = (
    "experiment",
    "run",
    "data",
    "px",
    "objective",
    "parameters",
    "GMAC a call",
    "sampler",
    "calls a mask",
    "GMAC a mask",
    "Dice",
    "IoU",
    "HD95 px",
    "boundary F1",
    "s a mask",
)
CURVES = ("train/loss", "val/loss", "val/dice")


def run(config: dict[str, Any]) -> None:
    """Put every tested run under `paths.runs` on one page.

    Writes `report.md` and the self-contained `report.html` to the run folder: a table with 95 %
    intervals, Dice against multiply-adds, training curves, and the best, median and worst images
    of each run.

    Raises:
        UserError: there is no tested run.
    """
    folder = Path(config["paths"]["runs"])
    runs = [r for r in _tested(folder) if config["debug_runs"] or not r[1].get("debug")]
    if not runs:
        raise UserError(
            f"{folder} has no run with a test; train one, or set paths.runs to the folder of yours."
        )
    runs.sort(key=lambda run: -run[1]["test"].get("test/dice", 0.0))
    rows = [_row(path, results) for path, results in runs]
    output = Path(config["paths"]["run"])
    title = f"{len(runs)} runs"
    text = f"# {title}\n\nMeans over test images, with 95 % intervals.\n\n"
    write_text_atomic(output / "report.md", text + markdown_table(HEADER, rows))
    parts = [
        "<p>Means over test images, with 95 % intervals.</p>",
        html_table(HEADER, rows),
        "<h2>Dice against cost</h2>",
        html_picture(_cost_plot(runs), "png"),
        *_curves(runs),
        *_gallery(runs),
    ]
    write_text_atomic(output / "report.html", html_page(title, *parts))
    console.print(f"report of {title}: {output / 'report.html'}")


def _tested(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    if not folder.is_dir():
        return
    for experiment in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path, results in find_runs(experiment):
            if results.get("test"):
                yield path, results


def _row(path: Path, results: dict[str, Any]) -> list[str]:
    test, intervals = results["test"], results.get("test_intervals") or {}
    network, data = results["network"], results["data"]
    calls = results.get("calls_per_mask")

    def score(key: str, digits: int) -> str:
        value, interval = test.get(f"test/{key}"), intervals.get(f"test/{key}")
        if value is None:
            return ""
        low_high = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
        return f"{value:.{digits}f}{low_high}"

    sampler = results.get("sampler") or {}
    seconds = (results.get("test_seconds") or 0) / max(
        1, results.get("tested_images") or data["n_test"]
    )
    return [
        results.get("trained_as") or results["experiment"],
        path.name,
        data["name"],
        str(data["image_size"]),
        results.get("objective") or "",
        f"{network['params']:,}",
        f"{network['gmac']:.3f}",
        f"{sampler['num_steps']} {sampler['name']} x {sampler['ensemble']}" if sampler else "none",
        "" if calls is None else str(calls),
        "" if calls is None else f"{network['gmac'] * calls:.2f}",
        score("dice", 4),
        score("iou", 4),
        score("hd95", 2),
        score("boundary_f1", 4),
        f"{seconds:.3f}",
    ]


def _cost_plot(runs: Sequence[tuple[Path, dict[str, Any]]]) -> bytes:
    """Draw a point for each run, a colour for each experiment and objective."""
    groups: dict[str, list[tuple[float, float, float, float]]] = {}
    for _, results in runs:
        dice = results["test"].get("test/dice")
        if dice is None:
            continue
        cost = results["network"]["gmac"] * (results.get("calls_per_mask") or 1)
        low, high = (results.get("test_intervals") or {}).get("test/dice", (dice, dice))
        words = (results.get("trained_as") or results["experiment"], results.get("objective"))
        point = (cost, dice, max(0, dice - low), max(0, high - dice))
        groups.setdefault(" ".join(filter(None, words)), []).append(point)
    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    for name, points in groups.items():
        cost, dice, *error = zip(*points, strict=True)
        axis.errorbar(cost, dice, yerr=error, fmt="o", capsize=3, label=name)
    axis.set(xscale="log", xlabel="GMAC a mask", ylabel="Dice")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(figure)


def _curves(runs: Sequence[tuple[Path, dict[str, Any]]]) -> Iterable[str]:
    drawn = [(name, _metrics(path)) for name, (path, _) in zip(name_runs(runs), runs, strict=True)]
    figure, axes = plt.subplots(1, len(CURVES), figsize=(15, 4), layout="constrained")
    found = False
    for axis, key in zip(axes, CURVES, strict=True):
        for name, rows in drawn:
            points = [(float(r["step"]), float(r[key])) for r in rows if r.get(key)]
            if points:
                found = True
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set(xlabel="step", title=key)
        axis.grid(alpha=0.3)
        if "loss" in key:
            axis.set_yscale("log")
    axes[-1].legend(fontsize=7) if found else None
    picture = _png(figure)
    return ["<h2>Training</h2>", html_picture(picture, "png")] if found else []


def _metrics(path: Path) -> list[dict[str, str]]:
    try:
        with (path / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def _gallery(runs: Sequence[tuple[Path, dict[str, Any]]]) -> Iterable[str]:
    for name, (path, _) in zip(name_runs(runs), runs, strict=True):
        pictures = [(case, path / "samples" / f"{case}.png") for case in CASES]
        present = [(case, file) for case, file in pictures if file.is_file()]
        if present:
            yield f"<h3>{html.escape(name)}: image, truth, probability, outlines</h3>"
            for case, file in present:
                yield html_picture(file.read_bytes(), "png", case)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()
