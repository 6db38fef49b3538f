"""Adapters: the reference's outputs, the published sizes and which shapes one leads to."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from lightning_modules.adapters import ChannelAdapter, ProjectionHead


def test_the_adapter_is_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "convreg_forward_train")
    assert len(cases) == 3
    for case in cases:
        features, expected = case.inputs["x"], case.outputs["out"]
        adapter = ChannelAdapter(features.shape[1:], expected.shape[1:])
        weights = case.heads("reg_")
        adapter.load_state_dict({k.replace("_", ".", 1): v for k, v in weights.items()})
        near = case.near("loss")
        torch.testing.assert_close(adapter(features).detach(), expected, **near)
        for name in ("running_mean", "running_var"):
            after = case.outputs[f"bn_{name}_after"]
            torch.testing.assert_close(getattr(adapter.bn, name), after, **near)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        assert parameters(ChannelAdapter((1280, 7, 7), (2048, 7, 7))) == 2_627_584
        assert parameters(ProjectionHead(2048)) == 8_392_704
        assert parameters(ProjectionHead(1280)) == 3_279_360


@pytest.mark.parametrize(
    ("size", "teacher_size", "kind", "kernel", "stride", "padding"),
    [
        ((7, 7), (7, 7), nn.Conv2d, (1, 1), 1, 0),
        ((5, 9), (5, 9), nn.Conv2d, (1, 1), 1, 0),
        ((14, 14), (7, 7), nn.Conv2d, (3, 3), 2, 1),
        ((6, 10), (3, 5), nn.Conv2d, (3, 3), 2, 1),
        ((7, 7), (14, 14), nn.ConvTranspose2d, (4, 4), 2, 1),
        ((3, 5), (6, 10), nn.ConvTranspose2d, (4, 4), 2, 1),
        ((8, 8), (7, 7), nn.Conv2d, (2, 2), 1, 0),
        ((9, 9), (3, 3), nn.Conv2d, (7, 7), 1, 0),
        ((8, 4), (4, 4), nn.Conv2d, (5, 1), 1, 0),
        ((2, 2), (1, 1), nn.Conv2d, (3, 3), 2, 1),
    ],
)
def test_the_convolution_follows_the_sizes(size, teacher_size, kind, kernel, stride, padding):
    adapter = ChannelAdapter((3, *size), (5, *teacher_size))
    assert type(adapter.conv) is kind
    assert adapter.conv.kernel_size == kernel
    assert adapter.conv.stride == (stride, stride)
    assert adapter.conv.padding == (padding, padding)
    assert adapter.conv.bias.shape == (5,)
    features = torch.randn(4, 3, *size, requires_grad=True)
    output = adapter(features)
    assert output.shape == (4, 5, *teacher_size)
    assert output.min() == 0, "of a ReLU"
    output.square().sum().backward()
    for tensor in (features, *adapter.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(
    ("size", "teacher_size"), [((7, 7), (8, 8)), ((3, 3), (7, 7)), ((14, 7), (7, 14))]
)
def test_a_map_that_cannot_grow_is_refused(size, teacher_size):
    shapes = f"{(3, *size)} to the teacher's {(5, *teacher_size)}"
    message = shapes.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=message + ".*feature paths whose maps are of like size"):
        ChannelAdapter((3, *size), (5, *teacher_size))


def test_shapes_may_be_those_of_tensors():
    features = torch.randn(2, 3, 4, 4)
    adapter = ChannelAdapter(features.shape[1:], torch.zeros(5, 4, 4).shape)
    assert adapter(features).shape == (2, 5, 4, 4)


def test_the_projection_is_two_layers_with_a_relu_between():
    head = ProjectionHead(6)
    assert list(head.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    pooled = torch.randn(5, 6)
    hidden = (pooled @ head[0].weight.T + head[0].bias).clamp(min=0)
    torch.testing.assert_close(head(pooled), hidden @ head[2].weight.T + head[2].bias)
