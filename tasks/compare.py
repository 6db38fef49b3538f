"""Compare runs image by image."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from common.files import atomic_path, write_text_atomic
from common.markup import plot_label
from common.runs import NATIVE, find_runs, load_results, name_runs, read_results
from common.text import plain_text, say, skip
from tasks.cases import draw_cases
from tasks.statistics import (
    Predictions,
    compare_predictions,
    compare_scores,
    join_predictions,
    mean_images,
    read_images,
    read_predictions,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["run"]

console = Console(highlight=False)
# Without it a tested run is damaged.
_NEEDED = ("data.name",)
# Distances: the higher, the worse.
_DISTANCES = tuple(prefix + name for prefix in (NATIVE, "") for name in ("hd95", "assd"))


def run(config: dict[str, Any]) -> None:
    """Compare the first of `runs` with each of the others, on the test images that both have.

    Each is the folder of a run, or that of an experiment: its tested runs then count as one, which
    has the mean of their scores of each image. Folds of a cross-validation each bring their images.

    Prints a table of paired differences, those at the size of the original masks first, and writes
    `comparison.json` and `comparison.png` (one image a point) to the run folder. With `pictures`
    there is also a `worst.png` for each of the others: that many images of its lowest score, with
    the outlines of the first and its own. Runs that cannot be read are left out, and named on the
    terminal.

    Raises:
        UserError: fewer than two runs, or fewer that can be read, or runs that share no image.
    """
    folders = [Path(folder) for folder in config["runs"] or ()]
    if len(folders) < 2:
        raise UserError(
            "task=compare needs runs=[<folder>,<folder>], such as "
            "runs=[runs/student_isic2018/<time>,runs/efkd_isic2018/<time>]."
        )
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"runs: {folder} does not exist; give folders of runs.")
    folders, members = _readable(folders)
    names = name_runs([(runs[0], read_results(runs[0]) or {}) for runs in members])
    diagnoses = [(runs[0] / "predictions.csv").is_file() for runs in members]
    if any(diagnoses) != all(diagnoses):
        raise UserError(
            "runs has some that predict masks and some that diagnose; compare runs of one kind."
        )
    report = []
    if all(diagnoses):
        predicted = [_predictions(*pair) for pair in zip(folders, members, strict=True)]
        images = [run.of_truth() for run in predicted]
        compared = [
            compare_predictions(predicted[0], other, config["metrics"]) for other in predicted[1:]
        ]
    else:
        images = [
            mean_images([read_images(run) for run in runs], pooled=any(map(_is_fold, runs)))
            for runs in members
        ]
        compared = [compare_scores(images[0], other) for other in images[1:]]
    first = next(iter(images[0].values()), {})
    score = config["score"] or _default_score(images)
    for folder, name, scores, other in zip(
        folders[1:], names[1:], compared, images[1:], strict=True
    ):
        shared = [column for column in first if column in next(iter(other.values()), {})]
        if score not in shared:
            raise UserError(f"score={score} is not in these runs; choose from {', '.join(shared)}.")
        _print(names[0], name, scores, "bootstrap" if all(diagnoses) else "Wilcoxon")
        report.append({"runs": [str(folders[0]), str(folder)], "scores": scores})
    output = Path(config["paths"]["run"])
    if config["pictures"] and not all(diagnoses):
        for number, own in enumerate(images[1:], 1):
            sign = -1 if score.startswith(_DISTANCES) else 1
            pair = [members[0][0], members[number][0]]
            # Of a cross-validation the first run has tested only its fold.
            ids = images[0].keys() & own.keys()
            ids = ids.intersection(*(read_images(run) for run in pair))
            worst = sorted(ids, key=lambda image: (sign * own[image][score], image))
            worst = worst[: config["pictures"]]
            suffix = f"_{number}" if len(names) > 2 else ""
            draw_cases(pair, worst, output / f"worst{suffix}.png")
            _print_cases([names[0], names[number]], [images[0], own], worst, score)
    write_text_atomic(output / "comparison.json", json.dumps(report, indent=2) + "\n")
    with atomic_path(output / "comparison.png") as path:
        _plot(names, images, score, path)
    say(f"comparison: {output / 'comparison.png'}")


def _default_score(images: list[dict[str, dict[str, float]]]) -> str:
    """Return the Dice at the size of the original masks where all runs have it."""
    columns = [next(iter(run.values()), {}) for run in images]
    for name in (f"{NATIVE}dice", "dice"):
        if all(name in own for own in columns):
            return name
    return next(iter(columns[0]), "")


def _readable(folders: list[Path]) -> tuple[list[Path], list[list[Path]]]:
    """Return the folders that can be compared and the runs of each, and name the others.

    Raises:
        UserError: why one cannot be compared, where fewer than two can.
    """
    members: dict[int, list[Path]] = {}
    refused = []
    for place, folder in enumerate(folders):
        try:
            members[place] = _members(folder)
        except UserError as error:
            refused.append(error)
    if len(members) < 2:
        raise refused[0]
    for error in refused:
        skip(str(error))
    return [folders[place] for place in members], list(members.values())


def _members(folder: Path) -> list[Path]:
    """Return a run folder, or the tested runs in the folder of an experiment, oldest first."""
    if (folder / "results.json").is_file():
        load_results(folder, _NEEDED)
    if (folder / "results.json").is_file() or not any(folder.iterdir()):
        _read(folder)
        return [folder]
    tested = [run for run, results in find_runs(folder, _NEEDED) if results.get("test")]
    runs = []
    for run in tested:
        try:
            _read(run)
            runs.append(run)
        except UserError as error:
            skip(str(error))
    if not runs:
        raise UserError(f"runs: {folder} has no tested run; give folders of runs or experiments.")
    return runs[::-1]


def _read(run: Path) -> None:
    """Refuse a run whose scores cannot be read."""
    if (run / "predictions.csv").is_file():
        read_predictions(run)
    else:
        read_images(run)


def _predictions(folder: Path, runs: list[Path]) -> Predictions:
    """Return the diagnoses of a run, or of all folds of a cross-validation."""
    predicted = join_predictions([read_predictions(run) for run in runs])
    if len(set(predicted.ids)) < len(predicted.ids):
        raise UserError(
            f"runs: {folder} has {len(runs)} runs that diagnose, and only masks are averaged; give "
            "the folder of one of them."
        )
    return predicted


def _is_fold(run: Path) -> bool:
    """Tell whether a run tested one fold of a cross-validation."""
    return bool(((read_results(run) or {}).get("data") or {}).get("folds"))


def _print_cases(
    names: list[str], images: list[dict[str, dict[str, float]]], worst: list[str], score: str
) -> None:
    title = plain_text(f"{score} of the worst of {names[1]}")
    table = Table("image", title=title)
    for name in names:
        table.add_column(plain_text(name))
    for image in worst:
        table.add_row(plain_text(image), *(f"{run[image][score]:.4f}" for run in images))
    console.print(table)


def _print(first: str, second: str, compared: dict[str, dict[str, Any]], test: str) -> None:
    images = next(iter(compared.values()))["images"]
    title = f"{second} (second) against {first} (first), {images} images"
    table = Table(title=plain_text(title))
    table.add_column("score", overflow="fold")
    for column in ("first", "second", "difference", "95 % interval", f"{test} p"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in compared.items():
        if "/" in name:
            continue  # Those of single classes are in the file.
        low, high = row["interval"]
        table.add_row(
            plain_text(name),
            f"{row['first']:.4f}",
            f"{row['second']:.4f}",
            f"{row['difference']:+.4f}",
            f"{low:+.4f} {high:+.4f}",
            f"{row['p']:.2g}",
            style=None if low <= 0 <= high else "bold",
        )
    console.print(table)


def _plot(
    names: list[str], images: list[dict[str, dict[str, float]]], score: str, path: Path
) -> None:
    others = images[1:]
    figure, axes = plt.subplots(
        1, len(others), figsize=(5 * len(others), 5), squeeze=False, layout="constrained"
    )
    for axis, name, second in zip(axes[0], names[1:], others, strict=True):
        ids = sorted(images[0].keys() & second.keys())
        x, y = ([run[i][score] for i in ids] for run in (images[0], second))
        low, high = min(*x, *y), max(*x, *y)
        axis.plot([low, high], [low, high], color="0.6", linewidth=1)
        axis.scatter(x, y, s=12, alpha=0.5)
        axis.set(
            xlabel=plot_label(names[0]),
            ylabel=plot_label(name),
            title=f"{score.replace('_', ' ')} of {len(ids)} images",
        )
        axis.set_aspect("equal")
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)
