"""UNet: known sizes, the contract of networks, refusals."""

import pytest
import torch

from common.errors import UserError
from networks import UNet


@pytest.mark.parametrize(
    ("base_width", "parameters"), [(16, 1_942_577), (32, 7_763_041), (64, 31_037_633)]
)
def test_widths_have_the_known_sizes(base_width, parameters):
    with torch.device("meta"):
        network = UNet(base_width)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_preset(check_preset):
    check_preset("unet", 7_763_041, 3.018)


def test_it_keeps_the_contract(check_network):
    once = ("stem", *(f"encoder.{i}" for i in range(4)), *(f"decoder.{i}" for i in range(4)))
    check_network(lambda: UNet(4), (32, 48), (16, 16), once=once)


def test_every_level_halves_the_size_and_doubles_the_width():
    network = UNet(4).eval()
    shapes = []
    for part in (network.stem, *network.encoder, *network.decoder):
        part.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    network(torch.randn(1, 3, 32, 48))
    down = [(4, 32, 48), (8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    assert shapes == [*down, *reversed(down[:-1])]


@pytest.mark.parametrize(
    ("size", "legal"), [((30, 16), "32x16"), ((16, 41), "16x48"), ((3, 5), "16x16")]
)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(size, legal):
    message = (
        f"^An image of {size[0]}x{size[1]} pixels does not fit UNet: height and width must be "
        f"multiples of 16, such as {legal}.$"
    )
    with pytest.raises(UserError, match=message):
        UNet(4)(torch.randn(1, 3, *size))


def test_a_width_below_one_is_refused():
    with pytest.raises(UserError, match="network.kwargs.base_width=0 must be at least 1"):
        UNet(0)
