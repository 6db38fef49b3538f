"""Get a dataset from its publisher, or say how to get it."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from common.errors import UserError
from common.text import say
from datamodules.downloads import Download, count_images, fetch, unpack
from tasks.build import build_datamodule

__all__ = ["run"]

console = Console(highlight=False)


def run(config: dict[str, Any]) -> None:
    """Download and unpack what the publisher of `datamodule` serves without a login.

    What is there already is left alone, so that the same command goes on after any interruption.

    Raises:
        UserError: the dataset needs a login or a form, a download failed, an archive is damaged, or
            a folder has another number of images than published.
    """
    datamodule = build_datamodule(config["datamodule"])
    root = datamodule.root
    if not datamodule.downloads:
        raise UserError(
            f"{datamodule.name} is not served without a login or form: {datamodule.hint} "
            f"How the folder must look: {' '.join((type(datamodule).__doc__ or '').split())}"
        )
    for download in datamodule.downloads:
        _get(download, root, config["source"], config["keep_archives"])
    say(
        f"{datamodule.name} is in {root}; `python run.py task=check_data "
        f"datamodule={config['dataset']}` checks every file."
    )


def _get(download: Download, root: Path, source: str | None, keep: bool) -> None:
    target = root / download.target
    if not target.exists():
        url = f"{source.rstrip('/')}/{download.name}" if source else None
        try:
            path = _fetch(download, root, url)
            if path != target:
                say(f"Unpacking {path.name}")
                unpack(path, target)
                if not keep:
                    path.unlink()
        except OSError as error:
            raise UserError(
                f"{root} cannot be written ({error.strerror}); free some space or set paths.data "
                "to another folder."
            ) from error
    found = count_images(target) if download.images else 0
    if found != download.images:
        raise UserError(
            f"{target} has {found} images, published are {download.images}; remove the folder and "
            "give the same command again."
        )
    say(f"complete: {target}", style="green")


def _fetch(download: Download, root: Path, url: str | None) -> Path:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(download.name, total=None)
        return fetch(
            download,
            root,
            url,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
