"""Compose the config and hand it to one task: `python run.py experiment=teacher_isic2018`."""

import importlib
import os
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from common.errors import UserError
from tasks.configuration import plain


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def dispatch(config: DictConfig) -> None:
    settings = plain(config)
    folder = Path(settings["paths"]["run"])
    try:
        importlib.import_module(f"tasks.{settings['task']}").run(settings)
    except UserError:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def main() -> None:
    """Run the command line; a user's mistake is a short message and exit code 2."""
    # Otherwise Hydra prints errors its own way and exits with code 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        dispatch()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: {describe(error)}", style="red", markup=False
        )
        sys.exit(2)


def describe(error: Exception) -> str:
    """Return what a person needs to read of an error, in one or two sentences."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError):
        return " ".join(lines)
    options = [line for line in lines if not line.endswith(":") and line != lines[0]]
    if "Could not find" in str(error):
        return f"{lines[0]} Choose one of {', '.join(options[:-1])}."
    return f"{' '.join(lines)} `python run.py --cfg job` prints every key."


if __name__ == "__main__":
    main()
