"""Our own augmentations: the same maps as the library's, affines and drops of the promised size."""

import os

import cv2
import numpy as np
import pytest

from datamodules.augmentation_transforms import (
    add_drops,
    piecewise_affine_map,
    rain_drops,
    then_affine,
    triangle_affine,
)

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
from albumentations.augmentations.geometric.functional import create_piecewise_affine_maps


def library_map(shape, grid, scale, seed):
    return create_piecewise_affine_maps(shape, grid, scale, False, np.random.default_rng(seed))


def own_map(shape, grid, scale, seed):
    jitter_std = scale * min(shape) / 3
    return piecewise_affine_map(shape, grid, jitter_std, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("shape", "grid", "scale"),
    [((24, 24), (4, 4), 0.04), ((20, 31), (2, 5), 0.05), ((25, 16), (3, 2), 0.5)],
)
def test_the_piecewise_affine_map_is_the_library_s(shape, grid, scale):
    for seed in range(3):
        own, library = own_map(shape, grid, scale, seed), library_map(shape, grid, scale, seed)
        np.testing.assert_allclose(own, library, atol=2e-4)
        assert own[0].shape == shape
        assert own[0].dtype == np.float32


def test_the_piecewise_affine_displacement_has_the_library_s_statistics():
    shape, grid = (64, 64), (4, 4)
    scales = np.random.default_rng(0).uniform(0.03, 0.05, 48)
    library = np.array([library_map(shape, grid, s, i) for i, s in enumerate(scales)])
    own = np.array([own_map(shape, grid, s, 1000 + i) for i, s in enumerate(scales)])
    interior = np.zeros(shape, bool)
    interior[16:-16, 16:-16] = True
    border = np.ones(shape, bool)
    border[1:-1, 1:-1] = False
    for region in (interior, border):
        spread, expected = (maps.std(axis=0)[:, region].mean() for maps in (own, library))
        assert spread == pytest.approx(expected, rel=0.1)
        assert expected > 0.3, "px"
    np.testing.assert_allclose(own.mean(axis=0), library.mean(axis=0), atol=0.6)


def test_without_pull_the_piecewise_affine_keeps_the_spread_and_loses_the_bias():
    def maps(jitter_std, pull):
        rngs = (np.random.default_rng(seed) for seed in range(200))
        return np.array(
            [piecewise_affine_map((48, 40), (4, 4), jitter_std, rng, pull) for rng in rngs]
        )

    identity = np.indices((48, 40))[::-1]
    free, pulled = maps(0.5, False), maps(0.5, True)
    np.testing.assert_allclose(free.std(axis=0), pulled.std(axis=0), atol=0.1)
    assert free.std(axis=0).mean() == pytest.approx(pulled.std(axis=0).mean(), rel=0.03)
    assert np.abs(free.mean(axis=0) - identity).max() < 0.3
    assert np.abs(pulled.mean(axis=0) - identity).max() > 3
    np.testing.assert_allclose(maps(0, False)[0], identity, atol=1e-4)
    inside = slice(8, -8)
    spread = [maps(std, False).std(axis=0)[:, inside, inside].mean() for std in (0.5, 1.0)]
    assert spread[1] == pytest.approx(2 * spread[0], rel=0.02)
    far = maps(20, False)
    assert far.min() == 0
    assert far[:, 0].max() == 39
    assert far[:, 1].max() == 47


def test_the_triangle_moves_by_its_reach():
    corners = np.float32([60, 40]) + np.float32([[1, 1], [1, -1], [-1, -1]]) * 80 / 3
    moves = []
    for seed in range(200):
        matrix = triangle_affine((80, 120), 9, np.random.default_rng(seed))
        moved = cv2.transform(corners[None], cv2.invertAffineTransform(matrix))[0]
        moves.append(moved - corners)
    assert np.abs(moves).max() == pytest.approx(9, abs=0.2)
    assert np.mean(moves) == pytest.approx(0, abs=0.5)
    assert np.std(moves) == pytest.approx(9 / np.sqrt(3), rel=0.05)
    still = triangle_affine((80, 120), 0, np.random.default_rng(0))
    np.testing.assert_allclose(still, [[1, 0, 0], [0, 1, 0]], atol=1e-5)


def test_an_affine_follows_a_map():
    map_x, map_y = np.meshgrid(np.arange(5.0), np.arange(4.0))
    matrix = np.array([[2.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    x, y = then_affine(np.float32(map_x), np.float32(map_y), matrix)
    np.testing.assert_allclose(x, 2 * map_x + 1)
    np.testing.assert_allclose(y, 0.5 * map_x + map_y)


# A layer of std 60, blurred by 2 px, has std 60 / (2 sqrt(pi) 2) = 8.5. Half of what is deeper than
# the threshold faces the light.
@pytest.mark.parametrize(
    ("mean", "std", "gauss_sigma", "cutout_threshold", "coverage"),
    [
        (0, 60, 2, 5, 0.139),
        (0, 80, 3, 7, 0.088),
        (0, 120, 2, 5, 0.192),
        (5, 60, 2, 5, 0.25),
        (0, 60, 2, 15, 0.019),
        (0, 60, 4, 5, 0.059),
    ],
)
def test_drops_cover_what_their_arguments_say(mean, std, gauss_sigma, cutout_threshold, coverage):
    drops = [
        rain_drops(
            (128, 128), mean, std, gauss_sigma, cutout_threshold, np.random.default_rng(seed)
        )
        for seed in range(20)
    ]
    # The blur repeats the border's pixels, which makes the layer more uneven there.
    inside = np.array(drops)[:, 16:-16, 16:-16]
    assert np.mean(inside > 0) == pytest.approx(coverage, rel=0.15)
    assert all(d.max() == pytest.approx(1) and d.min() == 0 for d in drops)


def test_a_dry_lens_has_no_drops():
    drops = rain_drops((16, 16), 0, 1, 2, 100, np.random.default_rng(0))
    assert np.array_equal(drops, np.zeros((16, 16), np.float32))


def test_drops_are_tinted_by_their_intensity():
    image = np.full((2, 2, 3), 200, np.uint8)
    drops = np.float32([[0, 0.1], [0.5, 1]])
    dark, bright = add_drops(image, drops, -1), add_drops(image, drops, 0.5)
    assert dark.dtype == np.uint8
    assert dark[0].tolist() == [[200, 200, 200], [176, 176, 182]]
    assert dark[1].tolist() == [[81, 81, 112], [0, 0, 25]]
    assert bright[1].tolist() == [[255, 255, 243], [255, 255, 255]]
