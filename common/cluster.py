"""How this process was started: alone, by another process of its run, by torchrun or by srun."""

import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

from common.errors import UserError

__all__ = [
    "Launch",
    "agree",
    "external_launch",
    "global_rank",
    "job_name",
    "requeue",
    "restarted",
    "slurm_job",
]

# Nodes of a cluster may start minutes apart.
PATIENCE = timedelta(minutes=10)
_FAILED = "error: "


class Launch(NamedTuple):
    """The place of this process among those that a launcher has started.

    Attributes:
        launcher: `torchrun` or `srun`.
        rank, world_size: of all processes.
        local_world_size: processes on this node.
    """

    launcher: str
    rank: int
    world_size: int
    local_world_size: int

    @property
    def num_nodes(self) -> int:
        """Nodes, each of which has as many processes as this one."""
        return self.world_size // self.local_world_size


def external_launch() -> Launch | None:
    """Return how torchrun or srun has started this process, or none where it was neither.

    A single task of srun counts as none: it may start further processes itself.
    """
    get = os.environ.get
    if "TORCHELASTIC_RUN_ID" in os.environ:
        numbers = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return Launch("torchrun", *numbers)
    # In a batch script without srun there is no step.
    tasks = int(get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1
    if tasks > 1:
        nodes = int(get("SLURM_STEP_NUM_NODES") or get("SLURM_NNODES") or 1)
        return Launch("srun", int(os.environ["SLURM_PROCID"]), tasks, tasks // nodes)
    return None


def global_rank() -> int:
    """Return the place of this process among all processes of its run, also before they meet."""
    launch = external_launch()
    if launch is not None:
        return launch.rank
    # Set by the Trainer in the processes that it starts, by the user on each of several nodes.
    return max(int(os.environ.get(key, "0")) for key in ("LOCAL_RANK", "NODE_RANK"))


def agree(decide: Callable[[], str], num_nodes: int = 1) -> str:
    """Return in every process what the first one has decided.

    Processes that the Trainer starts are told by their command line and do not come here.

    Args:
        decide: asked in the first process only.
        num_nodes: on which the user gives the same command, with NODE_RANK and MASTER_ADDR.

    Raises:
        UserError: the first process has raised one, or was not met within ten minutes.
    """
    launch, get = external_launch(), os.environ.get
    if launch is not None:
        rank, size = launch.rank, launch.world_size
    elif num_nodes > 1 and "MASTER_ADDR" in os.environ:
        rank, size = int(get("NODE_RANK", "0")), num_nodes
    else:
        return decide()
    import torch.distributed as dist  # Its import is paid only where it is needed.

    host, port = _meeting_point(launch)
    # The one of torchrun's agent outlives its workers, so restarted ones find what was decided.
    hosted = _has_agents_store(launch)
    try:
        hosts = rank == 0 and not hosted
        whole = dist.TCPStore(host, port, size, is_master=hosts, timeout=PATIENCE)
        store = dist.PrefixStore("dermodistill", whole)
        if rank == 0 and not (hosted and store.check(["decision"])):
            store.set("decision", _decision(decide))
        answer = store.get("decision").decode()
        store.set(f"read/{rank}", "yes")
        if rank == 0:
            # It must not take the store away before all have read.
            store.wait([f"read/{other}" for other in range(size)])
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"The {size} processes of this run did not find each other at {host}:{port} "
            f"({type(error).__name__}); check that all were started, and MASTER_ADDR and "
            "MASTER_PORT."
        ) from error
    if answer.startswith(_FAILED):
        raise UserError(answer.removeprefix(_FAILED))
    return answer


def _decision(decide: Callable[[], str]) -> str:
    try:
        return decide()
    except UserError as error:
        return f"{_FAILED}{error}"


def _has_agents_store(launch: Launch | None) -> bool:
    return launch is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meeting_point(launch: Launch | None) -> tuple[str, int]:
    """Return the address and port of the store; the Trainer's own processes meet beside it."""
    get = os.environ.get
    if launch is None or launch.launcher == "torchrun":
        port = int(get("MASTER_PORT", "12910"))
        return os.environ["MASTER_ADDR"], port if _has_agents_store(launch) else port + 1
    from lightning.fabric.plugins.environments import SLURMEnvironment

    first = SLURMEnvironment.resolve_root_node_address(get("SLURM_NODELIST", "127.0.0.1"))
    host = get("MASTER_ADDR", first)
    if "MASTER_PORT" in os.environ:
        return host, int(os.environ["MASTER_PORT"]) + 1
    # Far from the Trainer's port, which is that of a neighbouring job plus one.
    return host, 25000 + int(os.environ["SLURM_JOB_ID"][-4:])


def slurm_job() -> str | None:
    """Return the SLURM job in which this process runs, with its place in an array of jobs."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def job_name() -> str | None:
    """Return what stays the same when SLURM or torchrun starts this job again."""
    if slurm_job() is not None:
        return f"slurm {slurm_job()}"
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else f"torchrun {name}"


def restarted() -> bool:
    """Say whether SLURM has requeued this job, or torchrun has restarted this process."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(int(os.environ.get(key, "0")) > 0 for key in counts)


def requeue() -> bool:
    """Put this SLURM job into the queue again; return whether SLURM will.

    Without SLURM nothing is done.
    """
    job = slurm_job()
    if job is None or shutil.which("scontrol") is None:
        return False
    return subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
