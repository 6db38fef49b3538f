"""Trivial baselines by hand."""

import numpy as np
import pytest
import torch

from tasks.baselines import (
    best_constant_mask,
    majority_baseline,
    otsu_mask,
    trivial_baselines,
)


def test_otsu_takes_the_darker_side():
    image = np.full((3, 20, 20), 0.8, np.float32)
    image[:, 5:12, 6:14] = 0.3
    mask = otsu_mask(image)
    assert mask.dtype == bool
    assert np.array_equal(mask, image[0] < 0.5)
    assert np.array_equal(otsu_mask(image * 4 - 2), mask), "whatever the normalisation"


def test_best_constant_mask_beats_every_other_level_set():
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[:, 1:3, 1:3] = 1
    masks[2, 0] = 1
    expected = np.zeros((4, 4), bool)
    expected[1:3, 1:3] = True
    assert np.array_equal(best_constant_mask(masks), expected)


def test_scores_are_means_over_the_test_images():
    train = np.zeros((2, 4, 4), np.uint8)
    train[:, :2] = 1
    images = torch.ones(2, 3, 4, 4)
    images[:, :, :2] = 0.1

    class Items:
        masks = torch.stack([images[0, :1] < 0.5, images[0, :1] > 0.5]).float()

        def __len__(self):
            return 2

        def __getitem__(self, key):
            return {"image": images[key[1]], "mask": self.masks[key[1]]}

    scores = trivial_baselines(train, Items())
    assert scores == {"otsu": pytest.approx(0.5), "constant": pytest.approx(0.5)}


def test_the_most_frequent_class_is_right_in_one_class_of_those_present():
    train = np.array([2, 2, 2, 0, 1])
    assert majority_baseline(train, np.array([0, 2, 2, 1, 3])) == {"majority": 0.25}
    assert majority_baseline(train, np.array([0, 0, 1])) == {"majority": 0.0}
