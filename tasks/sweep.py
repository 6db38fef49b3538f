"""A multirun: each job a fresh `run.py` with its own overrides, then a table of them all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from common.cluster import external_launch, global_rank, restarted
from common.errors import UserError, exit_with
from common.files import refuse_read_only, write_text_atomic
from common.quoting import hydra_string
from common.runs import read_results
from common.text import say
from tasks.build import build_datamodule
from tasks.configuration import split_override
from tasks.resume import last_checkpoint
from tasks.submission import print_submission
from tasks.sweep_table import print_table, write_tables

__all__ = ["JobError", "Sweep", "expand_cross_validation", "read_jobs", "run_job"]

ROOT = Path(__file__).resolve().parent.parent
# Which of a job's overrides do not make it another job.
_UNTOLD = ("skip_finished", "sweep_name", "resume")
# Plugins of Hydra, and the extra of this project that has them.
_EXTRAS = {"hydra_optuna_sweeper": "optuna", "hydra_submitit_launcher": "slurm"}
# Options of Hydra that show a config or explain, and run nothing.
_SHOWING = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--shell-completion")


class JobError(RuntimeError):
    """A job of a search ended with an error, which it has printed itself."""


def expand_cross_validation(arguments: Sequence[str]) -> list[str]:
    """Make `cross_validation=5` on a command line a multirun over the folds 0 to 4.

    A command line that gives `datamodule.fold` runs that fold alone and stays as it is.

    Args:
        arguments: of the command line, without the program.

    Raises:
        UserError: it is no whole number of at least 2, or a split is given too.
    """
    given = {split_override(a)[0]: a for a in arguments if not a.startswith("-")}
    argument = given.get("cross_validation", "~")
    folds = split_override(argument)[1]
    shows = any(a.split("=")[0] in _SHOWING for a in arguments)
    if argument.startswith("~") or folds == "null" or shows:
        return list(arguments)
    if not re.fullmatch("[0-9]+", folds) or int(folds) < 2:
        raise UserError(
            f"{argument} must be a whole number of folds, at least 2, such as cross_validation=5."
        )
    for key in ("datamodule.split", "datamodule.split_file"):
        if given.get(key, "null").rpartition("=")[2] != "null":
            raise UserError(
                f"{given[key]} and {argument} both divide the images; leave one of them out."
            )
    if "datamodule.fold" in given:
        return list(arguments)
    expanded = list(arguments)
    place = expanded.index(argument) + 1
    expanded.insert(place, f"datamodule.fold={','.join(map(str, range(int(folds))))}")
    return expanded if {"-m", "--multirun"} & set(arguments) else ["--multirun", *expanded]


def refuse_showing(arguments: Sequence[str]) -> None:
    """Refuse to show the config of a multirun, which has several.

    Args:
        arguments: of the command line, without the program.

    Raises:
        UserError: one of them shows a config or help.
    """
    shows = next((a for a in arguments if a.split("=")[0] in _SHOWING), None)
    if shows is not None and {"-m", "--multirun"} & set(arguments):
        raise UserError(
            f"{shows} shows one config, and -m runs several; leave -m out and give one value for "
            "each key."
        )


class Sweep(Callback):
    """Checks a multirun before its first job, and shows its table after the last."""

    def on_multirun_start(self, config: DictConfig, **settings: Any) -> None:
        try:
            _refuse(config)
            with read_write(config.hydra), open_dict(config.hydra.launcher):
                dry = config.hydra.launcher.pop("dry_run", False)
            if dry:
                print_submission(config)
                sys.exit(0)
            arguments = {"arguments": list(config.hydra.overrides.task)}
            folder = Path(config.hydra.sweep.dir)
            if config.skip_finished or restarted():
                folder = _continued(folder.parent, **arguments) or folder
                _set_folder(config, folder)
            _check_folds(config)
            refuse_read_only(folder)
            _write(folder / "sweep.json", arguments)
        except UserError as error:
            # Hydra would make a warning of it and go on.
            exit_with(str(error))

    def on_multirun_end(self, config: DictConfig, **settings: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        jobs = read_jobs(folder)
        try:
            write_tables(folder, jobs)
            print_table(folder, jobs)
        except UserError as error:
            exit_with(str(error))
        failed = sum(job["status"] != "finished" for job in jobs)
        if failed:
            exit_with(
                f"{failed} of {len(jobs)} jobs failed; the same command with skip_finished=true "
                "runs them again.",
                code=1,
            )


def run_job(config: DictConfig) -> float:
    """Run one job of a multirun in a process of its own and wait for it.

    With `trainer.devices=2` that process starts its second one as any run does, which sees this
    job's overrides and nothing of the sweep. A job whose folder has a `last.ckpt` goes on from it.

    Returns:
        The score by which the job's run chose its best checkpoint, for sweepers that search; not a
        number where it has none or the job failed.

    Raises:
        JobError: the job failed, and the sweeper searches.
        UserError: so did all before it.
    """
    hydra = HydraConfig.get()
    overrides = [o for o in hydra.overrides.task if split_override(o)[0] not in _UNTOLD]
    sweep = Path(hydra.sweep.dir).resolve()
    runs = sweep.parent.parent
    record = {
        "num": hydra.job.num,
        "overrides": overrides,
        "folder": os.path.relpath(Path(config.paths.run).resolve(), runs),
        "status": "running",
        "reason": None,
        "seconds": None,
    }
    path = sweep / "jobs" / f"{hydra.job.num:04d}.json"
    says = global_rank() == 0
    earlier = None
    if config.skip_finished or restarted():
        # A job that SLURM starts again was not told to leave out what other multiruns have done.
        folders = sorted(sweep.parent.glob("*")) if config.skip_finished else [sweep]
        earlier = _find(folders, overrides)
    if earlier:
        record |= {key: earlier[key] for key in ("folder", "seconds")}
    if earlier and earlier["status"] == "finished":
        if says:
            say(f"job {hydra.job.num} is finished already: {' '.join(overrides)}")
            _write(path, earlier | {"num": hydra.job.num})
        return _score(runs / record["folder"])
    if says:
        say(f"job {hydra.job.num}: {' '.join(overrides)}")
        _write(path, record)
    started = time.monotonic()
    status = "interrupted"
    try:
        code, reason = _call(_command(hydra, overrides, runs / record["folder"], sweep.name))
        status = "failed" if code else "finished"
        record["reason"] = reason if code else None
    finally:
        record |= {"status": status, "seconds": round(time.monotonic() - started, 1)}
        if says:
            _write(path, record)
    if code and not _walks_grid(hydra):
        if not any(job["status"] == "finished" for job in read_jobs(sweep)):
            raise UserError(f"The search ends, because no job of it has worked: {record['reason']}")
        # So a sweeper that searches learns of it; one that walks a grid would end the others.
        raise JobError(record["reason"])
    return float("nan") if code else _score(runs / record["folder"])


def _refuse(config: DictConfig) -> None:
    """Refuse what would train something else than was asked for.

    Raises:
        UserError: torchrun or srun have started several multiruns, a sweeper samples for several
            devices or searches over folds, a task cannot be cross-validated, or a plugin is not
            installed.
    """
    launch = external_launch()
    if launch is not None:
        raise UserError(
            f"{launch.launcher} has started {launch.world_size} multiruns of the same jobs; give "
            "the command without it and trainer.devices=<n>, or submit each job with "
            "hydra/launcher=slurm."
        )
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    sweeper = config.hydra.sweeper._target_.rsplit(".", 1)[-1]
    count = devices if isinstance(devices, int | str) else len(devices)
    if not _walks_grid(config.hydra) and (count, nodes) != (1, 1):
        raise UserError(
            f"{sweeper} draws its values anew in every process, so with trainer.devices={devices} "
            "each would train other hyper-parameters; search with trainer.devices=1, or sweep "
            "over a grid, which several devices can share."
        )
    if config.cross_validation is not None:
        if config.task != "fit":
            raise UserError(
                f"cross_validation={config.cross_validation} trains a network for each fold, and "
                f"task={config.task} trains none; leave it out, or add datamodule.fold=0 for the "
                "images of that fold."
            )
        if not _walks_grid(config.hydra):
            raise UserError(
                f"{sweeper} would search over the folds of cross_validation="
                f"{config.cross_validation}; cross-validate a grid, or what the search has found."
            )
    for plugin, extra in _EXTRAS.items():
        targets = (config.hydra.sweeper._target_, config.hydra.launcher._target_)
        if any(t.split(".")[:2] == ["hydra_plugins", plugin] for t in targets) and not _has(plugin):
            raise UserError(f'This needs {plugin}; install it with `pip install -e ".[{extra}]"`.')


def _check_folds(config: DictConfig) -> None:
    """Refuse a cross-validation that the images cannot be divided for, before its first job.

    The jobs check data themselves where the multirun varies it, and on a cluster.

    Raises:
        UserError: the data is missing or broken, or has too few groups.
    """
    hydra = config.hydra
    given = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*given, *hydra.overrides.task])
    swept = {o.key_or_group for o in overrides if o.is_sweep_override()} - {"datamodule.fold"}
    varied = any(key.split(".")[0] in ("datamodule", "experiment", "paths") for key in swept)
    local = hydra.launcher._target_.endswith(".BasicLauncher")
    if config.cross_validation is None or varied or not local:
        return
    settings = OmegaConf.to_container(config.datamodule, resolve=True)
    datamodule = build_datamodule({**settings, "fold": 0})
    samples = datamodule.find_samples()
    for datamodule.fold in range(config.cross_validation):
        datamodule.divide(samples)


def _walks_grid(hydra: Any) -> bool:
    return hydra.sweeper._target_.endswith(".BasicSweeper")


def _continued(sweeps: Path, arguments: Sequence[str]) -> Path | None:
    """Return the folder of the newest multirun that was started by the same command."""
    for folder in sorted(sweeps.glob("*"), reverse=True):
        if _told(_read(folder / "sweep.json").get("arguments", [])) == _told(arguments):
            return folder
    return None


def _set_folder(config: DictConfig, folder: Path) -> None:
    """Have a multirun keep its records in a folder."""
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.sweep.dir = str(folder)
        # Of these the config of each job is composed.
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={hydra_string(str(folder))}")


def _command(hydra: Any, overrides: Sequence[str], folder: Path, sweep: str) -> list[str]:
    """Return the command line of a job."""
    added = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    searched = [o for o in hydra.overrides.hydra if split_override(o)[0] == "hydra.searchpath"]
    place = hydra_string(str(folder))
    return [
        *(sys.executable, str(ROOT / "run.py")),
        *(argument for path in added for argument in ("--config-dir", path)),
        *overrides,
        *searched,
        f"sweep_name='{sweep}'",
        *([f"resume={place}"] if last_checkpoint(folder).is_file() else []),
        f"hydra.run.dir={place}",
        # A file of the group `sweep` may have made it a multirun.
        "hydra.mode=RUN",
    ]


def _call(command: Sequence[str]) -> tuple[int, str]:
    """Run a command and return its exit code and the last that it said of what went wrong."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    said: deque[str] = deque(maxlen=40)
    try:
        for line in process.stderr or ():
            sys.stderr.write(line)
            if line.strip():
                said.append(line.strip())
        code = process.wait()
    except BaseException:
        # Of an interrupt from the terminal it knows already; a second one would not let it save.
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    errors = [line for line in said if line.startswith("error: ")]
    last = (errors or list(said) or [f"exit code {code}"])[-1]
    return code, last.removeprefix("error: ")


def _has(plugin: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # No plugin at all is installed.
        return False


def _find(sweeps: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any] | None:
    """Return the record of an earlier job with the same overrides, a finished one if possible.

    Args:
        sweeps: folders of multiruns, the newest last.
        overrides: of the job.
    """
    found = [job for folder in reversed(sweeps) for job in read_jobs(folder)]
    same = [job for job in found if _told(job["overrides"]) == _told(overrides)]
    finished = [job for job in same if job["status"] == "finished"]
    return next(iter(finished + same), None)


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a multirun's jobs that can be read."""
    return [job for path in sorted(folder.glob("jobs/*.json")) if _is_record(job := _read(path))]


def _score(folder: Path) -> float:
    best = (read_results(folder) or {}).get("best") or {}
    score = best.get("score")
    return float("nan") if score is None else score


def _told(overrides: Sequence[str]) -> list[str]:
    return sorted(o for o in overrides if split_override(o)[0] not in _UNTOLD)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_record(record: dict[str, Any]) -> bool:
    """Tell whether a file holds what `run_job` writes of a job."""
    return (
        record.keys() >= {"num", "overrides", "folder", "status", "reason", "seconds"}
        and isinstance(record["overrides"], list)
        and all(isinstance(override, str) for override in record["overrides"])
        and isinstance(record["folder"], str)
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")
