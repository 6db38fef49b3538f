"""Objects by name, and what is said of names and arguments that do not exist."""

import pytest

from common.errors import UserError
from lightning_modules import DiffusionSegmentation, EdgeFocusedDistillation
from tasks.build import (
    build_datamodule,
    build_module,
    build_network,
    build_sampler,
    describe_network,
    takes_teacher,
)


def test_default_config_builds_the_demo_teacher(make_config):
    config = make_config()
    network = build_network(config["network"])
    module = build_module(config, network)
    assert isinstance(module, DiffusionSegmentation)
    assert module.network is network
    assert module.objective == "x0"
    assert module.calls_per_mask == 1
    assert not takes_teacher(config)
    config["datamodule"]["image_size"] = 128
    assert describe_network(network, config) == {
        "name": "DermoSegDiff",
        "params": 1_463_841,
        "gmac": pytest.approx(1.5998, rel=1e-3),
    }


def test_a_distillation_asks_for_its_teacher(make_config):
    config = make_config("experiment=demo_efkd")
    assert takes_teacher(config)
    teacher = object()
    module = build_module(config, build_network(config["network"]), teacher)
    assert isinstance(module, EdgeFocusedDistillation)
    assert module.teacher is teacher
    assert module.losses.weights == {"l2": 1, "boundary": 0.25, "efkd": 0.25}


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (build_network, {"name": "UNet"}, "network.name=UNet does not exist; .*DermoSegDiff"),
        (
            build_network,
            {"name": "DermoSegDiff", "kwargs": {"dim_x": 8, "dim_g": 8, "dims": 3}},
            r"network.kwargs.dims is not an argument of DermoSegDiff; it takes dim_x",
        ),
        (
            build_network,
            {"name": "DermoSegDiff", "kwargs": {"dim_x": 8}},
            "kwargs.dim_g is missing",
        ),
        (build_network, {"name": "load_reference_state_dict"}, "does not exist"),
        (build_sampler, {"name": "DDPM", "num_steps": 5, "eta": 1.0}, "sampler.eta is not"),
        (build_datamodule, {"name": "ISIC2018", "images": 64}, "datamodule.images is not"),
    ],
)
def test_unknown_names_and_arguments_are_named(build, config, message):
    with pytest.raises(UserError, match=message):
        build(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+lightning_module.losses.dice.weight=1", "losses.dice is not a loss term"),
        ("+lightning_module.losses.boundary.gama=1", "losses.boundary.gama is not an option"),
        ("lightning_module.name=Diffusion", "lightning_module.name=Diffusion does not exist"),
        ("schedule.mode=square", "schedule.mode=square"),
    ],
)
def test_mistakes_in_the_method_are_named(make_config, override, message):
    config = make_config(override)
    with pytest.raises(UserError, match=message):
        build_module(config, build_network(config["network"]))


def test_loss_weights_are_sweepable_by_name(make_config):
    config = make_config(
        "experiment=demo_efkd",
        "lightning_module.losses.efkd.weight=0.5",
        "lightning_module.losses.boundary.weight=0",
        "lightning_module.losses.huber.weight=2",
    )
    module = build_module(config, build_network(config["network"]), teacher=object())
    assert module.losses.weights == {"l2": 1, "huber": 2, "efkd": 0.5}
