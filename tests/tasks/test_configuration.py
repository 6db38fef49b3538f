"""The config of a checkpoint under the user's overrides."""

import copy

import pytest

from common.errors import UserError
from tasks.configuration import checkpoint_config, modernise, split_override


@pytest.fixture
def trained(make_config):
    config = make_config(
        "experiment=teacher_isic2018",
        "paths.data=/somewhere/data",
        "datamodule.image_size=64",
        "sampler=ddim",
        "sampler.num_steps=5",
        "seed=3",
    )
    return copy.deepcopy(config)


def test_everything_that_shapes_a_mask_is_as_trained(make_config, trained):
    config = checkpoint_config(make_config("task=test", "checkpoint=x"), trained)
    for group in ("network", "lightning_module", "schedule", "sampler"):
        assert config[group] == trained[group]
    assert config["datamodule"] == trained["datamodule"] | {"cache": config["paths"]["cache"]}
    assert config["seed"] == 3


def test_single_values_change_what_was_trained(make_config, trained):
    config = checkpoint_config(
        make_config(
            "task=test",
            "checkpoint=x",
            "sampler.num_steps=2",
            "datamodule.batch_size=7",
            "paths.data=/elsewhere",
            "seed=9",
        ),
        trained,
    )
    assert config["sampler"] == trained["sampler"] | {"num_steps": 2}
    assert config["datamodule"]["batch_size"] == 7
    assert config["datamodule"]["image_size"] == 64
    assert config["datamodule"]["root"] == "/elsewhere/isic2018"
    assert config["lightning_module"]["seed"] == config["seed"] == 9


def test_a_chosen_group_replaces_the_trained_one(make_config, trained):
    config = checkpoint_config(
        make_config("task=test", "checkpoint=x", "sampler=ddpm", "datamodule=synthetic"), trained
    )
    assert config["sampler"]["name"] == "DDPM"
    assert config["datamodule"]["name"] == "Synthetic"
    assert config["datamodule"]["image_size"] == 64, "what the network was trained for"


@pytest.mark.parametrize(
    ("override", "trained_value"),
    [
        ("lightning_module.objective=v", "noise"),
        ("schedule.num_timesteps=100", "250"),
        ("lightning_module.seed=7", "3"),
    ],
)
def test_what_a_checkpoint_decides_cannot_be_contradicted(
    make_config, trained, override, trained_value
):
    message = rf"{override} cannot change a trained checkpoint, which has {trained_value}"
    with pytest.raises(UserError, match=message):
        checkpoint_config(make_config("task=test", "checkpoint=x", override), trained)


def test_what_a_checkpoint_decides_can_be_repeated(make_config, trained):
    given = make_config("task=test", "checkpoint=x", "lightning_module.objective=noise")
    assert checkpoint_config(given, trained)["lightning_module"] == trained["lightning_module"]


def test_a_missing_value_is_named(make_config):
    with pytest.raises(UserError, match=r"teacher.experiment has no value"):
        make_config("teacher=newest")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("a.b=1", ("a.b", "1")),
        ("+a.b=1", ("a.b", "1")),
        ("++a=x=y", ("a", "x=y")),
        ("~a.b", ("a.b", "")),
        ("path=", ("path", "")),
    ],
)
def test_an_override_has_a_key_and_a_value(override, parts):
    assert split_override(override) == parts


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, ("published", "canny")),
        ({"soft_masks": False}, ("published", "canny")),
        ({"soft_masks": True}, ("pillow", "canny")),
        ({"soft_masks": False, "letterbox": True}, ("area", "canny")),
        ({"soft_masks": True, "letterbox": True}, ("soft", "canny")),
        ({"mask_resize": "area", "edges": "border"}, ("area", "border")),
    ],
)
def test_masks_of_earlier_versions_stay_where_they_were(stored, expected):
    config = {"datamodule": dict(stored)}
    modernise(config)
    data = config["datamodule"]
    assert (data["mask_resize"], data["edges"]) == expected
    assert "soft_masks" not in data


def test_folds_are_those_of_the_trained_data(make_config, trained):
    trained["datamodule"] |= {"folds": 5, "fold": 2}
    for override, folds in (
        ("seed=1", 5),
        ("datamodule.root=/other", None),
        ("datamodule.split=all", None),
    ):
        given = make_config("task=test", "checkpoint=x", override)
        assert checkpoint_config(given, trained)["datamodule"]["folds"] == folds
    given = make_config("task=test", "checkpoint=x", "cross_validation=3", "datamodule.fold=1")
    data = checkpoint_config(given, trained)["datamodule"]
    assert (data["folds"], data["fold"]) == (3, 1)


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ((), "clinic"),
        (("datamodule.root=data/other",), "other"),
        (("datamodule=ph2",), "ph2"),
    ],
)
def test_a_test_is_reported_under_its_dataset(make_config, overrides, label):
    own = ("experiment=teacher_isic2018", "datamodule=folder")
    trained = copy.deepcopy(make_config(*own, "datamodule.root=data/clinic"))
    given = make_config("task=test", "checkpoint=x", *overrides)
    assert checkpoint_config(given, trained)["data_label"] == label
