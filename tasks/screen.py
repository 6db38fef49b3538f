"""What a run says on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from torch import nn

from common.runs import main_scores, native_first
from common.text import plain_text, printable, say

__all__ = ["print_batch", "print_choices", "print_results", "print_start"]

_SHOWN = (
    "task",
    "seed",
    "datamodule",
    "network",
    "lightning_module",
    "schedule",
    "sampler",
    "teacher",
    "trainer",
    "paths",
)
# Groups that a run without an experiment names.
_CHOSEN = (
    *("datamodule", "augmentation", "network", "lightning_module", "schedule", "sampler"),
    *("teacher", "trainer", "callbacks"),
)
_BASELINES = {
    "otsu": "Otsu's threshold",
    "constant": "best constant mask",
    "majority": "always the most frequent class",
}
_SCORES = {
    "native_dice": "native Dice",
    "dice": "Dice",
    "balanced_accuracy": "balanced accuracy",
}
console = Console()


def print_choices(config: Mapping[str, Any], choices: Mapping[str, str | None]) -> None:
    """Print the choices of a run that no experiment makes.

    Args:
        config: of the run; groups that are empty in it are left out.
        choices: of all groups.
    """
    if choices.get("experiment") is not None:
        return
    chosen = " ".join(f"{group}={choices[group]}" for group in _CHOSEN if config[group] != {})
    say(
        f"No experiment is chosen, so the run is {chosen}. experiment=<name> picks a recipe of "
        "conf/experiment, such as experiment=demo_teacher."
    )


def print_start(
    config: Mapping[str, Any],
    network: nn.Module,
    results: Mapping[str, Any],
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
) -> None:
    """Print what is about to run: config, network, data and the number of network calls."""
    _print_config(config)
    _print_network(network, results["network"], datamodule.image_size)
    _print_plan(module, datamodule)
    if "teacher" in results:
        _print_teacher(results["teacher"])


def _print_config(config: Mapping[str, Any]) -> None:
    """Print the groups of a config as a tree."""
    tree = Tree("config")
    for group in _SHOWN:
        if config[group] != {}:
            _grow(tree, group, config[group])
    console.print(tree)


def _grow(tree: Tree, key: str, value: Any) -> None:
    if isinstance(value, Mapping) and value:
        branch = tree.add(Text(printable(str(key)), "bold"))
        for name, item in value.items():
            _grow(branch, name, item)
    else:
        tree.add(plain_text(f"{key}: ").append(plain_text(str(value)).plain, "cyan"))


def _print_plan(module: L.LightningModule, datamodule: L.LightningDataModule) -> None:
    """Print the sizes of the split and how many network calls validation and test will make."""
    sizes = {part: len(dataset) for part, dataset in datamodule.datasets.items()}
    validation, test = module.network_calls(sizes["val"], sizes["test"])
    say(
        f"{datamodule.name}: {sizes['train']} train, {sizes['val']} val, {sizes['test']} test "
        f"images at {datamodule.image_size} px"
        + "".join(
            f", {datamodule.cache.meta[key]} {what}"
            for key, what in (("empty_masks", "empty masks"), ("full_masks", "full masks"))
            if datamodule.cache.meta.get(key)
        )
    )
    console.print(
        f"Network calls on one image: {validation:,} a validation, {test:,} for the test "
        f"({module.calls_per_mask:,} an image)"
    )


def _print_network(network: nn.Module, description: Mapping[str, Any], image_size: int) -> None:
    """Print the parts of a network with their parameters, and what one call costs."""
    table = Table(title=plain_text(f"{description['name']} at {image_size} px"))
    table.add_column("part")
    table.add_column("type")
    table.add_column("parameters", justify="right")
    for name, part in network.named_children():
        table.add_row(name, type(part).__name__, f"{_count(part):,}")
    table.add_section()
    table.add_row("all", f"{description['gmac']:.3f} GMAC a call", f"{description['params']:,}")
    console.print(table)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _print_teacher(description: Mapping[str, Any]) -> None:
    """Print which teacher was chosen."""
    objective = description["objective"]
    known = next((name for name in _SCORES if description.get(name) is not None), None)
    score = f"{_SCORES[known]} {description[known]:.4f}" if known else "score unknown"
    given = description["checkpoint"]
    files = given if isinstance(given, str) else ", ".join(given)
    say(
        f"Teacher: {description['network']['name']} from {files}, "
        + (f"objective {objective}, " if objective else "")
        + f"{description['weights']} weights, "
        f"test {score}"
    )
    leaked = description.get("leaked_images")
    if leaked is None:
        console.print(
            "Not all training images of this teacher are recorded, so it may have seen validation "
            "or test images of the student.",
            style="yellow",
        )
    elif any(leaked.values()):
        console.print(
            f"It has seen {leaked['test']} test and {leaked['val']} validation images of the "
            "student (teacher.allow_leak=true).",
            style="yellow",
        )


def print_batch(
    batch: Mapping[str, Any], earlier: Mapping[str, Any] | None, batch_size: int
) -> None:
    """Print how many images an optimizer step takes, and at which rate.

    Args:
        batch: as in `results.json`.
        earlier: that of the run that goes on, where it is known.
        batch_size: that of the config.
    """
    per_process, processes, accumulate, effective, rule, rate = batch.values()
    console.print(
        f"Effective batch {per_process} x {processes} processes x {accumulate} accumulated = "
        f"{effective} images; learning rate {rate:g} (training.scale_lr={rule})",
        soft_wrap=True,
    )
    if rule == "none" and batch_size % processes:
        console.print(
            f"datamodule.batch_size={batch_size} is no multiple of {processes} processes: each has "
            f"{per_process} images.",
            soft_wrap=True,
        )
    if earlier and earlier["effective"] != effective:
        console.print(
            f"Until now the run took {earlier['effective']} images a step; its learning rate goes "
            "on from the checkpoint.",
            soft_wrap=True,
        )


def print_results(results: Mapping[str, Any], folder: Path) -> None:
    """Print the scores of a run, what it compares with, and where it left its files.

    Scores at the size of the original masks come first; baselines have only the others.
    """
    scores = results["test"] or {}
    title = f"{results['experiment']}: {results['data']['n_test']} test images"
    table = Table(title=plain_text(title))
    table.add_column("score")
    table.add_column("value", overflow="fold")
    by_class: dict[str, dict[str, float]] = {}
    for key in native_first(scores):
        value = scores[key]
        _, score, *name = key.split("/")
        if name and score != "loss":
            by_class.setdefault("/".join(name), {})[score] = value
        else:
            table.add_row(plain_text(key), f"{value:.4f}")
    table.add_row("run folder", plain_text(_short(folder)), style="bold")
    console.print(table)
    if by_class:
        _print_classes(by_class)

    compared = main_scores(results)
    if "balanced_accuracy" not in compared:
        compared.setdefault("dice", None)
    table = Table(title="What it compares with")
    table.add_column("")
    columns = ("parameters", "GMAC a call", "calls an image", *map(_SCORES.get, compared))
    for column in columns:
        table.add_column(column, justify="right")
    teacher = results.get("teacher")
    if teacher:
        _add_network(table, "teacher", teacher, [teacher.get(score) for score in compared])
    _add_network(table, "student" if teacher else "network", results, list(compared.values()))
    for name, baseline in (results.get("baselines") or {}).items():
        table.add_row(_BASELINES[name], *["-"] * (len(columns) - 1), f"{baseline:.4f}")
    console.print(table)


def _print_classes(by_class: Mapping[str, Mapping[str, float]]) -> None:
    """Print a row for each class and a column for each of its scores."""
    columns = list(dict.fromkeys(score for scores in by_class.values() for score in scores))
    table = Table("class")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, scores in by_class.items():
        table.add_row(
            plain_text(name), *(f"{scores[c]:.4f}" if c in scores else "-" for c in columns)
        )
    console.print(table)


def _short(folder: Path) -> str:
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _add_network(
    table: Table, role: str, results: Mapping[str, Any], scores: Sequence[float | None]
) -> None:
    network, calls = results["network"], results["calls_per_mask"]
    table.add_row(
        plain_text(f"{role} ({network['name']})"),
        f"{network['params']:,}",
        f"{network['gmac']:.3f}",
        "unknown" if calls is None else f"{calls:,}",
        *("unknown" if score is None else f"{score:.4f}" for score in scores),
    )
