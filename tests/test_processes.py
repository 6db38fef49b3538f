"""Several processes and signals on the command line: equal results, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "experiment=demo_teacher",
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.enable_progress_bar=false",
    "datamodule.num_samples=57",
    "datamodule.batch_size=4",
    "datamodule.image_size=16",
    "datamodule.num_workers=1",
    "network.kwargs.dim_x_mults=[1,1]",
    "network.kwargs.dim_g_mults=[1,1]",
    "callbacks.ema.update_after_step=3",
    "callbacks.plateau.patience=0",
)
pytestmark = pytest.mark.slow


def start(tmp_path, name, *overrides):
    runs = tmp_path / name
    places = (f"paths.runs={runs}", f"paths.cache={tmp_path}/cache")
    command = [sys.executable, str(ROOT / "run.py"), *TINY, *places, *overrides]
    log = (tmp_path / f"{name}.log").open("a")
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True, text=True
    )
    return process, tmp_path / f"{name}.log", runs


def run(tmp_path, name, *overrides):
    process, log, runs = start(tmp_path, name, *overrides)
    assert process.wait(timeout=300) == 0, log.read_text()
    (folder,) = runs.glob("*/*")
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs that are never stopped, each trained once for all tests."""
    trained = {}

    def get(*overrides):
        if overrides not in trained:
            trained[overrides] = run(tmp_path_factory.mktemp("straight"), "runs", *overrides)
        return trained[overrides]

    return get


def wait_for_validations(runs, count, process):
    """Wait until so many epochs have been validated."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(runs.glob("*/*/samples/step_*.png"))) >= count:
            return
        time.sleep(0.05)
    raise AssertionError("it did not get that far")


def everything(folder):
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    tensors = {}
    for part in ("state_dict", "current_model_state", "averaging_state"):
        tensors |= {f"{part}/{key}": value for key, value in last[part].items()}
    (optimizer,) = last["optimizer_states"]
    for index, state in optimizer["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
    tensors["rate"] = torch.tensor(optimizer["param_groups"][0]["lr"], dtype=torch.float64)
    files = ("metrics.csv", "test_images.csv", "splits.csv")
    return tensors, [(folder / name).read_text() for name in files]


def assert_same(one, two):
    (tensors, files), (other_tensors, other_files) = everything(one), everything(two)
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(value, other_tensors[key]) for key, value in tensors.items())
    assert files == other_files


def assert_none_left(group):
    """All processes of a run end; those that the first one has launched may take a moment more."""
    deadline = time.monotonic() + 20
    while left := [p for p in Path("/proc").glob("[0-9]*") if _group(p) == group]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _group(process):
    try:
        fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[2])


@pytest.mark.parametrize("devices", [1, 2])
def test_resumed_is_as_never_stopped(tmp_path, straight, devices):
    overrides = (f"trainer.devices={devices}", "trainer.max_epochs=2")
    run(tmp_path, "stopped", overrides[0], "trainer.max_epochs=1")
    resumed = run(tmp_path, "stopped", *overrides, "resume=latest")
    assert_same(straight(*overrides), resumed)


@pytest.mark.parametrize("devices", [2, 3])
def test_testing_on_several_processes_is_testing_on_one(tmp_path, devices):
    trained = run(tmp_path, "trained", "trainer.max_epochs=1", f"trainer.devices={devices}")
    assert json.loads((trained / "results.json").read_text())["data"]["n_test"] == 11
    results, tables = [], []
    for count in (1, devices):
        folder = run(
            *(tmp_path, f"test{count}", "task=test", f"trainer.devices={count}"),
            f"checkpoint={trained}/checkpoints/best.ckpt",
        )
        results.append(json.loads((folder / "results.json").read_text())["test"])
        tables.append((folder / "test_images.csv").read_text())
    one, several = results
    assert one.keys() == several.keys() >= {"test/loss", "test/loss/l2", "test/dice"}
    for key, value in one.items():
        assert several[key] == pytest.approx(value, rel=1e-6 if "loss" in key else 1e-4)
    assert tables[0] == tables[1]
    assert tables[0].count("\n") == 1 + 11, "none of them twice"


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes_cleanly(tmp_path, straight, devices, signum):
    overrides = (f"trainer.devices={devices}", "trainer.max_epochs=8")
    process, log, runs = start(tmp_path, "stopped", *overrides)
    wait_for_validations(runs, 2, process)
    sent = time.monotonic()
    process.send_signal(signum)
    assert process.wait(timeout=60) == 128 + signum, log.read_text()
    assert time.monotonic() - sent < 30
    assert "goes on from here" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert_none_left(process.pid)
    (folder,) = runs.glob("*/*")
    assert json.loads((folder / "results.json").read_text())["status"] == "failed"
    assert not list(folder.rglob(".*.part")), "nothing half-written"
    resumed = run(tmp_path, "stopped", *overrides, f"resume={folder}")
    assert_same(straight(*overrides), resumed)


def test_a_terminal_s_interrupt_reaches_every_process_at_once(tmp_path):
    process, log, runs = start(tmp_path, "stopped", "trainer.devices=2", "trainer.max_epochs=99")
    wait_for_validations(runs, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert_none_left(process.pid)


@pytest.mark.parametrize("moment", range(4))
def test_a_killed_run_has_a_whole_checkpoint(tmp_path, straight, moment):
    overrides = ("trainer.devices=1", "trainer.max_epochs=8")
    process, _, runs = start(tmp_path, "stopped", *overrides)
    wait_for_validations(runs, 1 + moment, process)
    time.sleep(0.07 * moment)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had not ended by itself"
    (folder,) = runs.glob("*/*")
    for path in (folder / "checkpoints").glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["global_step"] > 0
    (folder / "checkpoints" / ".last.ckpt.abc.part").write_bytes(b"half of it")
    assert_same(straight(*overrides), run(tmp_path, "stopped", f"resume={folder}"))
    assert not list(folder.rglob(".*.part"))


def test_two_processes_and_a_resumed_run_are_one_run_in_wandb(tmp_path):
    common = ("logger=wandb", "trainer.devices=2")
    run(tmp_path, "w", *common, "trainer.max_epochs=1")
    folder = run(tmp_path, "w", *common, "trainer.max_epochs=2", "resume=latest")
    names = [path.name for path in folder.glob("wandb/offline-run-*")]
    assert len(names) == 2, "one by each command, not by each process"
    assert len({name.rsplit("-", 1)[1] for name in names}) == 1
