"""The table of a multirun: best first, mean and spread over seeds and folds."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import UserError
from common.files import write_text_atomic
from common.markup import markdown_table
from common.runs import (
    NATIVE,
    class_sensitivities,
    is_class_sensitivity,
    main_scores,
    read_results,
)
from common.tables import write_rows
from common.text import from_cell, plain_text, say, skip
from tasks.configuration import split_override
from tasks.statistics import pooled_scores

__all__ = ["FOLD", "REPEATED", "SEED", "Line", "print_table", "summarise", "write_tables"]

# Beside the score by which jobs are ordered and the main ones of the test, where a run has them; at
# the size of the original masks where it has that.
_SHOWN = ("hd95", "boundary_f1", "auc")
SEED, FOLD = "seed", "datamodule.fold"
# Keys in which the runs of one setting may differ.
REPEATED = (SEED, FOLD)
console = Console(highlight=False)


class Line:
    """The jobs that differ in nothing but their seed and their fold.

    Attributes:
        values: of what the multirun varies, by key.
        scores: of each finished job, in the order of the jobs: name to numbers.
        seconds: of each finished job.
        missing: jobs that have not finished.
        folds: of a cross-validation, the run folders of finished jobs by seed and fold.
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = dict(values)
        self.scores: dict[str, list[float]] = {}
        self.seconds: list[float] = []
        self.missing = 0
        self.folds: dict[str, dict[str, Path]] = {}

    def add(self, results: Mapping[str, Any]) -> None:
        """Add what a finished job left behind."""
        best, test = results.get("best") or {}, results.get("test") or {}
        found = {f"best {best.get('monitor')}": best.get("score")}
        found |= {f"test/{name}": score for name, score in main_scores(results).items()}
        for name in (*_SHOWN, *class_sensitivities(test)):
            native = f"test/{NATIVE}{name}"
            key = native if native in test else f"test/{name}"
            found[key] = test.get(key)
        for key, value in found.items():
            if value is not None:
                self.scores.setdefault(key, []).append(float(value))
        if results.get("seconds") is not None:
            self.seconds.append(results["seconds"])


def summarise(runs: Path, jobs: Sequence[Mapping[str, Any]]) -> tuple[list[Line], bool]:
    """Return a line for each setting of a multirun, best first, and whether less is better.

    The order is that of the scores by which the jobs chose their best checkpoints, on validation
    images: to choose by the test would leave nothing to test on. Where nothing was trained, it is
    that of the test. Settings without a finished job come last.

    Args:
        runs: the folder of all runs.
        jobs: the records of the multirun's jobs.
    """
    settings = [dict(map(split_override, job["overrides"])) for job in jobs]
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    varied = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    lines: dict[tuple[str, ...], Line] = {}
    less = False
    for job, setting in zip(jobs, settings, strict=True):
        values = {key: setting.get(key, "") for key in varied if key not in REPEATED}
        line = lines.setdefault(tuple(values.values()), Line(values))
        results = read_results(runs / job["folder"]) if job["status"] == "finished" else None
        if results is None:
            line.missing += job["status"] != "finished"
            continue
        line.add(results)
        if FOLD in setting:
            folds = line.folds.setdefault(setting.get(SEED, ""), {})
            folds[setting[FOLD]] = runs / job["folder"]
        less = (results.get("best") or {}).get("mode") == "min"

    def rank(line: Line) -> float:
        values = next(iter(line.scores.values()), [])
        mean = statistics.fmean(values) if values else math.nan
        return math.inf if math.isnan(mean) else mean if less else -mean

    return sorted(lines.values(), key=rank), less


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows; spreads are standard deviations over the jobs of a line."""
    names = list(dict.fromkeys(name for line in lines for name in line.scores))
    header = [*lines[0].values, "jobs", *names, "seconds"] if lines else []
    rows = []
    for line in lines:
        count = len(line.seconds)
        jobs = f"{count} of {count + line.missing}" if line.missing else str(count)
        scores = [_cell(line.scores.get(name, []), 4) for name in names]
        rows.append([*map(_shown, line.values.values()), jobs, *scores, _cell(line.seconds, 0)])
    return header, rows


def _pooled_table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the scores over the test images of all folds.

    Settings without tested images are left out, and so are scores of single classes.
    """
    found = [(line, *_pooled(_pools(line))) for line in lines if line.folds]
    pooled = [(line, images, scores) for line, images, scores in found if images]
    names = dict.fromkeys(name for *_, scores in pooled for name in scores if "/" not in name)
    header = [*lines[0].values, "folds", "images", *names] if pooled else []
    rows = []
    for line, images, scores in pooled:
        cells = {
            name: f"{mean:.4f} ({low:.4f} to {high:.4f})"
            for name, (mean, (low, high)) in scores.items()
        }
        count = " + ".join(str(len(folds)) for folds in line.folds.values())
        values = map(_shown, line.values.values())
        rows.append([*values, count, str(images), *(cells.get(name, "") for name in names)])
    return header, rows


# The printed and the written table both need them, and resampling diagnoses takes a while.
@cache
def _pooled(
    repeats: tuple[tuple[Path, ...], ...],
) -> tuple[int, dict[str, tuple[float, list[float]]]]:
    """Return what `pooled_scores` does, nothing where a file of a run is damaged."""
    try:
        return pooled_scores(repeats)
    except UserError as error:
        skip(str(error))
        return 0, {}


def _pools(line: Line) -> tuple[tuple[Path, ...], ...]:
    return tuple(tuple(folds.values()) for folds in line.folds.values())


def _shown(value: str) -> str:
    """Return a number that a sweeper has drawn with as many digits as tell something."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 else value
    except ValueError:
        return value


def print_table(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of a multirun and name the jobs that did not finish.

    Args:
        folder: of the multirun's records.
        jobs: the records.
    """
    lines, less = summarise(folder.parent.parent, jobs)
    order = "lowest" if less else "highest"
    varied = len(lines[0].values) if lines else 0
    title = f"{len(jobs)} jobs, {order} first; mean ± standard deviation"
    _print(title, *_table(lines), varied)
    header, rows = _pooled_table(lines)
    if rows:
        main = ("folds", "images", "dice", "iou", "balanced_accuracy", *_SHOWN)
        kept = [
            n
            for n, name in enumerate(header)
            if n < varied or name.removeprefix(NATIVE) in main or is_class_sensitivity(name)
        ]
        header, *rows = ([cells[n] for n in kept] for cells in (header, *rows))
        _print("Test images of all folds; mean and 95 % interval", header, rows, varied)
    for job in jobs:
        if job["status"] != "finished":
            reason = job["reason"] or job["status"]
            words = f"job {job['num']} {job['status']} ({' '.join(job['overrides'])}): {reason}"
            say(words, style="red")
    say(f"{folder / 'table.md'}; a row per job: {folder / 'jobs.csv'}")


def _print(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], varied: int) -> None:
    """Print a table whose first columns are what the multirun varies."""
    table = Table(title=title)
    for index, name in enumerate(header):
        # Of a key the last two parts, such as efkd.weight, are enough to know it.
        short = ".".join(name.split(".")[-2:]) if index < varied else name
        table.add_column(
            plain_text(short), justify="left" if index < varied else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*map(plain_text, row))
    # Not cut to the width of the terminal: what is cut cannot be read.
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(console.width, needed), soft_wrap=True).print(table)


def write_tables(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Write `table.md`, as printed, and `jobs.csv`, a row per job with all its test scores.

    Of a cross-validation `table.md` also has the scores over the test images of all folds, and
    `cross_validation.csv` the row of every image from the test of its fold.
    """
    runs = folder.parent.parent
    lines, _ = summarise(runs, jobs)
    header, rows = _table(lines)
    text = markdown_table(header, rows)
    header, rows = _pooled_table(lines)
    if rows:
        text += "\nTest images of all folds: mean and 95 % interval.\n\n"
        text += markdown_table(header, rows)
        _write_images(folder / "cross_validation.csv", lines)
    write_text_atomic(folder / "table.md", text)
    table = []
    for job in jobs:
        results = read_results(runs / job["folder"]) or {}
        best, test = results.get("best") or {}, results.get("test") or {}
        told = {key: job[key] for key in ("num", "status", "folder", "seconds", "reason")}
        given = dict(map(split_override, job["overrides"]))
        score = {f"best {best['monitor']}": best.get("score")} if best else {}
        table.append(told | given | score | test)
    if table:
        columns = dict.fromkeys(key for row in table for key in row)
        write_rows(folder / "jobs.csv", [dict.fromkeys(columns, "") | row for row in table])


def _write_images(path: Path, lines: Sequence[Line]) -> None:
    """Write the row of every test image of a cross-validation, with its setting and fold."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        for seed, folds in line.folds.items():
            told = line.values | ({SEED: seed} if seed else {})
            for fold, run in folds.items():
                images = run / "predictions.csv"
                images = images if images.is_file() else run / "test_images.csv"
                try:
                    with images.open(newline="", encoding="utf-8") as file:
                        found = [
                            {key: from_cell(text) for key, text in row.items()}
                            for row in csv.DictReader(file)
                        ]
                except FileNotFoundError:
                    continue
                except (OSError, ValueError, AttributeError, csv.Error) as error:
                    skip(f"{images} is damaged ({type(error).__name__}); test the run again.")
                    continue
                rows += [told | {"fold": fold} | row for row in found]
    if rows:
        columns = dict.fromkeys(key for row in rows for key in row)
        write_rows(path, [dict.fromkeys(columns, "") | row for row in rows])
