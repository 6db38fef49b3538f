"""What a run shows of itself in W&B, read back from its offline folder, and elsewhere."""

import csv
import json
import math
import re
import struct
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from common.errors import UserError
from common.runs import read_results
from lightning_modules import DiffusionSegmentation
from tasks import fit
from tasks import test as test_task
from tasks.training import build_trainer, name_wandb_run

ROOT = Path(__file__).resolve().parent.parent
FAST = (
    *("experiment=demo_teacher", "debug=fast", "logger=wandb", "datamodule.num_samples=20"),
    *("datamodule.image_size=16", "trainer.max_epochs=2", "trainer.limit_train_batches=3"),
    *("callbacks.non_finite.action=skip", "sweep_name=together"),
)
# Of a row, and of W&B's own.
PLACES = {"step", "epoch", "trainer/global_step", "_step", "_runtime", "_timestamp"}
# Seconds to wait for the end of a run's records.
PATIENCE = 60


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def read_records(folder):
    """Yield the records of the one offline run in a run folder, oldest first."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    # The log format of LevelDB after seven bytes of W&B's: blocks with pieces of records.
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(record)
            record = b""


def read_run(folder):
    """Return the records of an offline run that has ended by kind."""
    # W&B's own process may write the last ones a moment after the run has ended.
    for _ in range(PATIENCE):
        found = defaultdict(list)
        for record in read_records(folder):
            kind = record.WhichOneof("record_type")
            found[kind].append(getattr(record, kind))
        if found["exit"]:
            return found
        time.sleep(1)
    raise AssertionError(f"The run in {folder} has no end.")


def read_config(records):
    updates = [item for record in records["config"] for item in record.update]
    return {item.key: json.loads(item.value_json) for item in updates}


def read_history(records):
    """Return the values of each scalar, oldest first."""
    values = defaultdict(list)
    for row in records["history"]:
        for item in row.item:
            if len(item.nested_key) == 1 and item.nested_key[0] not in PLACES:
                values[item.nested_key[0]].append(float(json.loads(item.value_json)))
    return values


@pytest.fixture(scope="module")
def _trained():
    return []


@pytest.fixture
def trained(make_config, _trained, tmp_path):
    """A run with every logger, made once for all tests: its folder, config and records."""
    if not _trained:
        config = make_config(*FAST, "logger.wandb.log_model=true")
        others = make_config(*FAST, "logger=tensorboard")["logger"]
        config["logger"]["tensorboard"] = others["tensorboard"]
        fit.run(config)
        folder = tmp_path / "run"
        _trained.append(SimpleNamespace(folder=folder, config=config, records=read_run(folder)))
    return _trained[0]


def test_the_whole_config_is_shown_with_its_origin(trained):
    shown = read_config(trained.records)
    results = read_results(trained.folder)
    assert shown["seed"] == 0
    assert shown["network"] == trained.config["network"]
    assert shown["network"]["kwargs"]["dim_x"] == 8
    assert shown["lightning_module"] == trained.config["lightning_module"]
    assert trained.config.keys() <= shown.keys()
    assert shown["run_folder"] == str(trained.folder)
    for key in ("revision", "command"):
        assert shown[key] == results[key]


def test_all_loggers_show_the_same_values(trained):
    with (trained.folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {key: [float(row[key]) for row in rows if row[key]] for key in rows[0].keys() - PLACES}
    history = read_history(trained.records)
    events = EventAccumulator(str(trained.folder / "tensorboard")).Reload()
    board = {
        key: [event.value for event in events.Scalars(key)]
        for key in set(events.Tags()["scalars"]) - PLACES
    }
    assert table.keys() == history.keys() == board.keys()
    assert {
        *("train/loss", "train/loss/l2", "train/loss/boundary", "train/lr", "train/grad_norm"),
        *("train/images_per_second", "train/skipped", "system/memory_gb"),
        *("val/loss", "val/dice", "test/loss", "test/dice"),
    } <= table.keys()
    assert len(table["train/loss"]) == 6
    for key, values in table.items():
        assert history[key] == pytest.approx(values, rel=1e-6, nan_ok=True)
        assert board[key] == pytest.approx(values, rel=1e-6, nan_ok=True)


def test_tensorboard_shows_the_config_as_text(trained):
    events = EventAccumulator(str(trained.folder / "tensorboard")).Reload()
    (text,) = events.Tensors("config/text_summary")
    assert f"run_folder: {trained.folder}" in text.tensor_proto.string_val[0].decode()
    assert list((trained.folder / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(("part", "count"), [("val", 2), ("test", 1)])
def test_the_pictures_of_samples_are_a_table(trained, part, count):
    shown = trained.folder.glob(f"wandb/offline-run-*/files/media/table/{part}/*.table.json")
    assert len(list(shown)) == count
    artifacts = [a for a in trained.records["artifact"] if f"{part}samples" in a.name]
    assert len(artifacts) == count
    for artifact in artifacts:
        files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        assert all(path.is_relative_to(trained.folder) for path in files.values())
        table = json.loads(files[f"{part}/samples.table.json"].read_text())
        assert table["columns"] == ["id", "image", "truth", "sample", "overlay"]
        assert len(table["data"]) == 2
        for sample, *cells in table["data"]:
            assert sample.startswith("synthetic_")
            for cell in cells:
                with Image.open(files[cell["path"]]) as image:
                    assert image.size == (128, 128)


def test_a_run_has_its_group_machine_and_code(trained):
    (run,) = trained.records["run"]
    assert (run.project, run.display_name) == ("dermodistill", "demo_teacher")
    assert run.run_group == "together"
    assert trained.records["stats"]
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", trained.records["environment"][0].git.commit)
    assert trained.records["exit"][0].exit_code == 0


def test_the_best_checkpoint_is_an_artifact_with_its_scores(trained):
    (model,) = [a for a in trained.records["artifact"] if a.type == "model"]
    assert model.name == "demo_teacher"
    (entry,) = model.manifest.contents
    assert entry.path == "best.ckpt"
    best = (trained.folder / "checkpoints/best.ckpt").read_bytes()
    assert Path(entry.local_path).read_bytes() == best
    metadata, results = json.loads(model.metadata), read_results(trained.folder)
    assert metadata["test"]["test/dice"] == results["test"]["test/dice"]
    assert metadata["val"].keys() == results["val"].keys()
    assert not any(isinstance(v, float) and math.isnan(v) for v in metadata["test"].values())


def test_what_follows_in_the_same_process_is_another_run(trained, make_config, tmp_path):
    best = trained.folder / "checkpoints" / "best.ckpt"
    place = f"hydra.runtime.output_dir={tmp_path}/tested"
    config = make_config("task=test", f"checkpoint={best}", place, "trainer.accelerator=cpu")
    test_task.run(config)
    records = read_run(tmp_path / "tested")
    history = read_history(records)
    assert "test/dice" in history
    assert "train/loss" not in history
    assert records["run"][0].run_id != trained.records["run"][0].run_id
    assert not [a for a in records["artifact"] if a.type == "model"]


def test_a_failed_run_is_shown_as_one(make_config, tmp_path, monkeypatch):
    def fail(*args):
        raise UserError("no")

    monkeypatch.setattr(DiffusionSegmentation, "training_step", fail)
    with pytest.raises(UserError, match="no"):
        fit.run(make_config(*FAST, "logger.wandb.log_model=true"))
    records = read_run(tmp_path / "run")
    assert records["exit"][0].exit_code == 1
    assert not records["artifact"]


def test_an_agent_chooses_the_id(make_config, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    config = make_config(*FAST)
    name_wandb_run(config)
    own = config["logger"]["wandb"]["id"]
    assert re.fullmatch("[0-9a-f]{8}", own)
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    name_wandb_run(config)
    assert config["logger"]["wandb"]["id"] == own, "a resumed run keeps it"
    config["logger"]["wandb"]["id"] = None
    name_wandb_run(config)
    assert config["logger"]["wandb"]["id"] == "chosen"


def test_only_the_best_checkpoint_can_be_an_artifact(make_config):
    with pytest.raises(UserError, match="logger.wandb.log_model=all does not exist"):
        build_trainer(make_config(*FAST, "logger.wandb.log_model=all"))
