"""Diagnosis from table to table: every experiment, and what can be done with what it leaves."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datamodules import ISIC2019, HAM10000Diagnosis
from datamodules.synthetic import synthesise_lesion
from tasks import benchmark, compare, export, fit, predict, report
from tasks import test as test_task
from tasks.build import build_network, complete
from tasks.statistics import read_predictions

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("datamodule.image_size=32", "datamodule.num_workers=0", "logger=csv")
QUICK = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
PAIRS = {
    "classifier_teacher": None,
    "classifier_raw": None,
    "d_kd": "classifier_teacher",
    "ssd_head": "classifier_teacher",
    "ssd_kd": "ssd_head",
}
DATASETS = {"isic2019": ISIC2019, "ham10000": HAM10000Diagnosis}
EXPERIMENTS = [f"{name}_{data}" for data in DATASETS for name in PAIRS]
FIGURES = {f"figures/{name}.png" for name in ("confusion_matrix", "roc", "reliability")}
EACH = 10


def tinted(index, label):
    """Return a made-up photograph whose colour tells its class."""
    image, _ = synthesise_lesion(3, index)
    tint = np.array([label % 2, label // 2 % 2, label // 4 % 2]) * 0.5 + 0.25
    return Image.fromarray((image * 0.4 + 255 * 0.6 * tint).astype(np.uint8)).resize((48, 40))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with ISIC 2019 and HAM10000 as published, ten images of each class."""
    data = tmp_path_factory.mktemp("data")
    write_isic2019(data / "isic2019")
    write_ham10000(data / "ham10000")
    return data


def write_isic2019(root):
    columns = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
    images = root / "ISIC_2019_Training_Input"
    images.mkdir(parents=True)
    truth = [",".join(["image", *columns])]
    patients = ["image,age_approx,anatom_site_general,lesion_id,sex"]
    for index in range(8 * EACH):
        name, label = f"ISIC_{index:07d}", index % 8
        tinted(index, label).save(images / f"{name}.jpg", quality=95)
        hot = ("1.0" if column == ISIC2019.classes[label] else "0.0" for column in columns)
        truth.append(",".join([name, *hot]))
        patients.append(f"{name},{30 + label}.0,head/neck,,{'female' if index % 2 else ''}")
    (root / "ISIC_2019_Training_GroundTruth.csv").write_text("\n".join(truth))
    (root / "ISIC_2019_Training_Metadata.csv").write_text("\n".join(patients))


def write_ham10000(root):
    classes = HAM10000Diagnosis.classes
    images = root / "HAM10000_images_part_1"
    images.mkdir(parents=True)
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for index in range(7 * EACH):
        name, label = f"ISIC_{index:07d}", index % 7
        tinted(index, label).save(images / f"{name}.jpg", quality=95)
        rows.append(f"HAM_{index},{name},{classes[label]},histo,50.0,male,back")
    (root / "HAM10000_metadata.csv").write_text("\n".join(rows))


@pytest.fixture
def train(make_config, data, tmp_path):
    """Runs an experiment into a folder of `paths.runs`; returns that."""

    def run(experiment, *overrides, fast=True):
        folder = tmp_path / "runs" / experiment / "now"
        config = make_config(
            f"experiment={experiment}",
            *(["debug=fast"] if fast else []),
            *SMALL,
            *QUICK,
            f"paths.data={data}",
            f"hydra.runtime.output_dir={folder}",
            *overrides,
        )
        fit.run(config)
        return folder

    return run


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Checkpoints of teachers by experiment, each trained once for all tests, and their place."""
    return {"folder": tmp_path_factory.mktemp("teachers")}


def teacher_of(experiment, train, teachers):
    name, data = experiment.rsplit("_", 1)
    if PAIRS[name] is None:
        return []
    teacher = f"{PAIRS[name]}_{data}"
    if teacher not in teachers:
        folder = train(teacher, *teacher_of(teacher, train, teachers))
        teachers[teacher] = teachers["folder"] / f"{teacher}.ckpt"
        shutil.copy(folder / "checkpoints" / "best.ckpt", teachers[teacher])
    return [f"teacher.checkpoint={teachers[teacher]}"]


def read_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_are_the_published_recipes(experiment, make_config):
    name, data = experiment.rsplit("_", 1)
    config = make_config(f"experiment={experiment}")
    complete(config)
    module, callbacks, optimizer = (
        config["lightning_module"],
        config["callbacks"],
        config["lightning_module"]["optimizer"],
    )
    student = name in ("classifier_raw", "d_kd", "ssd_kd")
    turned = name.startswith("ssd")
    count = len(DATASETS[data].classes)
    with torch.device("meta"):
        network = build_network(config["network"])
    published = (2_223_872 + 1281 * count) if student else (23_508_032 + 2049 * count)
    assert sum(p.numel() for p in network.parameters()) == published
    assert not optimizer.pop("fused")
    assert optimizer == {"name": "SGD", "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-3}
    assert config["trainer"]["max_epochs"] == (60 if name == "ssd_head" else 150)
    assert config["datamodule"]["batch_size"] == (32 if turned else 128)
    assert config["datamodule"]["views"] == turned
    assert (config["datamodule"]["image_size"], config["datamodule"]["antialias"]) == (
        224,
        "pillow",
    )
    assert config["datamodule"]["normalization"] == "imagenet"
    assert config["augmentation"] == make_config("augmentation=ssd_kd")["augmentation"]
    assert callbacks["ema"] is None
    assert callbacks["early_stopping"]["patience"] == 15
    ties = "first" if turned else "later"
    assert callbacks["early_stopping"]["ties"] == callbacks["best"]["ties"] == ties
    assert config["network"]["weights"] == (None if name == "ssd_head" else "imagenet")
    assert module["classes"] == list(DATASETS[data].classes)
    assert module["weighted"] is True
    if name == "ssd_head":
        assert callbacks["plateau"] is None
        assert (callbacks["steps"]["milestones"], callbacks["steps"]["factor"]) == ([30, 45], 0.1)
        assert (callbacks["best"]["monitor"], callbacks["best"]["mode"]) == ("val/loss", "min")
    else:
        plateau = {k: v for k, v in callbacks["plateau"].items() if k != "_target_"}
        late = name != "ssd_kd"
        assert plateau == {"factor": 0.1, "patience": 10, "min_lr": 1e-6, "late": late}
        assert callbacks["best"]["monitor"] == "val/balanced_accuracy"
        assert callbacks["best"]["mode"] == "max"
    wanted = PAIRS[name] and f"{PAIRS[name]}_{data}"
    assert config["teacher"]["experiment"] == wanted


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_and_leaves_its_records(experiment, train, teachers):
    folder = train(experiment, *teacher_of(experiment, train, teachers))
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left == {
        *("config.yaml", "splits.csv", "metrics.csv", "results.json"),
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt"),
        *("test_images.csv", "predictions.csv"),
        *FIGURES,
    }
    results = json.loads((folder / "results.json").read_text())
    assert (results["status"], results["calls_per_mask"]) == ("finished", 1)
    assert results["objective"] is results["sampler"] is None
    assert set(results["val"]) >= {"val/loss", "val/balanced_accuracy", "val/top2_accuracy"}
    assert set(results["test"]) >= {"test/accuracy", "test/balanced_accuracy", "test/f1"}
    assert set(results["baselines"]) == {"majority"}
    assert results["test_intervals"].keys() >= {"test/accuracy", "test/balanced_accuracy"}
    classes = DATASETS[experiment.rsplit("_", 1)[1]].classes
    rows = read_rows(folder / "predictions.csv")
    assert len(rows) == 2
    assert list(rows[0]) == ["id", "label", "predicted", "correct", "confidence", *classes]
    for name in ("best", "last"):
        checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        parts = {key.split(".")[0] for key in checkpoint["state_dict"]}
        added = {"d_kd": {"adapter"}, "ssd_head": {"projection"}}
        added["ssd_kd"] = {"adapter", "projection"}
        own = added.get(experiment.rsplit("_", 1)[0], set())
        assert parts == {"network", "class_weights", *own}
        assert checkpoint["config"]["lightning_module"]["classes"] == list(classes)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Trained teacher, raw and distilled students on the whole of the made-up ISIC 2019."""
    return {"folder": tmp_path_factory.mktemp("whole")}


ADAM = (
    "network.kwargs.architecture=shufflenet_v2_x0_5",
    "network.weights=null",
    "lightning_module.optimizer.name=Adam",
    "lightning_module.optimizer.lr=0.003",
    "~lightning_module.optimizer.momentum",
)
LEARN = (
    *ADAM,
    "augmentation=none",
    "datamodule.batch_size=8",
    "trainer.max_epochs=24",
    "trainer.check_val_every_n_epoch=8",
    "callbacks.plateau=null",
)
# Four views an image are learnt from in fewer epochs.
EPOCHS = {
    "ssd_head": ["trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2"],
    "ssd_kd": ["trainer.max_epochs=10", "trainer.check_val_every_n_epoch=5"],
}
# So few images carry the labels; relations of random features would drown them.
GENTLE = ("lightning_module.losses.drkd.weight=0.01", "lightning_module.losses.crkd.weight=1")


@pytest.fixture
def trained(whole, train, tmp_path):
    """The run folder of an experiment on ISIC 2019 that has really learnt; trained once."""

    def get(name):
        if name not in whole:
            more = []
            if PAIRS[name]:
                more = [f"teacher.checkpoint={get(PAIRS[name])}/checkpoints/best.ckpt"]
                more += EPOCHS.get(name, [])
            if name.endswith("_kd"):
                more += GENTLE
            folder = train(f"{name}_isic2019", *LEARN, *more, fast=False)
            whole[name] = shutil.copytree(folder, whole["folder"] / "runs" / name / "now")
        return whole[name]

    return get


def test_the_whole_way_from_the_tables_to_the_predictions(trained):
    folder = trained("classifier_teacher")
    results = json.loads((folder / "results.json").read_text())
    counts = [results["data"][f"n_{part}"] for part in ("train", "val", "test")]
    assert sum(counts) == 8 * EACH
    parts = {row["id"]: row["split"] for row in read_rows(folder / "splits.csv")}
    rows = read_rows(folder / "predictions.csv")
    assert {row["id"] for row in rows} == {key for key, part in parts.items() if part == "test"}
    assert len(rows) == counts[2]
    for row in rows:
        index = int(row["id"].removeprefix("ISIC_"))
        assert row["label"] == ISIC2019.classes[index % 8], "by name and not by place"
        chances = {name: float(row[name]) for name in ISIC2019.classes}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(chances, key=chances.get)
        assert int(row["correct"]) == (row["predicted"] == row["label"])
    accuracy = np.mean([int(row["correct"]) for row in rows])
    assert results["test"]["test/accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.5, "colours are easy"
    assert results["baselines"]["majority"] == pytest.approx(1 / 8)
    low, high = results["test_intervals"]["test/balanced_accuracy"]
    assert 0 < low <= results["test"]["test/balanced_accuracy"] <= high <= 1


def test_testing_again_gives_the_same_bits(trained, make_config, tmp_path, data):
    teacher = trained("classifier_teacher")
    test_task.run(
        make_config(
            "task=test",
            f"checkpoint={teacher}/checkpoints/best.ckpt",
            f"paths.data={data}",
            *("logger=csv", *QUICK),
        )
    )
    first, second = (
        json.loads((folder / "results.json").read_text()) for folder in (teacher, tmp_path / "run")
    )
    assert second["test"] == first["test"]
    assert second["test_intervals"] == first["test_intervals"]
    assert second["trained_as"] == "classifier_teacher_isic2019"
    tables = [(f / "predictions.csv").read_text() for f in (teacher, tmp_path / "run")]
    assert tables[0] == tables[1]


def test_students_learn_from_their_teachers(trained):
    for name in ("d_kd", "ssd_kd"):
        results = json.loads((trained(name) / "results.json").read_text())
        assert results["test"]["test/balanced_accuracy"] > 0.5
        assert results["teacher"]["balanced_accuracy"] > 0.5
        rows = read_rows(trained(name) / "metrics.csv")
        terms = {
            key for row in rows for key, value in row.items() if value and "train/loss/" in key
        }
        assert {"train/loss/kd", "train/loss/drkd", "train/loss/crkd"} <= terms
        assert ("train/loss/ss_kd" in terms) == (name == "ssd_kd")


def test_overfitting_drives_the_loss_down(train):
    folder = train(
        *("classifier_raw_isic2019", "debug=overfit", *ADAM, "trainer.max_epochs=120"),
        *("trainer.check_val_every_n_epoch=120", "datamodule.image_size=64"),
        fast=False,
    )
    results = json.loads((folder / "results.json").read_text())
    assert results["data"]["n_train"] == results["data"]["n_test"] == 8
    assert results["test"]["test/loss"] < 0.2
    assert results["test"]["test/accuracy"] == 1


def launch(tmp_path, data, *overrides):
    """Run the command line with two processes; return the run's folder."""
    runs = tmp_path / "two"
    command = [
        *(sys.executable, str(ROOT / "run.py"), *overrides, "logger=csv", *QUICK),
        *(f"paths.data={data}", f"paths.runs={runs}", f"paths.cache={tmp_path}/cache"),
        *("trainer.devices=2", "trainer.strategy=ddp", "trainer.limit_test_batches=1.0"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    (folder,) = runs.glob("*/*")
    return folder


@pytest.mark.slow
def test_two_processes_score_as_one(trained, data, tmp_path):
    one = trained("classifier_teacher")
    two = launch(tmp_path, data, "task=test", f"checkpoint={one}/checkpoints/best.ckpt")
    first, second = (json.loads((f / "results.json").read_text()) for f in (one, two))
    assert second["test"] == {k: pytest.approx(v, abs=1e-5) for k, v in first["test"].items()}
    tables = [
        [(row["id"], row["label"], row["predicted"]) for row in read_rows(f / "predictions.csv")]
        for f in (one, two)
    ]
    assert tables[0] == tables[1]
    assert {f"figures/{p.name}" for p in (two / "figures").iterdir()} == FIGURES


@pytest.mark.slow
def test_two_processes_train_a_student_on_views(train, teachers, make_config, data, tmp_path):
    teacher = teacher_of("ssd_kd_isic2019", train, teachers)
    two = launch(tmp_path, data, "experiment=ssd_kd_isic2019", "debug=fast", *SMALL, *teacher)
    config = make_config(
        *("task=test", f"checkpoint={two}/checkpoints/best.ckpt", f"paths.data={data}"),
        *("logger=csv", *QUICK, "trainer.limit_test_batches=1.0"),
    )
    test_task.run(config)
    tables = [
        {row["id"]: row for row in read_rows(folder / "predictions.csv")}
        for folder in (two, tmp_path / "run")
    ]
    assert tables[0].keys() == tables[1].keys()
    assert len(tables[0]) == json.loads((two / "results.json").read_text())["data"]["n_test"]
    for key, row in tables[0].items():
        for name in ISIC2019.classes:
            assert float(row[name]) == pytest.approx(float(tables[1][key][name]), abs=1e-5)


def test_photographs_are_diagnosed(trained, make_config, data, tmp_path):
    checkpoint = trained("classifier_teacher") / "checkpoints" / "best.ckpt"
    photos = tmp_path / "photos"
    photos.mkdir()
    kept = {row["id"]: row for row in read_rows(checkpoint.parent.parent / "predictions.csv")}
    for key in list(kept)[:4]:
        shutil.copy(data / "isic2019" / "ISIC_2019_Training_Input" / f"{key}.jpg", photos)
    (photos / "broken.jpg").write_bytes(b"no photograph")
    config = make_config(
        *("task=predict", f"checkpoint={checkpoint}", f"input={photos}"),
        *(f"output={tmp_path}/out", "num_workers=0", *QUICK),
    )
    with pytest.raises(UserError, match="1 of 5 photographs could not be predicted"):
        predict.run(config)
    rows = {row["name"]: row for row in read_rows(tmp_path / "out" / "predictions.csv")}
    assert rows["broken"]["error"]
    assert rows["broken"]["predicted"] == ""
    for key in list(kept)[:4]:
        row = rows[key]
        assert row["predicted"] == kept[key]["predicted"]
        for name in ISIC2019.classes:
            assert float(row[name]) == pytest.approx(float(kept[key][name]), abs=1e-4)
        assert (row["height"], row["width"]) == ("40", "48")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["predictions.csv"]

    (photos / "broken.jpg").unlink()
    before = (tmp_path / "out" / "predictions.csv").read_text()
    predict.run({**config, "skip_existing": True})
    assert (tmp_path / "out" / "predictions.csv").read_text() == before


def test_an_exported_classifier_diagnoses_the_same(trained, make_config, data, tmp_path, capsys):
    checkpoint = trained("classifier_teacher") / "checkpoints" / "best.ckpt"
    export.run(
        make_config(
            *("task=export", f"checkpoint={checkpoint}", f"output={tmp_path}/model.onnx"),
            *(f"paths.data={data}", "smaller=int8", "images=8"),
        )
    )
    printed = " ".join(capsys.readouterr().out.split())
    found = re.search(r"accuracy of 8 test images (\S+), of float32 (\S+),", printed)
    small, whole = map(float, found.groups())
    assert whole > 0.5
    assert small >= whole - 0.125, "of eight images one"
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert [output.name for output in session.get_outputs()] == ["probability"]
    photos = data / "isic2019" / "ISIC_2019_Training_Input"
    tables = []
    for name, model in (("torch", checkpoint), ("onnx", tmp_path / "model.onnx")):
        predict.run(
            make_config(
                *("task=predict", f"checkpoint={model}", f'input="{photos}/ISIC_000000*.jpg"'),
                *(f"output={tmp_path}/{name}", "num_workers=0", *QUICK),
            )
        )
        tables.append(read_rows(tmp_path / name / "predictions.csv"))
    for one, other in zip(*tables, strict=True):
        assert one["predicted"] == other["predicted"]
        for name in ISIC2019.classes:
            assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-4)
    assert (tmp_path / "model.int8.onnx").stat().st_size < (tmp_path / "model.onnx").stat().st_size


def test_runs_are_reported_and_compared(trained, make_config, whole, tmp_path, capsys):
    teacher, student = trained("classifier_teacher"), trained("d_kd")
    report.run(make_config("task=report", f"paths.runs={whole['folder']}/runs"))
    text = (tmp_path / "run" / "report.md").read_text()
    assert "## Diagnoses" in text
    assert "## Masks" not in text
    (header,) = (line for line in text.splitlines() if line.startswith("| experiment"))
    assert "balanced accuracy" in header
    value = json.loads((student / "results.json").read_text())["test"]["test/balanced_accuracy"]
    (row,) = (line for line in text.splitlines() if line.startswith("| d_kd_isic2019"))
    assert f"{value:.4f} (" in row
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2 + 3 * 2

    compare.run(make_config("task=compare", f"runs=[{teacher},{student}]"))
    (entry,) = json.loads((tmp_path / "run" / "comparison.json").read_text())
    score = entry["scores"]["balanced_accuracy"]
    assert score["second"] == pytest.approx(value)
    assert score["interval"][0] <= score["difference"] <= score["interval"][1]
    assert 0 < score["p"] <= 1
    assert score["images"] == len(read_predictions(student).ids)
    printed = capsys.readouterr().out
    assert "bootstrap p" in printed
    assert "recall/" not in printed, "those of single classes are in the file"
    assert (tmp_path / "run" / "comparison.png").is_file()


def test_a_classifier_is_measured(trained, make_config, tmp_path):
    checkpoint = trained("classifier_teacher") / "checkpoints" / "best.ckpt"
    settings = (
        "task=benchmark",
        "repeats=1",
        "datamodule.image_size=32",
        "trainer.accelerator=cpu",
    )
    benchmark.run(make_config(*settings, f"checkpoint={checkpoint}", "against=plain"))
    first, _ = json.loads((tmp_path / "run" / "benchmark.json").read_text())["networks"]
    assert (first["name"], first["calls_per_mask"]) == ("classifier_teacher_isic2019", 1)
    benchmark.run(make_config(*settings, "network=mobilenet_v2"))
    (row,) = json.loads((tmp_path / "run" / "benchmark.json").read_text())["networks"]
    assert row["params"] == 2_234_120
    assert row["call_s"] > 0


def test_metadata_is_learnt_from_and_then_needed(train, make_config, tmp_path):
    folder = train("classifier_raw_isic2019", "datamodule.metadata=true")
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["config"]["network"]["kwargs"]["metadata"] == 11
    assert any("metablock" in key for key in checkpoint["state_dict"])
    (tmp_path / "photo").mkdir()
    tinted(0, 0).save(tmp_path / "photo" / "a.jpg")
    for task, more in (("predict", [f"input={tmp_path}/photo"]), ("export", [])):
        config = make_config(f"task={task}", f"checkpoint={folder}/checkpoints/best.ckpt", *more)
        with pytest.raises(UserError, match="also needs 11 numbers of metadata"):
            {"predict": predict, "export": export}[task].run(config)


def test_what_does_not_fit_is_refused_before_the_data_is_read(train, teachers, make_config):
    teacher = teacher_of("d_kd_isic2019", train, teachers)
    with pytest.raises(UserError, match=r"learns from diagnoses, and .* has masks"):
        train("classifier_raw_isic2019", "datamodule=isic2018")
    with pytest.raises(UserError, match=r"learns from masks, and .* has diagnoses"):
        train("unet_raw_isic2018", "datamodule=isic2019")
    with pytest.raises(UserError, match=r"needs a network that makes class logits .*resnet50"):
        train("classifier_raw_isic2019", "network=unet")
    with pytest.raises(UserError, match=r"needs a network that makes a map"):
        train("unet_raw_isic2018", "network=mobilenet_v2")
    with pytest.raises(UserError, match=r"set datamodule.views=true"):
        train("ssd_head_isic2019", *teacher, "datamodule.views=false")
    with pytest.raises(UserError, match=r"trained with lightning_module.classes="):
        train("d_kd_ham10000", *teacher)
    with pytest.raises(UserError, match=r"was trained for classification, and the student is for"):
        train("unet_kd_isic2016", *teacher, "datamodule.normalization=imagenet")
    with pytest.raises(UserError, match="teacher.cached=true"):
        train("d_kd_isic2019", *teacher, "teacher.cached=true")


def test_diagnoses_need_no_experiment(make_config, data, tmp_path):
    chosen = ("datamodule=isic2019", "network=mobilenet_v2", "lightning_module=classification")
    config = make_config(*chosen, "debug=fast", *SMALL, *QUICK, f"paths.data={data}")
    fit.run(config)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["experiment"] == "classification-isic2019"
    assert results["best"]["monitor"] == "val/balanced_accuracy"
    assert 0 <= results["test"]["test/balanced_accuracy"] <= 1
