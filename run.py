"""Compose the config and hand it to one task: `python run.py experiment=teacher_isic2018`."""

import importlib
import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from common.errors import UserError
from tasks.configuration import plain


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def dispatch(config: DictConfig) -> None:
    """Run the config's task; a user's mistake is a short message and exit code 2."""
    folder = Path(config.paths.run)
    try:
        settings = plain(config)
        importlib.import_module(f"tasks.{settings['task']}").run(settings)
    except UserError as error:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        _exit(" ".join(str(error).split()))


def main() -> None:
    """Run the command line."""
    # Otherwise Hydra prints mistakes in the command line its own way and exits with code 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        dispatch()
    except (HydraException, OmegaConfBaseException) as error:
        _exit(_explain(error))


def _explain(error: Exception) -> str:
    """Shorten what Hydra says of a group, key or value that does not exist."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Available options in" in str(error):
        start = next(i for i, line in enumerate(rest) if line.startswith("Available options"))
        end = next(
            (i for i, line in enumerate(rest) if line.startswith("Config search")), len(rest)
        )
        return f"{first.removeprefix('In ')}. Choose one of {', '.join(rest[start + 1 : end])}."
    return f"{' '.join([first, *rest])} `python run.py --cfg job` prints every key."


def _exit(message: str) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"error: {message}", style="red", markup=False
    )
    sys.exit(2)


if __name__ == "__main__":
    main()
