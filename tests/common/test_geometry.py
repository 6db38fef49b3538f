"""Where photographs lie in the square, and back."""

import pytest
import torch

from common.geometry import Box, fitted, restore


def test_a_squashed_image_fills_the_square():
    assert fitted((300, 77), 16, letterbox=False) == Box(0, 0, 16, 16)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 200), Box(16, 0, 32, 64)),
        ((200, 100), Box(0, 16, 64, 32)),
        ((64, 64), Box(0, 0, 64, 64)),
        ((1, 1000), Box(31, 0, 1, 64)),
    ],
)
def test_a_letterboxed_image_keeps_its_proportions(size, expected):
    assert fitted(size, 64, letterbox=True) == expected


def test_restoring_leaves_out_the_margins_and_averages_to_the_same():
    square = torch.full((1, 64, 64), 9.0)
    square[:, 16:48] = torch.linspace(0, 1, 64)
    whole = restore(square, (100, 200), letterbox=True)
    assert whole.shape == (1, 100, 200)
    assert whole.max() <= 1
    assert whole.mean().item() == pytest.approx(0.5, abs=1e-3)
    small = restore(square, (10, 20), letterbox=True)
    assert small.mean().item() == pytest.approx(0.5, abs=1e-2)


def test_restoring_to_the_same_size_changes_nothing():
    square = torch.rand(2, 16, 16)
    torch.testing.assert_close(restore(square, (16, 16)), square)
