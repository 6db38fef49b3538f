"""What a multirun would submit to SLURM, without submitting it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from common.errors import UserError

__all__ = ["print_submission", "submission_script"]

console = Console(highlight=False, soft_wrap=True)


def print_submission(config: DictConfig) -> None:
    """Print the script that `hydra/launcher=slurm` would hand to sbatch, and its jobs.

    Args:
        config: of the multirun, with Hydra's own part.

    Raises:
        UserError: the launcher is another.
    """
    jobs = _jobs(config)
    settings = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    console.print(submission_script(settings, len(jobs)), markup=False)
    for number, overrides in enumerate(jobs):
        console.print(f"# job {number}: {' '.join(overrides)}", markup=False)


def submission_script(settings: dict[str, Any], count: int) -> str:
    """Return the script that submitit makes for an array of jobs.

    Args:
        settings: of the group `hydra/launcher`, resolved.
        count: number of jobs.

    Raises:
        UserError: it is no launcher for SLURM.
    """
    if not settings["_target_"].endswith(".SlurmLauncher"):
        raise UserError("hydra.launcher.dry_run needs hydra/launcher=slurm.")
    import submitit  # An extra.

    # As the launcher hands them over.
    common = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes")
    common = (*common, "name", "stderr_to_stdout")
    kept = {
        key if key in common else f"slurm_{key}": value
        for key, value in settings.items()
        if key not in ("_target_", "submitit_folder", "max_num_timeout")
    }
    with tempfile.TemporaryDirectory() as stand_in, _in_path(Path(stand_in)):
        # submitit asks for srun before it says anything, and a laptop has none.
        (Path(stand_in) / "srun").touch(mode=0o755)
        folder = settings["submitit_folder"]
        executor = submitit.AutoExecutor(folder, cluster="slurm")
        executor.update_parameters(**kept)
        inner = executor._executor
        inner.parameters["map_count"] = count
        return inner._make_submission_file_text(inner._submitit_command_str, "")


def _jobs(config: DictConfig) -> list[list[str]]:
    """Return the overrides of each job of a grid."""
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create()
    overrides = parser.parse_overrides([*given, *config.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return jobs


@contextlib.contextmanager
def _in_path(folder: Path) -> Iterator[None]:
    """Look for programs in a folder first."""
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
