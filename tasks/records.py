"""The records of a run: config, split and results, written as it goes."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import OmegaConf
from torch import nn

from common.cluster import job_name
from common.errors import UserError
from common.files import write_text_atomic
from common.runs import RESULTS_SCHEMA, read_results, write_results
from datamodules.splits import write_split
from tasks.build import describe_network

__all__ = ["RunRecord"]


class RunRecord:
    """Keeps `config.yaml`, `splits.csv` and `results.json` of a run folder.

    Args:
        config: the run's config, plain.
        network: the network that is trained or tested.
        module, datamodule: of the run, set up.
        writes: whether this process writes; one of a distributed run does.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        network: nn.Module,
        module: L.LightningModule,
        datamodule: L.LightningDataModule,
        writes: bool = True,
    ) -> None:
        self.folder = Path(config["paths"]["run"])
        self._config = config
        self._parts, self._digests = datamodule.parts, datamodule.digests
        self._writes = writes
        earlier = (read_results(self.folder) or {}).get("seconds") or 0
        self._started = time.monotonic() - earlier
        data = config["datamodule"]
        counts = {f"n_{part}": len(rows) for part, rows in datamodule.datasets.items()}
        self.results: dict[str, Any] = {
            "schema": RESULTS_SCHEMA,
            "status": "running",
            "debug": config["debug_mode"] is not None,
            "experiment": config["run_name"],
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "revision": _revision(),
            "sweep": config.get("sweep_name"),
            "job": job_name(),
            "network": describe_network(network, config),
            "data": {
                "name": data["name"],
                "label": config.get("data_label"),
                "image_size": data["image_size"],
                "split_sha": datamodule.split_sha,
                "folds": data.get("folds"),
                "fold": data.get("fold"),
                **counts,
            },
            "objective": config["lightning_module"].get("objective"),
            "sampler": config["sampler"] or None,
            "calls_per_mask": module.calls_per_mask,
            "seconds": None,
            "val": None,
            "test": None,
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record that the run runs, then whether it finished or failed."""
        if self._writes:
            write_text_atomic(self.folder / "config.yaml", OmegaConf.to_yaml(self._config))
            write_split(self.folder / "splits.csv", self._parts, self._digests)
        self._write()
        try:
            yield
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            # On a full disk not even that can be written, and the first error is the one to show.
            with contextlib.suppress(UserError):
                self.add(status="failed", reason=reason)
            raise
        self.add(status="finished")

    def add(self, **results: Any) -> None:
        """Add to the results and write them."""
        self.results |= results
        self._write()

    def _write(self) -> None:
        if self._writes:
            self.results["seconds"] = round(time.monotonic() - self._started, 1)
            write_results(self.folder, self.results)


def _revision() -> str | None:
    """Return the commit of the project's code, with a plus sign where it was changed since."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
