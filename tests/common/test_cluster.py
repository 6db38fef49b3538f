"""How a process was started is told by its variables; all of a run agree on one answer."""

import multiprocessing as mp
import os
import socket

import pytest

from common import cluster
from common.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_NODELIST": "node[7-8]",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "abc",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
}


@pytest.fixture
def variables(monkeypatch):
    """Sets variables of the environment, after those of every launcher have been removed."""

    def put(values):
        known = ("SLURM_", "TORCHELASTIC_", "MASTER_", "SUBMITIT_")
        for key in list(os.environ):
            if key.startswith(known) or key in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
                monkeypatch.delenv(key)
        for key, value in values.items():
            monkeypatch.setenv(key, value)

    return put


@pytest.mark.parametrize(
    ("values", "launch", "rank"),
    [
        ({}, None, 0),
        ({"LOCAL_RANK": "2"}, None, 2),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a"}, None, 1),
        (TORCHRUN, ("torchrun", 5, 8, 4), 5),
        (SRUN, ("srun", 3, 4, 2), 3),
        # A batch script without srun looks like the first of several tasks but for the step.
        ({k: v for k, v in SRUN.items() if "STEP" not in k}, None, 0),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None, 0),
        (SRUN | TORCHRUN, ("torchrun", 5, 8, 4), 5),
    ],
)
def test_the_launcher_and_the_rank(variables, values, launch, rank):
    variables(values)
    assert cluster.external_launch() == (launch and cluster.Launch(*launch))
    assert cluster.global_rank() == rank
    if launch:
        assert cluster.external_launch().num_nodes == 2


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, "slurm 7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "2"}, "slurm 8_2"),
        (TORCHRUN, "torchrun abc"),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, None),
    ],
)
def test_what_stays_when_a_job_is_started_again(variables, values, name):
    variables(values)
    assert cluster.job_name() == name


@pytest.mark.parametrize("key", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_job_that_was_started_again(variables, key):
    for count, expected in (("0", False), ("1", True)):
        variables({key: count})
        assert cluster.restarted() is expected


@pytest.mark.parametrize(("code", "queued"), [(0, True), (1, False)])
def test_a_job_is_queued_again_by_its_number(variables, tmp_path, code, queued):
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexit {code}\n')
    program.chmod(0o755)
    variables({"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
    assert not cluster.requeue()
    assert not (tmp_path / "said").exists(), "it is no job of SLURM"
    variables({"SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "9"})
    assert cluster.requeue() is queued
    assert (tmp_path / "said").read_text() == "requeue 8_2\n"


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _ask(environment, answers, num_nodes, decision):
    os.environ.update(environment)

    def decide():
        if decision is None:
            raise UserError("There is no such run.")
        return f"{decision} of {cluster.global_rank()}"

    try:
        answers.put(cluster.agree(decide, num_nodes))
    except UserError as error:
        answers.put(f"refused: {error}")


@pytest.mark.parametrize(
    ("launcher", "decision"),
    [
        ("srun", "the folder"),
        pytest.param("srun", None, marks=pytest.mark.slow),
        pytest.param("nodes", "the folder", marks=pytest.mark.slow),
        ("nodes", None),
    ],
)
def test_all_processes_take_what_the_first_one_decides(launcher, decision):
    context = mp.get_context("spawn")
    answers = context.Queue()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = []
    for rank in (0, 1):
        own = {"NODE_RANK": str(rank)}
        if launcher == "srun":
            own = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank)}
        arguments = (own | address, answers, 2, decision)
        processes.append(context.Process(target=_ask, args=arguments))
    for process in processes:
        process.start()
    said = {answers.get(timeout=100) for _ in processes}
    for process in processes:
        process.join(timeout=100)
    assert said == {"the folder of 0" if decision else "refused: There is no such run."}


def test_a_process_alone_decides_for_itself(variables):
    variables({})
    assert cluster.agree(lambda: "here", num_nodes=2) == "here"


def test_where_the_processes_of_srun_meet(variables):
    variables(SRUN)
    assert cluster._meeting_point(cluster.external_launch()) == ("node7", 29242)
    variables(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1000"})
    assert cluster._meeting_point(cluster.external_launch()) == ("head", 1001)
