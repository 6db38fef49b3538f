"""Where photographs lie in the square, and back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.geometry import Box, fitted, interpolation_weights, restore


def test_a_squashed_image_fills_the_square():
    assert fitted((300, 77), 16, letterbox=False) == Box(0, 0, 16, 16)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 200), Box(16, 0, 32, 64)),
        ((200, 100), Box(0, 16, 64, 32)),
        ((64, 64), Box(0, 0, 64, 64)),
        ((1, 1000), Box(31.968, 0, 0.064, 64)),
    ],
)
def test_a_letterboxed_image_keeps_its_proportions(size, expected):
    assert fitted(size, 64, letterbox=True) == pytest.approx(expected)


def test_restoring_leaves_out_the_margins_and_averages_to_the_same():
    square = torch.full((1, 64, 64), 9.0)
    square[:, 16:48] = torch.linspace(0, 1, 64)
    whole = restore(square, (100, 200), letterbox=True)
    assert whole.shape == (1, 100, 200)
    assert whole.max() <= 1
    assert whole.mean().item() == pytest.approx(0.5, abs=2e-3)
    small = restore(square, (10, 20), letterbox=True)
    assert small.mean().item() == pytest.approx(0.5, abs=1e-2)


def test_restoring_to_the_same_size_changes_nothing():
    square = torch.rand(2, 16, 16)
    torch.testing.assert_close(restore(square, (16, 16)), square)


@pytest.mark.parametrize("kernel", ["linear", "cubic"])
@pytest.mark.parametrize("cells", [7, 16, 23, 64])
def test_weights_are_those_of_pytorch(kernel, cells):
    line = torch.rand(1, 1, 1, 16, dtype=torch.float64)
    mode = {"linear": "bilinear", "cubic": "bicubic"}[kernel]
    weights = interpolation_weights(16, cells, 0, 16 / cells, kernel, lowpass=False)
    expected = F.interpolate(line, (1, cells), mode=mode)[0, 0, 0].numpy()
    np.testing.assert_allclose(weights @ line[0, 0, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("start", [-3.3, 0.0, 5.5])
@pytest.mark.parametrize("step", [0.2, 1.0, 4.7])
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_weights_sum_to_one_and_have_no_bias(start, step, kernel):
    weights = interpolation_weights(40, 8, start, step, kernel)
    np.testing.assert_allclose(weights.sum(1), 1)
    centres = start + (np.arange(8) + 0.5) * step
    reach = 2 * max(1, step) + 1
    inside = (centres > reach) & (centres < 40 - reach)
    found = weights @ (np.arange(40) + 0.5)
    np.testing.assert_allclose(found[inside], centres[inside], atol=0.05 * max(1, step))


@pytest.mark.parametrize("size", [(40, 33), (111, 37), (9, 300)])
@pytest.mark.parametrize("letterbox", [False, True])
def test_turning_before_restoring_is_turning_after(size, letterbox):
    square = torch.rand(1, 32, 32)
    whole = restore(square, size, letterbox)
    for axis in (-1, -2):
        mirrored = restore(square.flip(axis), size, letterbox)
        torch.testing.assert_close(mirrored, whole.flip(axis), rtol=0, atol=1e-5)
    turned = restore(square.rot90(1, (-2, -1)), size[::-1], letterbox)
    torch.testing.assert_close(turned, whole.rot90(1, (-2, -1)), rtol=0, atol=1e-5)


def test_restoring_stays_within_the_range_of_the_map():
    step = torch.zeros(1, 16, 16)
    step[..., 8:] = 1
    whole = restore(step, (50, 70))
    assert (whole.min(), whole.max()) == (0, 1)
