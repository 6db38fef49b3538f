"""Which teacher is taken, and when it is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import UserError
from datamodules.splits import fold_split, write_split
from tasks.build import build_network
from tasks.seen_images import Seen
from tasks.teachers import find_teachers, load_teacher


@pytest.fixture
def config(make_config):
    return make_config("experiment=demo_efkd", "datamodule.image_size=16")


def plain_diffusion(config):
    """What the teacher of a distillation was trained with."""
    method = dict(config["lightning_module"], name="DiffusionSegmentation")
    for key in ("snr_weighting", "efkd_target", "consistency_jump", "distil_until"):
        del method[key]
    method["losses"] = {"l2": {"weight": 1}}
    return {"lightning_module": method}


def write_run(
    config, name, dice=0.9, status="finished", debug=False, size=16, theirs=None, **changes
):
    theirs = theirs or plain_diffusion(config)
    folder = Path(config["paths"]["runs"]) / "demo_teacher" / name
    (folder / "checkpoints").mkdir(parents=True)
    data = {"name": "Synthetic", "image_size": size}
    results = {
        "schema": 1,
        "status": status,
        "debug": debug,
        "data": data,
        "test": {"test/dice": dice},
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(results))
    network = build_network(config["network"])
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    online = {key: value + 1 for key, value in state.items()}
    trained = {**config, **theirs}
    path = folder / "checkpoints" / "best.ckpt"
    torch.save({"state_dict": state, "current_model_state": online, "config": trained}, path)
    return path


def test_the_newest_fitting_run_is_taken(config):
    write_run(config, "2026-01-01")
    newest = write_run(config, "2026-01-02")
    write_run(config, "2026-01-03", status="running")
    write_run(config, "2026-01-04", status="failed")
    write_run(config, "2026-01-05", debug=True)
    write_run(config, "2026-01-06", size=32)
    write_run(config, "2026-01-07", data={"name": "ISIC2018", "image_size": 16})
    write_run(config, "2026-01-08").unlink()
    assert find_teachers(config) == [newest]


def test_runs_that_prepare_images_alike_come_first(config):
    for day, letterbox in ((1, True), (2, None), (3, True)):
        path = write_run(config, f"2026-01-0{day}")
        stored = {"datamodule": {"normalization": "minmax", "letterbox": letterbox}}
        (path.parents[1] / "config.yaml").write_text(yaml.safe_dump(stored))
    config["datamodule"]["letterbox"] = False
    assert find_teachers(config)[0].parents[1].name == "2026-01-02"
    config["datamodule"]["letterbox"] = True
    assert find_teachers(config)[0].parents[1].name == "2026-01-03"


def test_of_folders_of_one_name_the_known_images_come_first(config):
    config["datamodule"] |= {"name": "Folder", "root": "copy/skin"}
    config["datamodule"].pop("content_seed")
    config["data_label"] = "skin"
    data = {"name": "Folder", "image_size": 16, "label": "skin"}
    for day, digest in ((1, "a" * 16), (2, "b" * 16)):
        folder = write_run(config, f"2026-01-0{day}", data=data).parents[1]
        write_split(folder / "splits.csv", {"x": "train"}, {"x": digest})
        stored = {"datamodule": {"root": f"{day}/skin"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    for images, expected in ((["a" * 16], "2026-01-01"), (["c" * 16], "2026-01-02")):
        (found,) = find_teachers(config, find_images=lambda images=images: images)
        assert found.parents[1].name == expected


def test_a_teacher_that_is_not_finite_is_refused(config):
    path = write_run(config, "2026-01-01")
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] = torch.nan
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"teacher.checkpoint=.*best.ckpt .*in 1 tensor"):
        load_teacher(config)


def test_a_given_file_comes_first(config):
    write_run(config, "2026-01-01")
    config["teacher"]["checkpoint"] = "other.ckpt"
    assert [str(path) for path in find_teachers(config)] == ["other.ckpt"]


def test_none_is_an_error_with_the_command_that_makes_one(config):
    with pytest.raises(
        UserError, match=r"run.py experiment=demo_teacher .*datamodule.image_size=16"
    ):
        find_teachers(config)


def test_teacher_has_the_averaged_weights_unless_told_otherwise(config):
    write_run(config, "2026-01-01", dice=0.87)
    teacher, description = load_teacher(config)
    assert description["objective"] == teacher.objective == "x0"
    assert description["dice"] == 0.87
    config["teacher"]["weights"] = "online"
    online, _ = load_teacher(config)
    for key, value in teacher.network.state_dict().items():
        assert torch.equal(online.network.state_dict()[key], value + 1)


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("schedule", "num_timesteps", 100),
        ("schedule", "mode", "cosine"),
        ("datamodule", "image_size", 32),
        ("datamodule", "normalization", "imagenet"),
    ],
)
def test_a_teacher_trained_differently_is_refused(config, group, key, value):
    config["teacher"]["checkpoint"] = str(write_run(config, "2026-01-01"))
    config[group][key] = value
    with pytest.raises(UserError, match=rf"best.ckpt was trained with {group}.*{key}"):
        load_teacher(config)


ONE_PASS = {
    "lightning_module": {
        "name": "Segmentation",
        "losses": {"bce": {"weight": 1}},
        "optimizer": {"name": "Adam", "lr": 1e-3},
    },
    "network": {"name": "UNet", "kwargs": {"base_width": 4}},
    "schedule": {},
    "sampler": {},
}


def test_a_teacher_of_one_pass_has_no_objective_and_no_sampler(config):
    unet = {**config, "network": ONE_PASS["network"]}
    config["teacher"]["checkpoint"] = str(write_run(unet, "2026-01-01", theirs=ONE_PASS))
    teacher, description = load_teacher(config)
    assert description["objective"] is teacher.objective is None
    assert description["network"]["name"] == "UNet"
    image = torch.rand(2, 3, 16, 16)
    chance = teacher.predict({"image": image, "id": ["a", "b"]})["probability"]
    assert torch.equal(chance, teacher.network(image).sigmoid())
    config["teacher"]["sampler"] = {"num_steps": 3}
    with pytest.raises(UserError, match="teacher.sampler is given, and .* predicts in one pass"):
        load_teacher(config)


def test_a_teacher_may_be_sampled_in_another_way_than_it_was_tested(config):
    config["teacher"]["checkpoint"] = str(write_run(config, "2026-01-01"))
    assert load_teacher(config)[0].module.calls_per_mask == 1, "its own sampler"
    config["teacher"]["sampler"] = {"num_steps": 3, "ensemble": 2}
    sampler = load_teacher(config)[0].module.sampler
    assert type(sampler).__name__ == "DDIM"
    assert sampler.calls_per_mask == 6
    config["teacher"]["sampler"] = {"name": "DPMSolver", "num_steps": 2}
    sampler = load_teacher(config)[0].module.sampler
    assert type(sampler).__name__ == "DPMSolver"
    assert sampler.calls_per_mask == 2


def test_weights_that_do_not_fit_are_refused(config):
    path = write_run(config, "2026-01-01")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"best.ckpt do not fit the network that it names"):
        load_teacher(config)


def test_several_teachers_predict_their_mean(config):
    older = write_run(config, "2026-01-01", dice=0.87)
    config["teacher"]["members"] = 2
    with pytest.raises(UserError, match=r"members=2, and only 1 finished runs .* -m seed=0,1 exp"):
        find_teachers(config)
    newer = write_run(config, "2026-01-02", dice=0.88)
    assert find_teachers(config) == [newer, older]
    batch = {"image": torch.rand(2, 3, 16, 16), "id": ["a", "b"]}
    teacher, description = load_teacher(config)
    members = []
    for path in (newer, older):
        config["teacher"]["checkpoint"] = str(path)
        alone, known = load_teacher(config)
        members.append(alone.predict(batch)["probability"])
    assert (members[0] - members[1]).abs().max() > 0.01
    mean = teacher.predict(batch)["probability"]
    torch.testing.assert_close(mean, (members[0] + members[1]) / 2)
    config["teacher"]["checkpoint"] = [str(newer), str(older)]
    torch.testing.assert_close(load_teacher(config)[0].predict(batch)["probability"], mean)
    assert description["checkpoint"] == config["teacher"]["checkpoint"]
    assert description["network"]["name"] == f"2 x {known['network']['name']}"
    assert description["network"]["params"] == 2 * known["network"]["params"]
    assert teacher.objective is description["objective"] is None
    assert "dice" not in description
    config["teacher"]["members"] = 0
    with pytest.raises(UserError, match="members=0 must be a whole number, at least 1"):
        find_teachers(config)


def test_turns_are_for_masks(config):
    config["teacher"]["checkpoint"] = str(write_run(config, "a"))
    assert not load_teacher(config)[0].turns
    config["teacher"]["turns"] = True
    assert load_teacher(config)[0].turns


@pytest.mark.parametrize("change", [{"turns": True}, {"checkpoint": ["a.ckpt", "b.ckpt"]}])
def test_diagnoses_are_not_averaged(make_config, monkeypatch, change):
    config = make_config("experiment=d_kd_isic2019", "teacher.checkpoint=a.ckpt")
    member = (torch.nn.Linear(1, 1), {"checkpoint": "a.ckpt"}, Seen(Path("a.ckpt")))
    monkeypatch.setattr("tasks.teachers._load_member", lambda *_: member)
    assert load_teacher(config)[1] == {"checkpoint": "a.ckpt"}
    config["teacher"] |= change
    with pytest.raises(UserError, match="average masks, and a classifier has none; set teacher"):
        load_teacher(config)


def test_a_fold_of_a_student_finds_the_teacher_of_that_fold(config):
    ids = [f"image_{number:02d}" for number in range(20)]
    nothing = [None] * 20
    teachers, parts = [], []
    for fold in range(3):
        split = fold_split(ids, nothing, nothing, 3, fold, (7, 1, 2), 0)
        parts.append(dict(zip(ids, split, strict=True)))
        teachers.append(write_run(config, f"2026-01-0{fold}"))
        write_split(teachers[-1].parents[1] / "splits.csv", parts[-1])
    config["datamodule"] |= {"folds": 3, "fold": 0}
    assert [find_teachers(config, lambda own=own: own) for own in parts] == [
        [path] for path in teachers
    ]
    teachers[0].unlink()
    with pytest.raises(UserError, match="cross_validation=3"):
        find_teachers(config, lambda: parts[0])


def test_damaged_runs_are_named_and_an_older_one_is_taken(config, capsys):
    sound = write_run(config, "2026-01-01")
    damaged = [
        write_run(config, f"2026-01-0{day}", **changes).parent.parent
        for day, changes in ((2, {"data": 3}), (3, {"test": {"test/dice": "good"}}), (4, {}))
    ]
    (damaged[2] / "config.yaml").write_bytes(b"\x00\xff")
    assert find_teachers(config) == [sound]
    out = capsys.readouterr().out
    assert [out.count(str(folder)) for folder in damaged] == [1, 1, 1]
