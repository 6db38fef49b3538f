"""Objects by name, and what is said of names and arguments that do not exist."""

from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch

import networks
from common.errors import UserError
from lightning_modules import DiffusionSegmentation, EdgeFocusedDistillation, Segmentation
from tasks.build import (
    build_datamodule,
    build_module,
    build_network,
    build_sampler,
    call_inputs,
    check_batch,
    describe_network,
    takes_teacher,
)


def test_the_demo_teacher_is_built_from_its_config(make_config):
    config = make_config("experiment=demo_teacher")
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
        "guidance_gmac": 0,
    }


def test_a_distillation_asks_for_its_teacher(make_config):
    config = make_config("experiment=demo_efkd")
    assert takes_teacher(config)
    teacher = SimpleNamespace(objective="x0")
    module = build_module(config, build_network(config["network"]), teacher)
    assert isinstance(module, EdgeFocusedDistillation)
    assert module.teacher is teacher
    assert module.losses.weights == {"l2": 1, "boundary": 0.25, "efkd": 0.25}


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (build_network, {"name": "VNet"}, "network.name=VNet does not exist; .*DermoSegDiff"),
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
    module = build_module(config, build_network(config["network"]), SimpleNamespace(objective="x0"))
    assert module.losses.weights == {"l2": 1, "huber": 2, "efkd": 0.5}


def test_a_method_of_one_pass_has_neither_schedule_nor_sampler(make_config):
    config = make_config("experiment=unet_raw_isic2018", "network.kwargs.base_width=4")
    network = build_network(config["network"])
    module = build_module(config | {"schedule": {}, "sampler": {}}, network)
    assert isinstance(module, Segmentation)
    assert module.calls_per_mask == 1
    # 9 K multiply-adds a convolution of K weights and pixel, by hand for the first one.
    assert describe_network(network, config)["gmac"] > 3 * 4 * 9 * 128**2 / 1e9
    assert len(call_inputs(network, torch.rand(2, 3, 16, 16))) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["network=unet"],
            "=DiffusionSegmentation needs a network that is also given a noisy mask and times, .*"
            "network.name=UNet is none. .* lightning_module=segmentation",
        ),
        (
            ["network=dermosegdiff_tiny", "lightning_module=segmentation"],
            "=Segmentation needs a network that makes a map of an image, .*"
            "network.name=DermoSegDiff is none. .* lightning_module=diffusion",
        ),
        (
            ["network=mobilenet_v2", "lightning_module=segmentation"],
            "network.name=Classifier is none. .* lightning_module=classification",
        ),
    ],
)
def test_a_network_that_the_method_cannot_train_is_refused(make_config, overrides, message):
    config = make_config(*overrides)
    with pytest.raises(UserError, match=message):
        build_module(config, build_network(config["network"]))


def test_pretrained_weights_are_asked_for_by_training_alone(monkeypatch):
    asked = []

    class Pretrained(torch.nn.Module):
        def __init__(self, weights=None):
            super().__init__()
            asked.append(weights)

    class Offline(torch.nn.Module):
        def __init__(self, weights=None):
            raise URLError("no route")

    monkeypatch.setattr(networks, "UNet", Pretrained)
    config = {"name": "UNet", "weights": "imagenet"}
    build_network(config)
    build_network(config, pretrained=True)
    build_network(config | {"weights": None}, pretrained=True)
    assert asked == [None, "imagenet", None]
    monkeypatch.setattr(networks, "UNet", Offline)
    with pytest.raises(UserError, match=r"weights=imagenet of Offline could not .*weights=null"):
        build_network(config, pretrained=True)
    with pytest.raises(UserError, match="weights=imagenet does not exist for DermoSegDiff"):
        build_network({"name": "DermoSegDiff", "weights": "imagenet"}, pretrained=True)


def test_a_batch_too_small_for_batch_norm_is_refused(make_config):
    size = ("datamodule.batch_size=1", "datamodule.image_size=32")
    config = make_config("network=deeplabv3plus_resnet18", *size)
    with pytest.raises(UserError, match="batch_size=1 is too small for network.name=DeepLabV3Pl"):
        check_batch(config)
    check_batch(make_config("network=unet", *size))
    config["datamodule"]["batch_size"] = 2
    check_batch(config)
