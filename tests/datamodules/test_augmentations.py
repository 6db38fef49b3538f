"""Augmentation policies: deterministic, joint on image and mask, strict about arguments."""

import numpy as np
import pytest
import yaml

from common.errors import UserError
from datamodules.augmentations import Augmentation


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    mask = (rng.random((16, 16)) > 0.5).astype(np.uint8)
    return np.repeat(mask[..., None] * 200, 3, axis=2), mask


def test_the_light_policy_moves_image_and_mask_together(make_config):
    augmentation = Augmentation(**make_config("augmentation=light")["augmentation"])
    mask = np.zeros((96, 96), np.uint8)
    mask[36:60, 40:56] = 1
    # Where the image is the mask itself, it must stay so but for a blurred border.
    image = np.repeat(mask[..., None] * 255, 3, axis=2)
    agreement, zoom = [], []
    for seed in range(60):
        moved, moved_mask = augmentation(image, mask, seed)
        assert set(np.unique(moved_mask)) <= {0, 1}
        assert moved.shape == image.shape
        agreement.append(((moved.mean(axis=2) > 127) == moved_mask).mean())
        zoom.append(moved_mask.sum() / mask.sum())
    assert min(agreement) > 0.98
    assert min(zoom) < 0.8
    assert max(zoom) > 3


def test_transforms_of_equal_probability_fire_independently(picture, make_config):
    augmentation = Augmentation(**make_config("augmentation=flips")["augmentation"])
    image, mask = picture
    results = [augmentation(image, mask, seed) for seed in range(60)]
    assert all(np.array_equal(i[..., 0], m * 200) for i, m in results)
    assert len({m.tobytes() for _, m in results}) == 8, "the eight symmetries of a square"


def test_the_result_depends_on_the_seed_only(picture):
    spec = yaml.safe_load("[{name: HorizontalFlip, p: 0.5}, {name: GaussNoise, p: 1.0}]")
    one, two = Augmentation(spec), Augmentation(spec)
    first = [one(*picture, seed)[0] for seed in (1, 2, 3)]
    again = [two(*picture, seed)[0] for seed in (3, 2, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert not np.array_equal(first[0], first[1])


def test_the_policy_has_a_probability_of_its_own(picture):
    never = Augmentation([{"name": "HorizontalFlip", "p": 1.0}], p=0.0)
    assert np.array_equal(never(*picture, 0)[1], picture[1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "Flipp"}, "'Flipp'"),
        ({"name": "Compose"}, "'Compose'"),
        ({"p": 0.5}, "''"),
        ({"name": "GaussNoise", "var_limit": [10, 50]}, "GaussNoise.*var_limit"),
        ({"name": "Sharpen", "alpha": 0.5}, "Sharpen refuses"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        Augmentation([spec])
