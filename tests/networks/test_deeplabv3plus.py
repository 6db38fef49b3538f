"""DeepLabV3+: the reference's backbones and head, sizes, ImageNet weights, refusals."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import ResNet18_Weights, resnet18

from common.errors import UserError
from networks import DeepLabV3Plus

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "deeplab_kd"


def read_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        values = {key.removeprefix("case0/"): torch.from_numpy(arrays[key]) for key in arrays}
    return values, json.loads((GOLDEN / f"{name}.json").read_text())


def fill(module):
    """Give every entry of the state dict the values that follow from its name."""
    state = module.state_dict()
    for key, value in state.items():
        shape = tuple(value.shape)
        random = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)
        if key.endswith("num_batches_tracked"):
            filled = np.zeros(shape)
        elif key.endswith(("running_mean", "running_var")):
            filled = np.full(shape, key.endswith("running_var"))
        elif len(shape) == 4:
            filled = random.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        else:
            filled = 0.1 * random.standard_normal(shape) + (not key.endswith("bias"))
        state[key] = torch.from_numpy(np.asarray(filled)).to(value.dtype)
    module.load_state_dict(state)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("backbone", "name"),
    [("resnet18", "backbone_resnet18_dilated"), ("resnet101", "backbone_resnet101_os8")],
)
def test_every_layer_of_the_backbone_matches_the_reference(backbone, name):
    values, stored = read_golden(name)
    network = DeepLabV3Plus(backbone).backbone
    fill(network)
    seen = {}
    for layer in ("layer1", "layer2", "layer3", "layer4"):

        def keep(module, inputs, output, layer=layer):
            seen[layer] = output

        getattr(network, layer).register_forward_hook(keep)
    with torch.no_grad():
        network.train()(values["in/x"])
    for layer, features in seen.items():
        assert list(features.shape) == values[f"out/{layer}_shape"].tolist()
        found = {
            "mean": features.mean((0, 2, 3)),
            "std": features.transpose(0, 1).flatten(1).std(1),
            "first4ch": features[:, :4],
        }
        for kind, result in found.items():
            expected = values[f"out/{layer}_{kind}"]
            atol = stored["tolerance"]["rel_to_max"] * expected.abs().max().item()
            torch.testing.assert_close(result, expected, rtol=0, atol=atol, msg=f"{layer} {kind}")


def test_the_student_dilates_only_the_first_block_of_the_last_two_layers():
    backbone = DeepLabV3Plus("resnet18").backbone
    for layer in (backbone.layer3, backbone.layer4):
        assert layer[0].conv1.stride == layer[0].downsample[0].stride == (1, 1)
        assert layer[0].conv1.dilation == layer[1].conv1.dilation == (1, 1)
        assert layer[0].conv2.dilation == layer[0].conv2.padding == (2, 2)
        assert layer[1].conv2.dilation == layer[1].conv2.padding == (1, 1)


def test_the_head_matches_the_reference():
    values, stored = read_golden("decoder_deeplabv3plus")
    head = DeepLabV3Plus("resnet18").head.eval()
    shapes = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    note = stored["cases"][0]["note"].removeprefix("keys: ").replace(", ", ",")
    listed = dict(entry.rstrip("]").split("[") for entry in note.split(" "))
    listed = {key: tuple(map(int, shape.split(","))) for key, shape in listed.items()}
    assert {k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")} == listed
    fill(head)
    with torch.no_grad():
        pyramid = head.aspp(values["in/out"])
        logits = head(values["in/low_level"], values["in/out"])
    limits = {"rtol": stored["tolerance"]["loss_rtol"], "atol": stored["tolerance"]["loss_atol"]}
    torch.testing.assert_close(pyramid, values["out/aspp"], **limits)
    torch.testing.assert_close(logits, values["out/logits"], **limits)


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ("resnet101", (42_500_160, 15_535_104, 12_384, 701_185)),
        ("resnet18", (11_176_512, 4_131_840, 3_168, 701_185)),
    ],
)
def test_parts_have_the_published_size(backbone, parts):
    with torch.device("meta"):
        network = DeepLabV3Plus(backbone)
    head = network.head
    found = [count(part) for part in (network.backbone, head.aspp, head.project, head.classifier)]
    assert tuple(found) == parts
    assert count(network) == sum(parts)


@pytest.mark.parametrize(
    ("preset", "parameters", "gmac"),
    [
        ("deeplabv3plus_resnet101", 58_748_833, 15.65),
        ("deeplabv3plus_resnet18", 16_012_705, 4.752),
    ],
)
def test_presets(check_preset, preset, parameters, gmac):
    check_preset(preset, parameters, gmac)


def test_a_small_one_keeps_the_contract(check_network):
    once = ("backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4", "head.aspp")
    check_network(lambda: DeepLabV3Plus("resnet18"), (32, 48), (29, 37), once=once)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101", "resnet152"])
def test_a_large_one_keeps_the_contract(check_network, backbone):
    once = ("backbone.layer2", "backbone.layer3", "head.aspp")
    check_network(lambda: DeepLabV3Plus(backbone), (32, 48), (29, 37), once=once)


@pytest.mark.parametrize(
    ("backbone", "widths"), [("resnet18", (64, 128, 256)), ("resnet101", (256, 512, 1024))]
)
def test_features_have_the_published_shapes(backbone, widths):
    shapes = {}
    with torch.device("meta"):
        network = DeepLabV3Plus(backbone).eval()
        for key in ("backbone.layer1", "backbone.layer2", "backbone.layer3", "head.aspp"):

            def keep(module, inputs, output, key=key):
                shapes[key] = tuple(output.shape[1:])

            network.get_submodule(key).register_forward_hook(keep)
        network(torch.empty(1, 3, 224, 224))
    assert shapes == {
        "backbone.layer1": (widths[0], 56, 56),
        "backbone.layer2": (widths[1], 28, 28),
        "backbone.layer3": (widths[2], 28, 28),
        "head.aspp": (256, 28, 28),
    }


def test_the_head_starts_from_kaiming_normal():
    head = DeepLabV3Plus("resnet18").head
    for key, module in head.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 1e5:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02), key
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert head.aspp.project[-1].p == 0.1


def test_dilations_of_the_pyramid_are_an_argument():
    with torch.device("meta"):
        pyramid = DeepLabV3Plus("resnet18", atrous_rates=[3, 6]).head.aspp
    dilations = [conv[0].dilation for conv in list(pyramid.convs)[1:-1]]
    assert dilations == [(3, 3), (6, 6)]


def test_imagenet_weights_fill_the_backbone_alone(torch_home):
    published = resnet18().state_dict()
    torch.save(published, torch_home / Path(ResNet18_Weights.IMAGENET1K_V1.url).name)
    network = DeepLabV3Plus("resnet18", weights="imagenet")
    state = network.backbone.state_dict()
    assert state.keys() == {key for key in published if not key.startswith("fc.")}
    for key, value in state.items():
        assert torch.equal(value, published[key]), key
    random = DeepLabV3Plus("resnet18").backbone
    assert not torch.equal(random.conv1.weight, network.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "resnet19"},
            "network.kwargs.backbone=resnet19 does not exist; choose one of resnet18, resnet50, "
            "resnet101, resnet152.",
        ),
        (
            {"weights": "coco"},
            "network.weights=coco does not exist; choose one of null, imagenet.",
        ),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        DeepLabV3Plus(**arguments)
