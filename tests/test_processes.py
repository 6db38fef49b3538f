"""Several processes and signals on the command line: equal results, nothing half-written."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.synthetic import synthesise_lesion
from tasks.statistics import read_images
from tiny_runs import TINY, timeless

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    *TINY,
    "datamodule.num_samples=57",
    "datamodule.num_workers=1",
    "callbacks.plateau.patience=0",
)
pytestmark = pytest.mark.slow


def start(tmp_path, name, *overrides, settings=SMALL):
    runs = tmp_path / name
    places = (f"paths.runs={runs}", f"paths.cache={tmp_path}/cache")
    command = [sys.executable, str(ROOT / "run.py"), *settings, *places, *overrides]
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
    files = [(folder / name).read_text() for name in ("test_images.csv", "splits.csv")]
    return tensors, [timeless(folder / "metrics.csv"), *files]


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
        tables.append(read_images(folder))
    one, several = results
    assert one.keys() == several.keys() >= {"test/loss", "test/loss/l2", "test/dice"}
    for key, value in one.items():
        assert several[key] == pytest.approx(value, rel=1e-6 if "loss" in key else 1e-4)
    assert len(tables[0]) == 11
    assert list(tables[1]) == list(tables[0])
    for image, values in tables[0].items():
        assert tables[1][image] == pytest.approx(values, rel=1e-3, abs=1e-6)


def test_every_stage_of_a_distillation_in_one_pass_on_two_processes(tmp_path):
    small = (
        *("network=deeplabv3plus_resnet18", "network.weights=null", "datamodule=synthetic"),
        *("datamodule.num_samples=28", "datamodule.image_size=32", "datamodule.batch_size=2"),
        *("datamodule.num_workers=0", "augmentation=flips", "trainer.accelerator=cpu"),
        *("trainer.max_epochs=1", "trainer.devices=2", "logger=csv"),
        *("~datamodule.split", "trainer.enable_progress_bar=false"),
    )
    teacher, folders = (), []
    for stage in ("teacher", "aux", "kd"):
        settings = (f"experiment=deeplab_{stage}_isic2018", *small, *teacher)
        process, log, runs = start(tmp_path, stage, settings=settings)
        assert process.wait(timeout=300) == 0, log.read_text()
        (folder,) = runs.glob("*/*")
        folders.append(folder)
        teacher = (f"teacher.checkpoint={folder}/checkpoints/best.ckpt",)
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert {r["status"] for r in results} == {"finished"}
    assert results[0]["test"]["test/dice"] == pytest.approx(results[1]["test"]["test/dice"])
    assert {"val/loss/auxiliary_kd", "val/loss/logit_kd"} <= set(results[2]["val"])
    states = [
        torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        for folder in folders
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert len(read_images(folders[2])) == results[2]["tested_images"]


def test_predicting_on_several_processes_is_predicting_on_one(tmp_path):
    trained = run(tmp_path, "trained", "trainer.max_epochs=1")
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(6):
        image, _ = synthesise_lesion(0, index)
        Image.fromarray(image).resize((90 + index, 60)).save(photos / f"photo_{index}.png")
    (photos / "broken.png").write_bytes((photos / "photo_0.png").read_bytes()[:500])
    tables = []
    for devices in (1, 2):
        overrides = (
            "task=predict",
            f"trainer.devices={devices}",
            f"checkpoint={trained}/checkpoints/best.ckpt",
            f"input={photos}",
            f"output={tmp_path}/{devices}",
            "trainer.accelerator=cpu",
            "sampler.num_steps=2",
            "sampler.ensemble=2",
        )
        process, log, _ = start(tmp_path, f"predict{devices}", *overrides, settings=())
        assert process.wait(timeout=300) == 2, "the exit code says that one could not be read"
        assert "1 of 7 photographs could not be predicted, first " in " ".join(
            log.read_text().split()
        )
        with (tmp_path / str(devices) / "predictions.csv").open(newline="") as file:
            tables.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert [row["name"] for row in tables[0]] == ["broken", *(f"photo_{i}" for i in range(6))]
    names = [sorted(p.name for p in (tmp_path / str(n)).iterdir()) for n in (1, 2)]
    assert names[0] == names[1]
    assert len(names[0]) == 6 * 4 + 1
    for first, second in zip(*tables, strict=True):
        assert first["file"] == second["file"]
        for column in ("lesion_pixels", "expected_dice", "mean_uncertainty"):
            one, other = (float(row[column] or 0) for row in (first, second))
            assert other == pytest.approx(one, rel=1e-3)
    for path in (tmp_path / "1").glob("*.png"):
        with Image.open(path) as one, Image.open(tmp_path / "2" / path.name) as other:
            apart = np.asarray(one).astype(int) - np.asarray(other)
        assert np.abs(apart).mean() < 0.1


@pytest.mark.parametrize(
    ("devices", "signum"), [(1, signal.SIGTERM), (1, signal.SIGKILL), (2, signal.SIGKILL)]
)
def test_a_prediction_that_was_stopped_goes_on(tmp_path, straight, devices, signum):
    trained = straight("trainer.devices=1", "trainer.max_epochs=1")
    for index in range(30):
        image, _ = synthesise_lesion(0, index)
        path = tmp_path / "photos" / f"p{index % 2}" / f"photo_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    tables = []
    for name, stopped in (("whole", False), ("stopped", True)):
        overrides = (
            *("task=predict", f"trainer.devices={devices}", "trainer.accelerator=cpu"),
            *(f"checkpoint={trained}/checkpoints/best.ckpt", f"input={tmp_path}/photos"),
            *(f"output={tmp_path}/out_{name}", "skip_existing=true", "sampler.num_steps=2"),
        )
        table = tmp_path / f"out_{name}" / "predictions.csv"
        process, log, _ = start(tmp_path, name, *overrides, settings=())
        if stopped:
            deadline = time.monotonic() + 120
            while not table.is_file() or len(table.read_text().splitlines()) < 6:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.killpg(process.pid, signum)
            code = -signum if signum == signal.SIGKILL else 128 + signum
            assert process.wait(timeout=60) == code, log.read_text()
            assert "Traceback" not in log.read_text()
            rows = list(csv.DictReader(table.read_text().splitlines()))
            assert 5 <= len(rows) < 30
            for row in rows[:-1]:
                assert (table.parent / f"{row['name']}_mask.png").is_file()
            process, log, _ = start(tmp_path, name, *overrides, settings=())
        assert process.wait(timeout=300) == 0, log.read_text()
        with table.open(newline="") as file:
            tables.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert len(tables[0]) == 30
    assert tables[1] == tables[0]
    assert len(list((tmp_path / "out_stopped").rglob("*.*"))) == 30 * 4 + 1


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
