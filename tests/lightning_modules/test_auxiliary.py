"""Auxiliary heads: the reference's maps, on a network that stays as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from lightning_modules import AuxiliaryHeads, Segmentation
from lightning_modules.auxiliary import AuxiliaryHead
from lightning_modules.losses import bce_loss
from lightning_modules.teacher import FrozenTeacher
from networks import DeepLabV3Plus, UNet

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "deeplab_kd"
ADAM = {"name": "Adam", "lr": 1e-3}
LOSSES = {"auxiliary_bce": {"weight": 1}}
PATHS = {"deep": "encoder.3", "early": "encoder.0"}


def make(network, teacher=None, losses=None, auxiliary=None):
    auxiliary = PATHS if auxiliary is None else auxiliary
    return AuxiliaryHeads(network, losses or LOSSES, ADAM, teacher=teacher, auxiliary=auxiliary)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_heads_match_the_reference(case):
    spec = json.loads((GOLDEN / "aux_head_forward.json").read_text())
    with np.load(GOLDEN / "aux_head_forward.npz") as arrays:
        values = {k: torch.from_numpy(arrays[k]) for k in arrays if k.startswith(f"{case}/")}
    inputs = {k.split("/")[2]: v for k, v in values.items() if "/in/" in k}
    features = inputs.pop("x")
    head = AuxiliaryHead(features.shape[1])
    head.load_state_dict(
        {k.removeprefix("param_").replace("_", "."): value for k, value in inputs.items()}
    )
    tolerance = spec["tolerance"]
    torch.testing.assert_close(
        head(features, (224, 224)),
        values[f"{case}/out/out"],
        rtol=tolerance["loss_rtol"],
        atol=tolerance["loss_atol"],
    )


@pytest.mark.parametrize(
    ("backbone", "heads"),
    [
        ("resnet101", {"resnet1": 1_475_073, "resnet2": 5_899_265, "aspp": 368_897}),
        ("resnet18", {"resnet1": 92_289, "resnet2": 368_897, "aspp": 368_897}),
    ],
)
def test_heads_of_the_published_networks_have_the_published_size(backbone, heads):
    paths = {"resnet1": "backbone.layer2", "resnet2": "backbone.layer3", "aspp": "head.aspp"}
    with torch.device("meta"):
        module = make(DeepLabV3Plus(backbone), auxiliary=paths)
    sizes = {
        name: sum(p.numel() for p in head.parameters())
        for name, head in module.auxiliary_heads.items()
    }
    assert sizes == heads
    whole = sum(p.numel() for p in module.parameters())
    assert whole == {"resnet101": 66_492_068, "resnet18": 16_842_788}[backbone]


def test_only_the_heads_learn_and_nothing_of_the_network_moves(unet, lesions, make_trainer, calls):
    teacher = FrozenTeacher(Segmentation(UNet(base_width=2), {"bce": {"weight": 1}}, ADAM))
    module = make(unet, teacher)
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    heads = {k: v.clone() for k, v in module.auxiliary_heads.state_dict().items()}
    loader = DataLoader([lesions(4)], batch_size=None)
    seen = calls(unet)
    make_trainer(max_epochs=5).fit(module, loader, loader)
    assert len(seen) == 5 + 5, "one call a step, of training and of validation"
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert any("running_mean" in key for key in before), "statistics are compared too"
    assert not unet.training
    after = module.auxiliary_heads.state_dict()
    assert not any(torch.equal(value, heads[key]) for key, value in after.items())
    assert not any(p.requires_grad for p in unet.parameters())
    optimized = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.auxiliary_heads.parameters()}


def test_it_predicts_as_its_network_and_gives_its_maps(unet, lesions, calls):
    module = make(unet).eval()
    batch = lesions(2)
    seen = calls(unet)
    result = module.predict(batch)
    assert len(seen) == 1
    assert torch.equal(result["probability"], unet(batch["image"]).sigmoid())
    assert set(result["auxiliary"]) == set(PATHS)
    assert all(maps.shape == batch["mask"].shape for maps in result["auxiliary"].values())
    losses, answer = module.weighted_losses(batch, module.losses)
    expected = sum(bce_loss(answer["auxiliary"][name], batch["mask"]) for name in PATHS)
    torch.testing.assert_close(losses["loss"], expected)


def test_maps_have_the_size_of_the_image(unet, lesions):
    for size in (32, 48):
        result = make(unet).predict(lesions(1, size))
        assert result["auxiliary"]["deep"].shape == (1, 1, size, size)


def test_mistakes_are_named(unet):
    with pytest.raises(UserError, match="auxiliary.deep=encoder.9 is no module of UNet"):
        make(unet, auxiliary={"deep": "encoder.9"})
    with pytest.raises(UserError, match="lightning_module.auxiliary is empty"):
        make(unet, auxiliary={})
    with pytest.raises(UserError, match="auxiliary_bce.weight=0 leaves nothing to train"):
        make(unet, losses={"bce": {"weight": 1}})
    other = FrozenTeacher(Segmentation(UNet(base_width=3), {"bce": {"weight": 1}}, ADAM))
    with pytest.raises(UserError, match=r"UNet\) has other weights than that of network.name"):
        make(unet, other)
