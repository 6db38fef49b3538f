"""DeepLabV3: torchvision's network with one logit, its published weights, refusals."""

from pathlib import Path

import pytest
import torch
from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large
from torchvision.models.segmentation import (
    DeepLabV3_MobileNet_V3_Large_Weights,
    deeplabv3_mobilenet_v3_large,
)

from common.errors import UserError
from networks import DeepLabV3

SMALL = "mobilenet_v3_large"


def test_preset(check_preset):
    check_preset("deeplabv3_resnet101", 58_625_857, 15.07)


def test_a_small_one_keeps_the_contract(check_network):
    check_network(lambda: DeepLabV3(SMALL), (32, 48), (29, 37), once=("backbone", "classifier.0"))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_a_large_one_keeps_the_contract(check_network, backbone):
    once = ("backbone.layer2", "backbone.layer3", "classifier.0")
    check_network(lambda: DeepLabV3(backbone), (32, 48), (29, 37), once=once)


def test_it_computes_what_torchvision_computes():
    published = deeplabv3_mobilenet_v3_large(
        weights_backbone=None, num_classes=1, aux_loss=False
    ).eval()
    network = DeepLabV3(SMALL).eval()
    network.load_state_dict(published.state_dict())
    image = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        assert torch.equal(network(image), published(image)["out"])


def test_imagenet_weights_fill_the_backbone_alone(torch_home):
    published = mobilenet_v3_large().state_dict()
    torch.save(published, torch_home / Path(MobileNet_V3_Large_Weights.IMAGENET1K_V1.url).name)
    network = DeepLabV3(SMALL, weights="imagenet")
    for key, value in network.backbone.state_dict().items():
        assert torch.equal(value, published[f"features.{key}"]), key
    assert network.classifier[-1].weight.shape == (1, 256, 1, 1)


def test_coco_weights_fill_all_but_the_last_layer(torch_home):
    published = deeplabv3_mobilenet_v3_large(weights_backbone=None, aux_loss=True).state_dict()
    url = DeepLabV3_MobileNet_V3_Large_Weights.COCO_WITH_VOC_LABELS_V1.url
    torch.save(published, torch_home / Path(url).name)
    network = DeepLabV3(SMALL, weights="coco")
    state = network.state_dict()
    last = {"classifier.4.weight": (1, 256, 1, 1), "classifier.4.bias": (1,)}
    for key, value in state.items():
        if key in last:
            assert value.shape == last[key]
        else:
            assert torch.equal(value, published[key]), key
    assert state.keys() == DeepLabV3(SMALL).state_dict().keys()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "resnet18"},
            "network.kwargs.backbone=resnet18 does not exist; choose one of resnet50, resnet101, "
            "mobilenet_v3_large.",
        ),
        (
            {"weights": "voc"},
            "network.weights=voc does not exist; choose one of null, imagenet, coco.",
        ),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        DeepLabV3(**arguments)
