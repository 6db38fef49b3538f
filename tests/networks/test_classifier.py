"""Classifiers of torchvision: parts, published sizes, weights, metadata, refusals by name."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from common.errors import UserError
from networks import Classifier

CONF = Path(__file__).resolve().parents[2] / "conf" / "network"
ALL = models.list_models(module=models)
# One of each family.
FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
]
NARROW = {"architecture": "mobilenet_v2", "options": {"width_mult": 0.25}}


@pytest.fixture
def no_filling(monkeypatch):
    """Leaves the memory of new layers as it is, for networks of which the shapes matter alone."""
    names = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_")
    for name in (*names, "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *arguments, **settings: tensor)


def check_parts(architecture):
    with torch.device("meta"):
        network = Classifier(architecture, num_classes=7)
        seen = []
        network.backbone.register_forward_hook(lambda *call: seen.append(call[-1]))
        for train in (False, True):
            logits = network.train(train)(torch.empty(2, 3, 224, 224))
            assert logits.shape == (2, 7), architecture
            assert seen.pop().shape == (2, network.head.in_features), architecture
    assert type(network.head) is nn.Linear
    return network


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_gives_logits(architecture, no_filling):
    check_parts(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in ALL if name not in FAMILIES])
def test_every_architecture_gives_logits(architecture, no_filling):
    check_parts(architecture)


def test_there_are_all_of_torchvision():
    assert len(ALL) >= 80
    assert set(FAMILIES) < set(ALL)


@pytest.mark.parametrize(
    ("architecture", "features", "classes", "parameters"),
    [
        ("resnet50", 2048, 8, 23_524_424),
        ("resnet50", 2048, 7, 23_522_375),
        ("mobilenet_v2", 1280, 8, 2_234_120),
    ],
)
def test_published_sizes(architecture, features, classes, parameters):
    with torch.device("meta"):
        network = Classifier(architecture, classes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert (network.head.in_features, network.head.out_features) == (features, classes)
    assert (network.num_classes, network.metadata_inputs) == (classes, 0)


@pytest.mark.parametrize(
    ("preset", "parameters", "gmac"),
    [
        ("resnet50", 23_524_424, 4.087),
        ("mobilenet_v2", 2_234_120, 0.2995),
        ("torchvision", 4_017_796, 0.3845),
    ],
)
def test_presets(preset, parameters, gmac):
    text = (CONF / f"{preset}.yaml").read_text()
    promise = f"{parameters:,} parameters for 8 classes, {gmac:.1f} GMAC a call at 224 px."
    assert promise in text.splitlines()[0]
    spec = yaml.safe_load(text)
    assert spec["name"] == "Classifier"
    assert "num_classes" not in spec["kwargs"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = Classifier(**spec["kwargs"]).eval()
        network(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=1e-3)
    tiny = Classifier(**spec["tiny"], num_classes=3)
    assert sum(p.numel() for p in tiny.parameters()) < 4e6
    assert tiny(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("preset", "tap", "channels"),
    [("resnet50", "backbone.layer4", 2048), ("mobilenet_v2", "backbone.features", 1280)],
)
def test_features_have_the_published_shapes_also_in_a_tiny_network(preset, tap, channels):
    spec = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
    for settings in (spec["kwargs"], spec["tiny"]):
        shapes = {}
        with torch.device("meta"):
            network = Classifier(**settings).eval()
            for key in (tap, "backbone"):

                def keep(module, inputs, output, key=key, shapes=shapes):
                    shapes[key] = tuple(output.shape)

                network.get_submodule(key).register_forward_hook(keep)
            network(torch.empty(2, 3, 224, 224))
        assert shapes == {tap: (2, channels, 7, 7), "backbone": (2, channels)}


@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_the_parts_compute_what_torchvision_does(architecture):
    whole = models.get_model(architecture, num_classes=5).eval()
    network = Classifier(architecture, 5).eval()
    *_, (path, last) = [
        item for item in whole.named_modules() if isinstance(item[1], nn.Linear | nn.Conv2d)
    ]
    state = {k: v for k, v in whole.state_dict().items() if not k.startswith(f"{path}.")}
    network.backbone.load_state_dict(state)
    network.head.load_state_dict({"weight": last.weight.flatten(1), "bias": last.bias})
    if architecture == "squeezenet1_1":
        # There the mean over the image is taken of the ReLU of the logits; here of the features.
        whole.classifier = nn.Sequential(last, nn.AdaptiveAvgPool2d(1))
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(image), whole(image), rtol=1e-5, atol=1e-5)


def test_dropout_before_the_head_is_gone():
    def probabilities(network):
        return [m.p for m in network.modules() if isinstance(m, nn.Dropout)]

    with torch.device("meta"):
        for name in ("mobilenet_v2", "efficientnet_b0", "googlenet", "squeezenet1_1"):
            assert probabilities(Classifier(name)) == []
        vgg = Classifier("vgg11")
    assert probabilities(vgg) == [0.5], "between its hidden layers it stays"


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (NARROW, (32, 48)),
        ({"architecture": "squeezenet1_1"}, (33, 32)),
    ],
)
def test_small_ones_keep_the_contract(settings, size):
    network = Classifier(**settings, num_classes=3)
    output = network(image=torch.randn(3, 3, *size))
    assert output.shape == (3, 3)
    output.square().mean().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    network.eval()
    calls = Counter()
    for key in ("backbone", "head"):
        network.get_submodule(key).register_forward_hook(lambda *call, key=key: calls.update([key]))
    image = torch.randn(3, 3, *size)
    first = network(image)
    assert calls == {"backbone": 1, "head": 1}
    assert torch.equal(first, network(image))
    limits = {"rtol": 0, "atol": 1e-4 * first.abs().max().item()}
    torch.testing.assert_close(network(image[1:2])[0], first[1], **limits)
    batch = {"image": {0: torch.export.Dim("batch")}}
    program = torch.export.export(network, (image[:2],), dynamic_shapes=batch)
    torch.testing.assert_close(program.module()(image), first, **limits)


def test_a_checkpoint_of_a_pretrained_network_fits_a_random_one(torch_home):
    published = models.mobilenet_v2().state_dict()
    url = models.MobileNet_V2_Weights.IMAGENET1K_V1.url
    torch.save(published, torch_home / Path(url).name)
    network = Classifier("mobilenet_v2", weights="imagenet")
    state = network.backbone.state_dict()
    assert state.keys() == {key for key in published if not key.startswith("classifier.")}
    for key, value in state.items():
        assert torch.equal(value, published[key]), key
    random = Classifier("mobilenet_v2")
    assert not torch.equal(random.head.weight, network.head.weight)
    random.load_state_dict(network.state_dict())
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(random.eval()(image), network.eval()(image))


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_loaded_and_left_out(architecture, monkeypatch, no_filling):
    builder = models.get_model_builder(architecture)
    published = builder(aux_logits=True, init_weights=False).state_dict()
    weights = models.get_model_weights(architecture).IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *a, **k: published)
    network = Classifier(architecture, 3, weights="imagenet")
    state = network.state_dict()
    assert state.keys() == Classifier(architecture, 3).state_dict().keys()
    assert not [key for key in state if "aux" in key.lower()]
    assert [key for key in published if "aux" in key.lower()]
    for chosen in (network, Classifier(architecture, 3)):
        # It would otherwise depend on the weights that training began with.
        assert chosen.backbone.transform_input
    logits = network.train().to("meta")(torch.empty(2, 3, 96, 96, device="meta"))
    assert logits.shape == (2, 3)


def test_the_first_published_weights_that_fit_are_asked_for(monkeypatch):
    asked = {}

    def get_model(name, weights, **settings):
        asked[name] = weights.name
        return nn.Sequential(nn.Linear(1, 1))

    monkeypatch.setattr(models, "get_model", get_model)
    for name in ALL:
        Classifier(name, weights="imagenet")
    others = {name: asked[name] for name in ALL if asked[name] != "IMAGENET1K_V1"}
    # Their other weights are for images of 384 and 518 pixels.
    assert others == dict.fromkeys(("regnet_y_128gf", "vit_h_14"), "IMAGENET1K_SWAG_LINEAR_V1")


def test_weights_that_cannot_be_had_are_refused_as_those_of_other_networks(torch_home, monkeypatch):
    from tasks.build import build_network

    def fail(*arguments, **settings):
        raise ConnectionError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    config = {"name": "Classifier", "weights": "imagenet", "kwargs": {"architecture": "resnet18"}}
    with pytest.raises(UserError) as caught:
        build_network(config, pretrained=True)
    assert str(caught.value) == (
        "network.weights=imagenet of Classifier could not be downloaded (ConnectionError); connect "
        "this machine to the internet once, or start from random weights with network.weights=null."
    )
    assert isinstance(build_network(config), Classifier)


@pytest.mark.parametrize(
    ("architecture", "groups", "parameters"),
    [("resnet50", 64, 23_526_216), ("mobilenet_v2", 40, 2_235_240)],
)
def test_metadata_has_the_published_size(architecture, groups, parameters):
    with torch.device("meta"):
        network = Classifier(architecture, metadata=11)
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert network.metablock.scale[0].out_features == groups
        logits = network(torch.empty(2, 3, 64, 64), torch.empty(2, 11))
    assert (network.metadata_inputs, logits.shape) == (11, (2, 8))


def test_metadata_gates_neighbouring_features_together():
    network = Classifier(**NARROW, metadata=2).eval()
    image, metadata = torch.randn(3, 3, 32, 32), torch.randn(3, 2)
    seen = []
    network.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(image, metadata)
    scale, shift = network.metablock.scale(metadata), network.metablock.shift(metadata)
    each = torch.arange(1280) // 32
    expected = ((network.backbone(image) * scale[:, each]).tanh() + shift[:, each]).sigmoid()
    torch.testing.assert_close(seen[0], expected)
    assert not torch.equal(network(image, metadata), network(image, metadata + 1))


@pytest.mark.parametrize(
    ("metadata", "given", "message"),
    [
        (None, 11, "network.kwargs.metadata is null, and the images come with 11 number(s) of"),
        (11, 0, "network.kwargs.metadata is 11, and the images come with no number(s) of metadata"),
        (11, 3, "network.kwargs.metadata is 11, and the images come with 3 number(s) of metadata"),
    ],
)
def test_metadata_must_be_there_as_the_network_expects(metadata, given, message):
    network = Classifier(**NARROW, metadata=metadata)
    numbers = torch.randn(2, given) if given else None
    with pytest.raises(UserError) as caught:
        network(torch.randn(2, 3, 32, 32), numbers)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (
            {"architecture": "vit_b_32"},
            (64, 64),
            "An image of 64x64 pixels does not fit vit_b_32, which takes, of the common sizes, "
            "224x224. Without weights it can have others by network.kwargs.options.image_size.",
        ),
        (
            {"architecture": "vit_b_32", "options": {"image_size": 64}},
            (224, 224),
            "does not fit vit_b_32, which takes, of the common sizes, 64x64.",
        ),
        (
            {"architecture": "alexnet"},
            (32, 32),
            "An image of 32x32 pixels does not fit alexnet, which takes, of the common sizes, "
            "64x64, 96x96,",
        ),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(settings, size, message):
    with torch.device("meta"):
        network = Classifier(**settings).eval()
        with pytest.raises(UserError) as caught:
            network(torch.empty(1, 3, *size))
    assert message in str(caught.value)
    assert caught.value.args[0].endswith(".")


def test_an_error_that_is_not_about_the_size_is_left_alone():
    network = Classifier(**NARROW).eval()

    def fail(module, inputs):
        if not inputs[0].is_meta:
            raise torch.OutOfMemoryError("full")

    network.backbone.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        network(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architecture": "resnet55"},
            "network.kwargs.architecture=resnet55 does not exist; torchvision has, among many, "
            "resnet50, ",
        ),
        ({"architecture": "zzzzz"}, "among many, resnet50, mobilenet_v2, vit_b_16."),
        # Of torchvision, but no classifier.
        ({"architecture": "deeplabv3_resnet50"}, "architecture=deeplabv3_resnet50 does not exist"),
        (
            {"architecture": "resnet18", "weights": "coco"},
            "network.weights=coco does not exist; choose one of null, imagenet.",
        ),
        (
            {"architecture": "mobilenet_v2", "options": {"width": 0.5}},
            "network.kwargs.options.width is not an option of mobilenet_v2; it takes width_mult, ",
        ),
        (
            {"architecture": "mobilenet_v2", "options": {"num_classes": 2}},
            "options.num_classes is not an option",
        ),
        (
            {"architecture": "mobilenet_v2", "options": {"dropout": 0.5}},
            "options.dropout is not an option",
        ),
        (
            {"architecture": "resnext50_32x4d", "options": {"groups": 2}},
            "network.kwargs: resnext50_32x4d cannot be built: The parameter 'groups' expected",
        ),
        (
            {"architecture": "vit_b_32", "options": {"image_size": 65}},
            "vit_b_32 cannot be built: Input shape indivisible by patch size!",
        ),
        (
            {"architecture": "vit_b_32", "weights": "imagenet", "options": {"image_size": 64}},
            "network.weights=imagenet does not fit vit_b_32 with network.kwargs.options of "
            "image_size; set network.weights=null.",
        ),
        ({"architecture": "resnet18", "num_classes": 1}, "num_classes=1 must be at least 2."),
        ({"architecture": "resnet18", "metadata": -1}, "metadata=-1 must be at least 0."),
        (
            {"architecture": "regnet_y_400mf", "metadata": 11},
            "network.kwargs.metadata=11 needs a multiple of 32 features, and regnet_y_400mf has "
            "440; choose another network.kwargs.architecture,",
        ),
    ],
)
def test_what_does_not_exist_is_refused(settings, message):
    with pytest.raises(UserError) as caught, torch.device("meta"):
        Classifier(**settings)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_weights_of_another_width_are_refused(torch_home):
    url = models.MobileNet_V2_Weights.IMAGENET1K_V1.url
    torch.save(models.mobilenet_v2().state_dict(), torch_home / Path(url).name)
    with pytest.raises(UserError, match="with network.kwargs.options of width_mult; set network.w"):
        Classifier(**NARROW, weights="imagenet")
