"""Compose the config and hand it to one task: `python run.py experiment=teacher_isic2018`."""

import contextlib
import importlib
import os
import re
import signal
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import tasks.resume  # Makes the resolver known that names the run folder.
import tasks.sweep
from common.choices import check_choices, explain_key, leave_to_jobs
from common.cluster import global_rank, requeue
from common.errors import STOPS, WARNINGS, Interrupted, UserError, exit_with
from common.files import exclusive
from common.quoting import multirun, quoted, suggest_quotes
from tasks.configuration import plain

CONF = Path(__file__).resolve().parent / "conf"


@hydra.main(
    version_base="1.3",
    config_path=str(CONF),
    config_name="config",
)
def dispatch(config: DictConfig) -> float | None:
    """Run the config's task, or a job of a multirun; a user's mistake is a short message."""
    folder = Path(config.paths.run)
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    if not (multirun and "SUBMITIT_EXECUTOR" in os.environ):  # It has handlers of its own.
        _unwind_on_signals()
    try:
        if multirun:
            return tasks.sweep.run_job(config)
        settings = plain(config)
        with exclusive(folder) if global_rank() == 0 else contextlib.nullcontext():
            importlib.import_module(f"tasks.{settings['task']}").run(settings)
    except UserError as error:
        exit_with(str(error))
    except (Interrupted, KeyboardInterrupt) as stop:
        _exit_interrupted(getattr(stop, "signum", signal.SIGINT), folder, config, multirun)
    finally:
        # Only an empty folder can be removed; another process may have been first.
        with contextlib.suppress(OSError):
            folder.rmdir()
            if folder.parent.parent.resolve() == Path(config.paths.runs).resolve():
                folder.parent.rmdir()


def main() -> None:
    """Run the command line."""
    arguments = quoted(sys.argv[1:])
    try:
        arguments = check_choices(arguments, CONF)
    except UserError as error:
        exit_with(str(error))
    # Hydra's parser takes flags before or after all overrides, not among them.
    flags = [a for a in arguments if a in ("-m", "--multirun")]
    # Processes that the Trainer starts are given these again.
    sys.argv[1:] = [*flags, *(a for a in arguments if a not in flags)]
    # Otherwise Hydra prints mistakes in the command line its own way and exits with code 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        sys.argv[1:] = tasks.sweep.expand_cross_validation(sys.argv[1:])
        if multirun(sys.argv[1:]):
            tasks.sweep.refuse_showing(sys.argv[1:])
            sys.argv[1:] = leave_to_jobs(sys.argv[1:], CONF)
        dispatch()
    except UserError as error:
        exit_with(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        exit_with(str(_own(error) or _explain(error)))


def _own(error: BaseException | None) -> UserError | None:
    """Return the error of this project that an error of Hydra was made of, if it was."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _unwind_on_signals() -> None:
    """Unwind on SIGTERM and on SLURM's warning, so that nothing is left half-written.

    Training has its own way.
    """

    def stop(signum: int, frame: object) -> NoReturn:
        raise Interrupted(signum)

    for signum in STOPS:
        signal.signal(signum, stop)


def _exit_interrupted(signum: int, folder: Path, config: DictConfig, multirun: bool) -> NoReturn:
    # SLURM ends what it queues again, and that must not come between.
    for again in STOPS:
        signal.signal(again, signal.SIG_IGN)
    # A launched process that fails would have the others killed before they have ended.
    if global_rank() != 0:
        sys.exit(0)
    message = f"stopped by {signal.Signals(signum).name}"
    # A multirun is queued as a whole; SIGTERM comes from SLURM when it has decided itself.
    alone = config.sweep_name is None and "SUBMITIT_EXECUTOR" not in os.environ
    if signum in WARNINGS and alone and requeue():
        message += "; SLURM has queued the job again, which then goes on from here"
    elif multirun:
        message += "; the same command with skip_finished=true goes on from here"
    elif tasks.resume.last_checkpoint(folder).is_file():
        message += f"; `python run.py resume={folder}` goes on from here"
    exit_with(f"{message}.", code=128 + signum)


def _explain(error: Exception) -> str:
    """Shorten what Hydra says of a group, key or value that does not exist."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()]
    every = "`python run.py --cfg job` prints every key."
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override} has no value; give {error.override}=<value>. {every}"
        typed = suggest_quotes(error.override)
        return f"{error.override} has characters that need quotes; write it as {typed}. {every}"
    several = re.match(r"Ambiguous value for argument '(.*)'$", first)
    if several:
        return f"{several[1]} has several values; add -m to run each of them, or give one."
    unknown = re.match(r"Could not (?:override|delete) '(?:.*@)?([^']+)'", first)
    if unknown:
        return f"{explain_key(unknown[1].replace('/', '.'), CONF)}. {every}"
    if "Available options in" in str(error):
        start = next(i for i, line in enumerate(rest) if line.startswith("Available options"))
        end = next(
            (i for i, line in enumerate(rest) if line.startswith("Config search")), len(rest)
        )
        # What others are made of is no choice.
        options = [option for option in rest[start + 1 : end] if not option.startswith("_")]
        name = first.removesuffix("'").rpartition("/")[2]
        near = "".join(
            f"; the nearest is {n}" for n in get_close_matches(name.lower(), options, n=1)
        )
        return f"{first.removeprefix('In ')}{near}. Choose one of {', '.join(options)}."
    return f"{' '.join([first, *rest])} {every}"


if __name__ == "__main__":
    main()
