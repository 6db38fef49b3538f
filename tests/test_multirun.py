"""Sweeps, launchers and clusters on the command line: each job as if it had been run alone."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tiny_runs import TINY

ROOT = Path(__file__).resolve().parent.parent
SMALL = (*TINY, "datamodule.num_samples=40", "datamodule.num_workers=0")
RATES = "lightning_module.optimizer.lr=1e-3,3e-3"
pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """Starts a command line of run.py in `tmp_path`, where its runs and its log will be."""
    started = []

    def begin(*overrides, launcher=(sys.executable,), name="runs", env=None):
        places = (f"paths.runs={tmp_path / name}", f"paths.cache={tmp_path}/cache")
        command = [*launcher, str(ROOT / "run.py"), *overrides[:1], *SMALL, *places, *overrides[1:]]
        log = (tmp_path / f"{name}.log").open("a")
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def run(start, tmp_path):
    """Runs a command line to its end; returns what it said."""

    def finish(*overrides, code=0, name="runs", **settings):
        process = start(*overrides, name=name, **settings)
        log = tmp_path / f"{name}.log"
        assert process.wait(timeout=400) == code, log.read_text()
        return " ".join(log.read_text().split())

    return finish


def weights(folder, name="last.ckpt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def assert_same_weights(one, two):
    first, second = weights(one), weights(two)
    assert first["global_step"] == second["global_step"] > 0
    for part in ("state_dict", "current_model_state"):
        assert first[part].keys() == second[part].keys()
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), key


def jobs(runs):
    (folder,) = (runs / "sweeps").iterdir()
    return [json.loads(path.read_text()) for path in sorted(folder.glob("jobs/*.json"))]


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "it did not get that far"
        time.sleep(0.05)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_grid_on_two_processes_is_each_job_run_alone_on_two(run, tmp_path):
    two = ("trainer.devices=2", "trainer.max_epochs=1")
    said = run("-m", *two, RATES, name="grid")
    assert "2 jobs, highest first" in said
    grid = tmp_path / "grid"
    assert {path.name for path in grid.iterdir()} == {"demo_teacher", "sweeps"}
    folders = sorted((grid / "demo_teacher").iterdir())
    assert [folder.name[-2:] for folder in folders] == ["_0", "_1"], "and no phantoms"
    for rate, folder in zip(("1e-3", "3e-3"), folders, strict=True):
        run(*two, f"lightning_module.optimizer.lr={rate}", name=rate)
        (alone,) = (tmp_path / rate / "demo_teacher").iterdir()
        assert_same_weights(folder, alone)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["lightning_module"]["optimizer"]["lr"] == float(rate)
        assert config["sweep_name"] == results(folder)["sweep"]
        assert (grid / "sweeps" / config["sweep_name"]).is_dir()
        assert (folder / "metrics.csv").read_text().count("\n") > 3
    # What the rates made of the weights differs, so the comparison could have failed.
    states = [weights(folder)["state_dict"] for folder in folders]
    assert any(not torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_failing_job_is_reported_and_the_others_go_on(run, tmp_path):
    sweep = ("-m", "trainer.max_epochs=1", "lightning_module.optimizer.lr=1e-3,-1", "seed=0,1")
    said = run(*sweep, code=1)
    assert "2 of 4 jobs failed" in said
    assert "Invalid learning rate: -1" in said
    records = jobs(tmp_path / "runs")
    assert [record["status"] for record in records] == ["finished"] * 2 + ["failed"] * 2
    assert len(list((tmp_path / "runs/demo_teacher").iterdir())) == 2
    (folder,) = (tmp_path / "runs/sweeps").iterdir()
    table = (folder / "table.md").read_text().splitlines()
    head = "| lightning_module.optimizer.lr | jobs | best val/dice | test/native_dice | test/dice |"
    assert table[0].startswith(head)
    assert table[2].startswith("| 0.001 | 2 | ")
    assert " ± " in table[2]
    assert table[3].startswith("| -1 | 0 of 2 |")
    with (folder / "jobs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    done = results(tmp_path / "runs" / records[0]["folder"])
    assert float(rows[0]["test/dice"]) == done["test"]["test/dice"]
    assert float(rows[0]["best val/dice"]) == done["best"]["score"]
    assert rows[3]["reason"].endswith("Invalid learning rate: -1")


def test_an_interrupted_multirun_goes_on(start, run, tmp_path):
    sweep = ("-m", "trainer.max_epochs=6", "seed=0,1,2")
    runs = tmp_path / "runs" / "demo_teacher"
    process = start(*sweep)
    wait_until(lambda: list(runs.glob("*_1/samples/step_*.png")), process)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "skip_finished=true" in (tmp_path / "runs.log").read_text()
    assert [r["status"] for r in jobs(tmp_path / "runs")] == ["finished", "interrupted"]
    first, second = sorted(runs.iterdir())
    assert results(second)["status"] == "failed"
    assert 0 < weights(second)["global_step"] < weights(first)["global_step"]
    stamp = (first / "results.json").stat().st_mtime_ns
    run(*sweep, "skip_finished=true")
    assert [r["status"] for r in jobs(tmp_path / "runs")] == ["finished"] * 3
    assert len(list(runs.iterdir())) == 3
    assert (first / "results.json").stat().st_mtime_ns == stamp
    assert {results(folder)["sweep"] for folder in runs.iterdir()} == {results(first)["sweep"]}
    run("trainer.max_epochs=6", "seed=1", name="alone")
    assert_same_weights(second, next((tmp_path / "alone/demo_teacher").iterdir()))


def test_a_cross_validation_tests_every_image_once_and_predicts_with_all_folds(run, tmp_path):
    sweep = ("cross_validation=3", "trainer.max_epochs=1")
    said = run(*sweep)
    assert "3 jobs, highest first" in said
    (folder,) = (tmp_path / "runs/sweeps").iterdir()
    with (folder / "cross_validation.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    assert sorted(row["id"] for row in images) == [f"synthetic_{n:06d}" for n in range(40)]
    records = jobs(tmp_path / "runs")
    for fold, record in enumerate(records):
        done = results(tmp_path / "runs" / record["folder"])
        assert (done["data"]["folds"], done["data"]["fold"]) == (3, fold)
        own = [float(row["dice"]) for row in images if row["fold"] == str(fold)]
        assert done["data"]["n_test"] == len(own)
        assert done["test"]["test/dice"] == pytest.approx(sum(own) / len(own))
    mean = sum(float(row["native_dice"]) for row in images) / 40
    assert f"| 3 | 40 | {mean:.4f} (" in (folder / "table.md").read_text()
    run("-m", *sweep, "skip_finished=true")
    assert jobs(tmp_path / "runs") == records, "nothing was trained again"
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    places = (f"paths.runs={tmp_path / 'runs'}", f"output={tmp_path / 'masks'}")
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "run.py"), "task=predict", f"checkpoint={folder}"),
            *(f"input={tmp_path / 'photo.png'}", "trainer.accelerator=cpu", *places),
        ],
        check=True,
        cwd=tmp_path,
        capture_output=True,
    )
    with (tmp_path / "masks/predictions.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["error"] == ""
    assert float(row["mean_uncertainty"]) > 0


def test_a_search_on_one_device_learns_from_its_jobs(run, tmp_path):
    pytest.importorskip("optuna")
    said = run(
        *("-m", "hydra/sweeper=optuna_tpe", "hydra.sweeper.n_trials=2", "trainer.max_epochs=1"),
        "lightning_module.optimizer.lr=interval(1e-4,1e-2)",
    )
    assert "2 jobs, highest first" in said
    (folder,) = (tmp_path / "runs/sweeps").iterdir()
    found = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    scores = [
        results(tmp_path / "runs" / r["folder"])["best"]["score"] for r in jobs(folder.parents[1])
    ]
    assert found["best_value"] == max(scores)


@pytest.mark.parametrize(
    ("launcher", "overrides", "message"),
    [
        ((), ("hydra/sweeper=optuna_tpe", "trainer.devices=2"), "other hyper-parameters"),
        (("torchrun",), ("seed=0,1",), "torchrun has started 2 multiruns"),
    ],
)
def test_what_would_train_something_else_is_refused(run, tmp_path, launcher, overrides, message):
    if launcher:
        command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
        said = run("-m", *overrides, launcher=command, code=1)
    else:
        said = run("-m", *overrides, code=2)
    assert message in said
    assert not list(tmp_path.glob("runs/demo_teacher/*"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A run on two processes that the Trainer has started."""
    folder = tmp_path_factory.mktemp("two")
    places = (f"paths.runs={folder}/runs", f"paths.cache={folder}/cache")
    command = [sys.executable, str(ROOT / "run.py"), *SMALL, *places]
    subprocess.run(
        [*command, "trainer.devices=2", "trainer.max_epochs=3"],
        check=True,
        cwd=folder,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    (done,) = (folder / "runs" / "demo_teacher").iterdir()
    return done


def test_torchrun(run, tmp_path, two_processes):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    said = run("trainer.max_epochs=3", launcher=(*launcher, "--standalone"))
    (folder,) = (tmp_path / "runs/demo_teacher").iterdir()
    assert_same_weights(folder, two_processes)
    assert said.count("run folder") == 1
    said = run("trainer.devices=3", launcher=(*launcher, "--master-port=29611"), code=1)
    assert "trainer.devices=3 is not what torchrun has started, which is 2" in said


def test_torchrun_on_two_nodes(start, tmp_path, two_processes):
    def node(rank):
        return (
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--nnodes=2"),
            *(f"--node-rank={rank}", "--master-addr=127.0.0.1", "--master-port=29612"),
        )

    nodes = [start("trainer.max_epochs=3", launcher=node(rank)) for rank in (0, 1)]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0], (tmp_path / "runs.log").read_text()
    (folder,) = (tmp_path / "runs/demo_teacher").iterdir()
    assert_same_weights(folder, two_processes)


def test_two_nodes_of_the_trainer_s_own(start, tmp_path, two_processes):
    nodes = [
        start(
            *("trainer.num_nodes=2", "trainer.devices=1", "trainer.max_epochs=3"),
            env={"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"},
        )
        for rank in (0, 1)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0], (tmp_path / "runs.log").read_text()
    (folder,) = (tmp_path / "runs/demo_teacher").iterdir()
    assert_same_weights(folder, two_processes)


@pytest.fixture
def slurm(tmp_path):
    """The variables that srun sets for one of two tasks, and a `scontrol` that notes its calls."""
    programs = tmp_path / "programs"
    programs.mkdir()
    calls = tmp_path / "scontrol.log"
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    (programs / "scontrol").chmod(0o755)

    def task(rank, restarts=0):
        variables = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "4242",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_NNODES": "1",
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
        }
        return variables | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})

    task.calls = calls
    return task


def test_srun_s_warning_saves_queues_again_and_the_job_goes_on(
    start, slurm, tmp_path, two_processes
):
    logged = ("trainer.max_epochs=3", "logger=wandb", "callbacks.last.every_minutes=1e-9")
    runs = tmp_path / "runs" / "demo_teacher"
    tasks = [start(*logged, env=slurm(rank)) for rank in (0, 1)]
    wait_until(lambda: list(runs.glob("*/samples/step_*.png")), tasks[0])
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    sent = time.monotonic()
    codes = [task.wait(timeout=60) for task in tasks]
    assert time.monotonic() - sent < 30
    assert codes == [128 + signal.SIGUSR1, 0], (tmp_path / "runs.log").read_text()
    assert slurm.calls.read_text() == "requeue 4242\n"
    assert "SLURM has queued the job again" in (tmp_path / "runs.log").read_text()
    (folder,) = runs.iterdir()
    assert weights(folder)["global_step"] < weights(two_processes)["global_step"]
    tasks = [start(*logged, env=slurm(rank, restarts=1)) for rank in (0, 1)]
    assert [task.wait(timeout=300) for task in tasks] == [0, 0], (tmp_path / "runs.log").read_text()
    assert list(runs.iterdir()) == [folder]
    assert_same_weights(folder, two_processes)
    assert results(folder)["job"] == "slurm 4242"
    names = [path.name for path in folder.glob("wandb/offline-run-*")]
    assert len(names) == 2, "one by each start, not by each process"
    assert len({name.rsplit("-", 1)[1] for name in names}) == 1, "the same run"


@pytest.mark.parametrize("devices", [1, 2])
def test_ten_kills_at_random_moments_change_nothing(start, tmp_path, devices):
    settings = (
        *(f"trainer.devices={devices}", "trainer.max_epochs=12", "datamodule.num_workers=1"),
        "callbacks.last.every_minutes=1e-9",
    )
    process = start(*settings, name="straight")
    assert process.wait(timeout=300) == 0
    (straight,) = (tmp_path / "straight/demo_teacher").iterdir()
    runs = tmp_path / "runs" / "demo_teacher"
    last = runs / "*" / "checkpoints" / "last.ckpt"
    moments = random.Random(devices)
    steps = []
    for kill in range(10):
        process = start(*settings, *(["resume=latest"] if kill else []))
        begun = time.time()

        def saved(begun=begun):
            return [p for p in runs.glob(str(last.relative_to(runs))) if p.stat().st_mtime > begun]

        wait_until(saved, process)
        # Steps, validations, checkpoints and logs take some hundredths of a second each.
        time.sleep(moments.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (folder,) = runs.iterdir()
        steps.append(weights(folder)["global_step"])
    assert steps == sorted(steps)
    assert steps[0] < steps[-1] < weights(straight)["global_step"], "it was killed on its way"
    process = start(*settings, "resume=latest")
    assert process.wait(timeout=300) == 0, (tmp_path / "runs.log").read_text()
    assert_same_weights(folder, straight)
    assert results(folder)["test"] == results(straight)["test"]
    assert not list(folder.rglob(".*.part"))


def test_two_processes_cannot_share_a_run_folder(start, run, tmp_path):
    process = start("trainer.max_epochs=500")
    runs = tmp_path / "runs" / "demo_teacher"
    wait_until(lambda: list(runs.glob("*/checkpoints/last.ckpt")), process)
    (folder,) = runs.iterdir()
    said = run(f"resume={folder}", name="second", code=2)
    assert f"Another process is writing to {folder}" in said
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, "and nothing has happened to it"
    assert weights(folder)["global_step"] > 0
    run(f"resume={folder}", "trainer.max_epochs=1", name="third")
