"""Look at every file of a dataset before a training does."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common.errors import UserError, check_number
from common.files import write_text_atomic
from common.markup import html_page, html_picture, html_table
from common.text import plain_text, printable, say
from datamodules.inspection import Inspection, inspect_samples, near_duplicates, same_files
from datamodules.problems import Problem
from datamodules.splits import PARTS, leaks, spread, write_split
from tasks.build import build_datamodule

__all__ = ["run"]

console = Console(highlight=False)


def run(config: dict[str, Any]) -> None:
    """Check the files of `datamodule` and write what was found to the run folder.

    `report.json` has every problem and remark, `report.html` shows samples with their outlines and
    opens in any browser, `splits.csv` is the split, which `datamodule.split_file` accepts.

    Raises:
        UserError: the folders are missing; or, when the report is written, something would stop a
            training or spoil its scores.
    """
    check_number("num_images", config["num_images"], 0, whole=True)
    datamodule = build_datamodule(config["datamodule"])
    folder = Path(config["paths"]["run"])
    listing = datamodule.read_listing()
    samples = sorted(listing.samples, key=lambda sample: sample.id)
    looks = track(inspect_samples(samples), f"Checking {datamodule.name}", len(samples))
    inspections = list(looks)
    parts, problems, remarks = _split(datamodule, samples)
    problems = [*listing.problems, *problems]
    problems += [problem for found in inspections for problem in found.problems]
    if {found.covered for found in inspections} - {None} == {0.0}:
        message = f"All masks in {datamodule.root} are empty; save 0 for skin and 255 for lesion."
        problems.append(Problem("all masks empty", datamodule.root, message))
    if len(inspections) > 1 and {found.covered for found in inspections} - {None} == {1.0}:
        message = f"All masks in {datamodule.root} are full; save 0 for skin and 255 for lesion."
        problems.append(Problem("all masks full", datamodule.root, message))
    # The headers and the pixels of a file may show the same.
    problems = list(dict.fromkeys(problems))
    remarks += dict.fromkeys(remark for found in inspections for remark in found.remarks)
    _add_copies(inspections, parts, problems, remarks)

    report = _report(datamodule, inspections, parts, problems, remarks)
    write_text_atomic(folder / "report.json", json.dumps(report, indent=2) + "\n")
    shown = _shown(inspections, problems + remarks, config["num_images"])
    title = f"{datamodule.name} in {datamodule.root}"
    write_text_atomic(folder / "report.html", _page(title, report, shown, parts))
    if parts:
        write_split(folder / "splits.csv", parts)
    _print(report, folder)
    if problems:
        raise UserError(
            f"{datamodule.root} has {len(problems)} problem(s), first: {problems[0].message} "
            f"{folder / 'report.html'} shows them all."
        )


def _split(
    datamodule: Any, samples: Sequence[Any]
) -> tuple[dict[str, str], list[Problem], list[Problem]]:
    """Return the part of each sample by id, what is wrong with the split, and remarks on it."""
    if not samples:
        return {}, [], []
    allowed = datamodule.allow_leak
    datamodule.allow_leak = True
    try:
        parts = datamodule.divide(samples)
    except UserError as error:
        found = [Problem("split not possible", datamodule.root, str(error))]
        # A few images for a look may well be too few to divide; a table of the user's is meant.
        return ({}, found, []) if datamodule.split_file is not None else ({}, [], found)
    found = {} if allowed else leaks([sample.group for sample in samples], parts)
    problems = [
        Problem(
            "lesion in two parts",
            samples[rows[0]].image,
            f"{', '.join(f'{samples[row].id} ({parts[row]})' for row in rows)} are of one lesion, "
            f"{group}; choose another split, or set datamodule.allow_leak=true to reproduce a "
            "paper that has it.",
        )
        for group, rows in found.items()
    ]
    return dict(zip([sample.id for sample in samples], parts, strict=True)), problems, []


def _add_copies(
    inspections: Sequence[Inspection],
    parts: dict[str, str],
    problems: list[Problem],
    remarks: list[Problem],
) -> None:
    """Add what is there twice: in two parts it is a problem, in one worth a remark."""

    def describe(rows: Sequence[int]) -> tuple[str, bool]:
        samples = [inspections[row].sample for row in rows]
        names = [f"{s.id} ({parts[s.id]})" if parts else s.id for s in samples]
        return " and ".join(names), len({parts.get(s.id) for s in samples}) > 1

    for rows in same_files(inspections):
        names, apart = describe(rows)
        path = inspections[rows[0]].files[0]
        message = f"{names} are the same image file; keep one of them."
        if apart:
            problems.append(Problem("image in two parts", path, message))
        else:
            remarks.append(Problem("image twice", path, message))
    for first, second, similarity in near_duplicates(inspections):
        names, apart = describe((first, second))
        kind = "alike in two parts" if apart else "alike"
        message = f"{names} look alike ({similarity:.3f}); they may show one lesion."
        remarks.append(Problem(kind, inspections[first].files[0], message))


def _report(
    datamodule: Any,
    inspections: Sequence[Inspection],
    parts: dict[str, str],
    problems: Sequence[Problem],
    remarks: Sequence[Problem],
) -> dict[str, Any]:
    sizes = [found.size for found in inspections if found.size]
    covered = [found.covered for found in inspections if found.covered is not None]
    counts = Counter(parts.values())

    def entries(found: Sequence[Problem]) -> list[dict[str, str]]:
        return [
            {"kind": p.kind, "path": printable(str(p.path)), "message": p.message} for p in found
        ]

    return {
        "dataset": datamodule.name,
        "root": str(datamodule.root),
        "samples": len(inspections),
        "parts": {part: counts[part] for part in PARTS if parts},
        "smallest": min(sizes, key=lambda s: s[0] * s[1], default=None),
        "largest": max(sizes, key=lambda s: s[0] * s[1], default=None),
        "mean_covered": round(float(np.mean(covered)), 4) if covered else None,
        "problems": entries(problems),
        "remarks": entries(remarks),
    }


def _print(report: dict[str, Any], folder: Path) -> None:
    # What is made up has no folder.
    place = "" if report["root"] == "." else f" in {report['root']}"
    table = Table(title=plain_text(f"{report['dataset']}: {report['samples']} samples{place}"))
    table.add_column("")
    table.add_column("number", justify="right")
    table.add_column("first", overflow="fold")
    for part, count in report["parts"].items():
        table.add_row(part, str(count), "")
    for what, style in (("problems", "red"), ("remarks", "yellow")):
        table.add_section()
        kinds = Counter(entry["kind"] for entry in report[what])
        for kind, count in kinds.most_common():
            first = next(entry["message"] for entry in report[what] if entry["kind"] == kind)
            table.add_row(kind, str(count), plain_text(first), style=style)
    console.print(table)
    say(f"report: {folder / 'report.html'}")


def _shown(
    inspections: Sequence[Inspection], problems: Sequence[Problem], count: int
) -> list[Inspection]:
    """Return the samples of the contact sheet: those that something is said of, then others."""
    named = {problem.path for problem in problems}
    drawn = [found for found in inspections if found.thumbnail is not None]
    remarkable = [not named.isdisjoint(f.files) for f in drawn]
    first = [f for f, marked in zip(drawn, remarkable, strict=True) if marked][:count]
    rest = [f for f, marked in zip(drawn, remarkable, strict=True) if not marked]
    return first + [rest[row] for row in spread(len(rest), count - len(first))]


def _page(
    title: str, report: dict[str, Any], shown: Sequence[Inspection], parts: dict[str, str]
) -> str:
    entries = [(what, entry) for what in ("problem", "remark") for entry in report[f"{what}s"]]
    table = html_table(
        ("kind", "what"),
        [(entry["kind"], entry["message"]) for _, entry in entries],
        [what for what, _ in entries],
    )
    pictures = [
        html_picture(
            found.thumbnail, "jpeg", f"{found.sample.id}\n{parts.get(found.sample.id, '')}"
        )
        for found in shown
    ]
    sizes = ", ".join(f"{part} {count}" for part, count in report["parts"].items())
    summary = (
        f"<p>{report['samples']} samples ({sizes or 'not divided'}), {len(report['problems'])} "
        f"problems, {len(report['remarks'])} remarks. Outlines are those of the masks.</p>"
    )
    return html_page(title, summary, table if entries else "", *pictures)
