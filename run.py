"""Compose the config and hand it to one task: `python run.py experiment=teacher_isic2018`."""

import contextlib
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

import tasks.resume  # Makes the resolver known that names the run folder.
from common.errors import Interrupted, UserError
from tasks.configuration import plain


@hydra.main(
    version_base="1.3",
    config_path=str(Path(__file__).resolve().parent / "conf"),
    config_name="config",
)
def dispatch(config: DictConfig) -> None:
    """Run the config's task; a user's mistake is a short message and exit code 2."""
    folder = Path(config.paths.run)
    _stop_on_sigterm()
    try:
        settings = plain(config)
        importlib.import_module(f"tasks.{settings['task']}").run(settings)
    except UserError as error:
        _exit(str(error))
    except (Interrupted, KeyboardInterrupt) as stop:
        _exit_interrupted(getattr(stop, "signum", signal.SIGINT), folder)
    finally:
        # Only an empty folder can be removed; another process may have been first.
        with contextlib.suppress(OSError):
            folder.rmdir()


def main() -> None:
    """Run the command line."""
    # Otherwise Hydra prints mistakes in the command line its own way and exits with code 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        dispatch()
    except (HydraException, OmegaConfBaseException) as error:
        own = error.__cause__
        _exit(str(own) if isinstance(own, UserError) else _explain(error))


def _stop_on_sigterm() -> None:
    """Unwind on SIGTERM, so that nothing is left half-written; training has its own way."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise Interrupted(signum)

    signal.signal(signal.SIGTERM, stop)


def _exit_interrupted(signum: int, folder: Path) -> NoReturn:
    # A launched process that fails would have the others killed before they have ended.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        sys.exit(0)
    message = f"stopped by {signal.Signals(signum).name}"
    if tasks.resume.last_checkpoint(folder).is_file():
        message += f"; `python run.py resume={folder}` goes on from here"
    _exit(f"{message}.", code=128 + signum)


def _explain(error: Exception) -> str:
    """Shorten what Hydra says of a group, key or value that does not exist."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Available options in" in str(error):
        start = next(i for i, line in enumerate(rest) if line.startswith("Available options"))
        end = next(
            (i for i, line in enumerate(rest) if line.startswith("Config search")), len(rest)
        )
        # What others are made of is no choice.
        options = [option for option in rest[start + 1 : end] if not option.startswith("_")]
        return f"{first.removeprefix('In ')}. Choose one of {', '.join(options)}."
    return f"{' '.join([first, *rest])} `python run.py --cfg job` prints every key."


def _exit(message: str, code: int = 2) -> NoReturn:
    text = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"error: {text}" if code == 2 else text, style="red", markup=False
    )
    sys.exit(code)


if __name__ == "__main__":
    main()
