"""Reference checkpoints give the outputs that the references got; nothing foreign is executed."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import UserError
from tasks import import_weights
from tasks import predict as predict_task
from tasks.checkpoints import load_checkpoint, network_from_checkpoint
from tasks.teachers import load_teacher

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "dermosegdiff"
FILES = {
    "teacher": "n-tiny_t_s-16_b-64_t-20_sc-linear_best.pth",
    "student": "n-tiny_s_s-16_b-64_t-20_sc-linear_best_best.pth",
}
HARMLESS = import_weights._HARMLESS


@pytest.fixture
def import_file(make_config, tmp_path):
    """Imports a file; returns the path of what it has become."""

    def run(source, *overrides):
        config = make_config("task=import_weights", f"source={source}", *overrides)
        import_weights.run(config)
        return tmp_path / "run" / "checkpoints" / "best.ckpt"

    return run


def reference(name):
    with torch.serialization.safe_globals(HARMLESS):
        return torch.load(GOLDEN / FILES[name], weights_only=True)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("weights", ["ema", "online"])
def test_outputs_are_the_stored_ones(import_file, golden, name, weights):
    path = import_file(GOLDEN / FILES[name])
    network = network_from_checkpoint(load_checkpoint(path), path, weights, "checkpoint")
    values = golden(f"ckpt_{name}_expected")
    with torch.no_grad():
        output = network(values["x"], values["g"], values["t"])
    torch.testing.assert_close(output, values[f"y_{weights}"], rtol=1e-5, atol=1e-6)
    other = values["y_online" if weights == "ema" else "y_ema"]
    assert (output - other).abs().max() > 1e-4, "the two weights differ"


def test_schedule_and_size_come_from_the_config_or_the_files_name(import_file):
    student = load_checkpoint(import_file(GOLDEN / FILES["student"]))["config"]
    stored = yaml.safe_load((GOLDEN / "ckpt_student_config.yaml").read_text())
    assert student["datamodule"]["image_size"] == 16
    assert student["schedule"]["num_timesteps"] == student["sampler"]["num_steps"] == 20
    assert student["schedule"]["beta_start"] == stored["diffusion"]["schedule"]["beta_start"]
    assert student["schedule"]["beta_end"] == 0.3
    assert student["sampler"]["ensemble"] == 2
    assert student["datamodule"]["antialias"] is False
    teacher = load_checkpoint(import_file(GOLDEN / FILES["teacher"]))["config"]
    assert teacher["schedule"]["num_timesteps"] == 20
    assert teacher["schedule"]["beta_end"] == 0.08, "the file does not say it"
    told = import_file(
        GOLDEN / FILES["teacher"], f"reference_config={GOLDEN / 'ckpt_teacher_config.yaml'}"
    )
    assert load_checkpoint(told)["config"]["schedule"]["beta_end"] == 0.3
    chosen = import_file(GOLDEN / FILES["student"], "schedule.beta_end=0.2")
    assert load_checkpoint(chosen)["config"]["schedule"]["beta_end"] == 0.2


def test_images_are_prepared_as_in_the_reference_on_any_dataset(import_file):
    overrides = ("datamodule=isic2018", "datamodule.edges=border")
    data = load_checkpoint(import_file(GOLDEN / FILES["student"], *overrides))["config"][
        "datamodule"
    ]
    found = {key: data[key] for key in ("name", "image_size", "mask_resize", "edges")}
    assert found == {
        "name": "ISIC2018",
        "image_size": 16,
        "mask_resize": "published",
        "edges": "border",
    }
    assert data["antialias"] is False


def rearranged(form):
    """Return the teacher's checkpoint as other repositories and versions write it."""
    checkpoint = reference("teacher")
    ema = checkpoint["ema"]
    if form == "data parallel":
        checkpoint["ema"] = {
            key.replace("model.", "model.module.", 1): value for key, value in ema.items()
        }
    elif form == "newer ema_pytorch":
        ema["initted"], ema["step"] = ema["initted"][0] > 0, ema["step"][0]
    elif form == "no average":
        checkpoint["ema"] = None
    elif form == "average only":
        del checkpoint["model"]
    elif form == "weights only":
        return checkpoint["model"]
    return checkpoint


@pytest.mark.parametrize(
    "form",
    ["data parallel", "newer ema_pytorch", "no average", "average only", "weights only"],
)
def test_every_form_is_understood(import_file, golden, tmp_path, form):
    torch.save(rearranged(form), tmp_path / "t_s-16_b-1_t-20_sc-linear.pth")
    path = import_file(tmp_path / "t_s-16_b-1_t-20_sc-linear.pth")
    values = golden("ckpt_teacher_expected")
    for weights in ("ema", "online"):
        network = network_from_checkpoint(load_checkpoint(path), path, weights, "checkpoint")
        output = network(values["x"], values["g"], values["t"])
        one = {"no average": "online", "weights only": "online"}.get(form, weights)
        torch.testing.assert_close(output, values[f"y_{one}"], rtol=1e-5, atol=1e-6)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_malicious_file_is_refused_and_not_executed(import_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = reference("teacher") | {"extra": Malicious()}
    torch.save(checkpoint, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="holds more than tensors and numbers, and was not exec"):
        import_file(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"weight": torch.zeros(3)}}, "not those of a reference network"),
        ({"epoch": 3}, "neither model nor ema"),
        ([1, 2], "holds no weights but list"),
    ],
)
def test_other_files_are_named(import_file, tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        import_file(tmp_path / "other.pth")


def test_missing_and_damaged_files_are_named(import_file, make_config, tmp_path):
    with pytest.raises(UserError, match="task=import_weights needs source"):
        import_weights.run(make_config("task=import_weights"))
    with pytest.raises(UserError, match="does not exist"):
        import_file(tmp_path / "nowhere.pth")
    (tmp_path / "cut.pth").write_bytes((GOLDEN / FILES["teacher"]).read_bytes()[:2000])
    with pytest.raises(UserError, match="damaged"):
        import_file(tmp_path / "cut.pth")


def test_an_imported_network_predicts_and_teaches(import_file, make_config, pairs, tmp_path):
    path = import_file(GOLDEN / FILES["student"]).rename(tmp_path / "student.ckpt")
    pairs(tmp_path / "photos", None, ["a", "b"])
    config = make_config(
        "task=predict",
        f"checkpoint={path}",
        f"input={tmp_path / 'photos'}",
        f"output={tmp_path / 'masks'}",
        "trainer.accelerator=cpu",
        "num_workers=0",
        "sampler=ddim",
        "sampler.num_steps=2",
    )
    predict_task.run(config)
    assert (tmp_path / "masks" / "b_mask.png").is_file()
    config = make_config(
        "experiment=demo_efkd",
        f"teacher.checkpoint={path}",
        "datamodule.image_size=16",
        *(f"schedule.{k}" for k in ("num_timesteps=20", "beta_start=0.001", "beta_end=0.3")),
    )
    teacher, description = load_teacher(config)
    assert teacher.objective == "noise"
    assert description["network"]["params"] == 19333
