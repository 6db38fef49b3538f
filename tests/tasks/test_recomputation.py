"""Activations that are computed twice: the same numbers, fewer of them kept."""

import copy

import pytest
import torch
from torch import nn

from lightning_modules import Classification, ClassificationDistillation
from lightning_modules.teacher import FrozenTeacher
from networks import Classifier, DeepLabV3Plus, DermoSegDiff, SmpNetwork, UNet
from tasks.recomputation import recompute_activations

SGD = {"name": "SGD", "lr": 0.1}
TAPS = {"features": None, "pooled": "backbone"}
NARROW = {"dim_x": 8, "dim_g": 8, "dim_mults": [1, 2], "attention_head_dim": 8}
BUILD = {
    "dermosegdiff": lambda: DermoSegDiff(**NARROW),
    "deeplabv3plus": lambda: DeepLabV3Plus("resnet18"),
    "unet": lambda: UNet(4),
    "smp": lambda: SmpNetwork("Unet", "resnet18"),
    "segformer": lambda: SmpNetwork("Segformer", "mit_b0"),
    "timm": lambda: SmpNetwork("Unet", "tu-efficientnet_b0"),
    "mobilenet_v2": lambda: Classifier("mobilenet_v2"),
    "efficientnet": lambda: Classifier("efficientnet_b0"),
    "densenet": lambda: Classifier("densenet121"),
    "swin": lambda: Classifier("swin_t"),
}
BLOCKS = {
    "dermosegdiff": {"encoder.0.x_block1", "decoder.1.attention", "bottleneck.block2"},
    "deeplabv3plus": {"backbone.layer4.1", "head.aspp", "head.classifier"},
    "unet": {"stem", "encoder.3", "decoder.0"},
    "smp": {"model.encoder.layer1.0", "model.decoder.blocks.4"},
    "segformer": {"model.encoder.block1.0.attn", "model.encoder.block1.0.mlp"},
    "timm": {"model.encoder.model.blocks.2.0"},
    "mobilenet_v2": {"backbone.features.2.conv"},
    "efficientnet": {"backbone.features.2.0.block"},
    "densenet": {"backbone.features.denseblock2.denselayer3"},
    "swin": {"backbone.features.1.0.attn", "backbone.features.1.0.mlp"},
}


def step(network, inputs):
    """Return a loss, the bytes that are kept for its gradients, and these, at one seed."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(*inputs).sigmoid().square().mean()
    parameters = list(network.parameters())
    return loss, sum(kept.values()), torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("name", BUILD)
def test_everything_is_the_same_but_what_is_kept(name):
    network = BUILD[name]().train()
    inputs = (torch.rand(2, 3, 64, 64),)
    if name == "dermosegdiff":
        inputs = (torch.randn(2, 1, 64, 64), *inputs, torch.tensor([3, 7]))
    saving = copy.deepcopy(network)
    blocks = recompute_activations(saving)
    assert set(blocks) >= BLOCKS[name]
    for other in blocks:
        assert not any(path.startswith(f"{other}.") for path in blocks), "none within another"
    for _ in range(2):
        loss, kept, gradients = step(network, inputs)
        their_loss, their_kept, their_gradients = step(saving, inputs)
        assert torch.equal(loss, their_loss)
        assert_equal(gradients, their_gradients)
        assert their_kept < 0.45 * kept
    states = network.state_dict(), saving.state_dict()
    assert list(states[0]) == list(states[1])
    assert_equal(states[0].values(), states[1].values())
    assert_equal([network.eval()(*inputs)], [saving.eval()(*inputs)])


def test_a_copy_computes_with_its_own_weights():
    network = UNet(4).train()
    recompute_activations(network)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    plain = UNet(4).train()
    plain.load_state_dict(copied.state_dict())
    inputs = (torch.rand(2, 3, 32, 32),)
    expected, found = step(plain, inputs), step(copied, inputs)
    assert torch.equal(expected[0], found[0])
    assert_equal(expected[2], found[2])
    assert not torch.equal(found[0], step(network, inputs)[0])


def test_without_gradients_or_training_nothing_is_done_twice():
    network = UNet(4)
    recompute_activations(network)
    calls = []
    network.stem[0].register_forward_hook(lambda *_: calls.append(1))
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        network.train()(image)
    network.eval()(image).sum().backward()
    assert len(calls) == 2
    network.train()(image).sum().backward()
    assert len(calls) == 4


@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_see_a_batch_once(momentum):
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=momentum), nn.Conv2d(4, 2, 1)]
    network = nn.Sequential(nn.Sequential(*layers, nn.Dropout(0.5)))
    plain = copy.deepcopy(network)
    assert recompute_activations(network) == ["0"]
    image = torch.rand(4, 3, 5, 5)
    for _ in range(3):
        for each in (network, plain):
            torch.manual_seed(2)
            each(image).square().sum().backward()
    assert_equal(network.state_dict().values(), plain.state_dict().values())
    assert_equal([p.grad for p in network.parameters()], [p.grad for p in plain.parameters()])
    assert network[0][1].momentum == momentum
    assert network[0][1].num_batches_tracked == 3


def test_features_from_within_a_block_teach_the_same():
    losses = {name: {"weight": 1} for name in ("cross_entropy", "kd", "drkd", "crkd", "hint")}
    settings = {"classes": ("a", "b", "c"), "optimizer": SGD}
    teacher = Classification(
        Classifier("resnet18", 3), losses={"cross_entropy": {"weight": 1}}, **settings
    )
    student = Classifier("mobilenet_v2", 3)
    module = ClassificationDistillation(
        *(student, losses),
        **settings,
        teacher=FrozenTeacher(teacher),
        image_size=64,
        taps={**TAPS, "features": "backbone.features.16.conv.1"},
        teacher_taps={**TAPS, "features": "backbone.layer4"},
    )
    saving = copy.deepcopy(module)
    assert "backbone.features.16.conv" in recompute_activations(saving.network)
    batch = {"image": torch.rand(4, 3, 64, 64), "label": torch.tensor([0, 1, 2, 0])}
    for each in (module, saving):
        torch.manual_seed(1)
        found, _ = each.weighted_losses(batch, each.losses)
        found["loss"].backward()
    assert torch.equal(each.weighted_losses(batch, each.losses)[0]["hint"], found["hint"])
    assert_equal([p.grad for p in module.parameters()], [p.grad for p in saving.parameters()])
