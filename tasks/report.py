"""All runs on one page: scores against cost, curves and cases."""

import csv
import html
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

from common.errors import UserError
from common.files import write_text_atomic
from common.markup import html_page, html_picture, html_table, markdown_table, plot_label
from common.runs import (
    NATIVE,
    class_sensitivities,
    find_runs,
    load_config,
    main_score,
    mask_gmac,
    name_runs,
)
from common.text import printable, say, skip
from lightning_modules.callbacks.pictures import CASES
from tasks.report_methods import (
    METHOD_HEADER,
    Column,
    Method,
    Timings,
    dataset_name,
    group_runs,
    method_row,
    sampler_words,
)
from tasks.statistics import read_images

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["run"]

Run = tuple[Path, dict[str, Any]]

# Without these a run has no row.
_NEEDED = (
    *("experiment", "network.name", "network.params", "network.gmac"),
    *("data.name", "data.image_size", "data.n_test"),
)

HEADER = (
    "experiment",
    "run",
    "data",
    "px",
    "objective",
    "parameters",
    "GMAC a call",
    "sampler",
    "calls an image",
    "GMAC an image",
)


@dataclass(frozen=True)
class Kind:
    """How runs of one kind are reported.

    Attributes:
        scores: by which they are compared, without `test/`: the first one that all have. The last
            one is also that of the validation.
        title: of their part of the page.
        columns: scores in the table: heading, name without `test/`, digits.
        pictures: files of a run folder by what they show.
        caption: of these.
    """

    scores: tuple[str, ...]
    title: str
    columns: tuple[Column, ...]
    pictures: dict[str, str]
    caption: str


MASKS = Kind(
    (f"{NATIVE}dice", "dice"),
    "Masks",
    (
        ("native Dice", "native_dice", 4),
        ("native IoU", "native_iou", 4),
        ("native threshold Jaccard", "native_threshold_jaccard", 4),
        ("native HD95 px", "native_hd95", 2),
        ("native boundary F1", "native_boundary_f1", 4),
        ("Dice", "dice", 4),
        ("IoU", "iou", 4),
        ("threshold Jaccard", "threshold_jaccard", 4),
        ("HD95 px", "hd95", 2),
        ("boundary F1", "boundary_f1", 4),
    ),
    {case: f"samples/{case}.png" for case in CASES},
    "image, truth, probability, outlines",
)
DIAGNOSES = Kind(
    ("balanced_accuracy",),
    "Diagnoses",
    (
        ("balanced accuracy", "balanced_accuracy", 4),
        ("accuracy", "accuracy", 4),
        ("top-2", "top2_accuracy", 4),
        ("AUC", "auc", 4),
        ("average precision", "average_precision", 4),
        ("F1", "f1", 4),
        ("calibration error", "calibration_error", 4),
    ),
    {name: f"figures/{name}.png" for name in ("confusion_matrix", "roc", "reliability")},
    "confusion matrix, ROC, reliability",
)


MEANS = (
    "Scores of the test images, with 95 % intervals. Native ones are at the size of the original "
    "masks, the others at that of the network's images."
)


def run(config: dict[str, Any]) -> None:
    """Put every tested run under `paths.runs` on one page.

    Writes `report.md` and the self-contained `report.html` to the run folder, with a part for runs
    that predict masks and one for those that diagnose: a table with 95 % intervals, before it one
    of methods where runs differ in nothing but their seed, the main score against multiply-adds,
    training curves, and the best, median and worst images of each run or its figures. Seconds a
    mask are those that `task=benchmark` has measured under `paths.runs`. Columns in which no run
    has anything are left out. Runs with damaged files are left out too, and named on the terminal.

    Raises:
        UserError: there is no tested run, or none but those of debugging.
    """
    folder = Path(config["paths"]["runs"])
    tested = list(_tested(folder))
    runs = [r for r in tested if config["debug_runs"] or not r[1].get("debug")]
    if tested and not runs:
        raise UserError(
            f"{folder} has no tested run but {len(tested)} of debugging; set debug_runs=true to "
            "report them."
        )
    if not runs:
        raise UserError(
            f"{folder} has no run with a test; train one, or set paths.runs to the folder of yours."
        )
    output = Path(config["paths"]["run"])
    title = f"{len(runs)} runs"
    timings = Timings(folder)
    text, parts = [f"# {title}\n\n{MEANS}\n"], [f"<p>{MEANS}</p>"]
    for kind in (MASKS, DIAGNOSES):
        chosen = [run for run in runs if main_score(run[1])[0] in kind.scores]
        if not chosen:
            continue
        found = {
            name: None for _, results in chosen for name in class_sensitivities(results["test"])
        }
        extra = ((f"{n.removesuffix('_sensitivity')} found", n, 4) for n in found)
        kind = replace(kind, columns=(*kind.columns, *extra))
        column = _shared_column(kind, chosen)
        chosen.sort(key=lambda run: -(_value(run, column[1]) or main_score(run[1])[1] or 0.0))
        scores = [heading for heading, *_ in kind.columns]
        methods = group_runs(chosen)
        text.append(f"## {kind.title}\n")
        parts.append(f"<h2>{kind.title}</h2>")
        if len(methods) < len(chosen):
            header = (*METHOD_HEADER, *scores, f"{column[0]}, deviation of runs")
            rows = [method_row(method, kind.columns, column, timings) for method in methods]
            _add_table(text, parts, "Methods, the runs of each together", header, rows)
            machines = "; ".join(sorted(timings.machines(methods)))
            if machines:
                text.append(f"Seconds a mask were measured on {machines}.\n")
                parts.append(f"<p>Seconds a mask were measured on {html.escape(machines)}.</p>")
        header = (*HEADER, *scores, "s an image")
        rows = [_row(kind, path, results) for path, results in chosen]
        _add_table(text, parts, "Runs", header, rows)
        parts += [
            f"<h3>{column[0][0].upper()}{column[0][1:]} against cost</h3>",
            html_picture(_cost_plot(column, methods), "png"),
            *_curves(kind, chosen),
            *_gallery(kind, chosen),
        ]
    write_text_atomic(output / "report.md", "\n".join(text))
    write_text_atomic(output / "report.html", html_page(title, *parts))
    say(f"report of {title}: {output / 'report.html'}")


def _add_table(
    text: list[str], parts: list[str], title: str, header: Sequence[str], rows: list[list[str]]
) -> None:
    """Add a table as Markdown and as HTML, without the columns in which no row has anything."""
    said = [any(row[place] not in ("", "none") for row in rows) for place in range(len(header))]
    header, *rows = (list(itertools.compress(cells, said)) for cells in (header, *rows))
    text.append(f"### {title}\n\n{markdown_table(header, rows)}")
    parts += [f"<h3>{title}</h3>", html_table(header, rows)]


def _value(run: Run, score: str) -> float | None:
    return run[1]["test"].get(f"test/{score}")


def _shared_column(kind: Kind, runs: Sequence[Run]) -> Column:
    """Return the column of the score by which some runs are compared.

    It is the first of `kind.scores` that all of them have, otherwise the one that most have.
    """
    known = {name: sum(_value(run, name) is not None for run in runs) for name in kind.scores}
    score = max(kind.scores, key=known.get)
    return next(column for column in kind.columns if column[1] == score)


def _tested(folder: Path) -> Iterator[Run]:
    if not folder.is_dir():
        return
    for experiment in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path, results in find_runs(experiment, _NEEDED):
            if results.get("test") and _is_whole(path):
                yield path, results


def _is_whole(path: Path) -> bool:
    """Tell whether the other files of a run can be read, those that it has."""
    readers = {"config.yaml": load_config, "metrics.csv": _metrics, "test_images.csv": read_images}
    try:
        for name, read in readers.items():
            if (path / name).is_file():
                read(path)
    except UserError as error:
        skip(str(error))
        return False
    return True


def _row(kind: Kind, path: Path, results: dict[str, Any]) -> list[str]:
    test, intervals = results["test"], results.get("test_intervals") or {}
    network, data = results["network"], results["data"]
    calls = results.get("calls_per_mask")

    def score(key: str, digits: int) -> str:
        value, interval = test.get(f"test/{key}"), intervals.get(f"test/{key}")
        if value is None:
            return ""
        low_high = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
        return f"{value:.{digits}f}{low_high}"

    seconds = (results.get("test_seconds") or 0) / max(
        1, results.get("tested_images") or data["n_test"]
    )
    return [
        results.get("trained_as") or results["experiment"],
        printable(path.name),
        dataset_name(results),
        str(data["image_size"]),
        results.get("objective") or "",
        f"{network['params']:,}",
        f"{network['gmac']:.3f}",
        sampler_words(results),
        "" if calls is None else str(calls),
        "" if calls is None else f"{mask_gmac(results):.2f}",
        *(score(key, digits) for _, key, digits in kind.columns),
        f"{seconds:.3f}",
    ]


def _cost_plot(column: Column, methods: Sequence[Method]) -> bytes:
    """Draw a point for each method, a colour for each experiment, objective and dataset."""
    groups: dict[str, list[tuple[float, float, float, float]]] = {}
    several = len({method.data for method in methods}) > 1
    for method in methods:
        value, interval, _ = method.score(column[1])
        if value is None:
            continue
        low, high = interval or (value, value)
        words = (method.name, method.objective, f"on {method.data}" if several else "")
        point = (mask_gmac(method.results), value, max(0, value - low), max(0, high - value))
        groups.setdefault(" ".join(filter(None, words)), []).append(point)
    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    for name, points in groups.items():
        cost, values, *error = zip(*points, strict=True)
        axis.errorbar(cost, values, yerr=error, fmt="o", capsize=3, label=plot_label(name))
    axis.set(xscale="log", xlabel="GMAC an image", ylabel=column[0])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(figure)


def _curves(kind: Kind, runs: Sequence[Run]) -> Iterable[str]:
    keys = ("train/loss", "val/loss", f"val/{kind.scores[-1]}")
    drawn = [(name, _metrics(path)) for name, (path, _) in zip(name_runs(runs), runs, strict=True)]
    figure, axes = plt.subplots(1, len(keys), figsize=(15, 4), layout="constrained")
    found = False
    for axis, key in zip(axes, keys, strict=True):
        for name, rows in drawn:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                found = True
                axis.plot(*zip(*points, strict=True), label=plot_label(name), linewidth=1)
        axis.set(xlabel="step", title=key)
        axis.grid(alpha=0.3)
        if "loss" in key:
            axis.set_yscale("log")
    axes[-1].legend(fontsize=7) if found else None
    picture = _png(figure)
    return ["<h3>Training</h3>", html_picture(picture, "png")] if found else []


def _metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a run's `metrics.csv`, without empty cells; none where there is no file.

    Raises:
        UserError: it is damaged.
    """
    file = path / "metrics.csv"
    if not file.is_file():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            table = csv.DictReader(opened)
            rows = [{k: float(v) for k, v in row.items() if v} for row in table]
        if "step" not in (table.fieldnames or ()) or any("step" not in row for row in rows):
            raise KeyError("step")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}); remove it to report the run without its "
            "curves."
        ) from error
    return rows


def _gallery(kind: Kind, runs: Sequence[Run]) -> Iterable[str]:
    for name, (path, _) in zip(name_runs(runs), runs, strict=True):
        pictures = [(what, path / file) for what, file in kind.pictures.items()]
        present = [(what, file) for what, file in pictures if file.is_file()]
        if present:
            yield f"<h4>{html.escape(name)}: {kind.caption}</h4>"
            for what, file in present:
                yield html_picture(file.read_bytes(), "png", what.replace("_", " "))


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()
