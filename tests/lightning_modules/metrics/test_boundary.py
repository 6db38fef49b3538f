"""Distances between outlines: by hand, against MONAI, and where there is no outline."""

import math
import warnings

import numpy as np
import pytest
import torch

from datamodules.synthetic import synthesise_lesion
from lightning_modules.metrics import BOUNDARY_SCORES, boundary_scores


def square(top, left, side, size=32):
    mask = torch.zeros(1, 1, size, size)
    mask[..., top : top + side, left : left + side] = 1
    return mask


def monai_scores(prediction, mask):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

        hd95 = compute_hausdorff_distance(prediction, mask, include_background=True, percentile=95)
        assd = compute_average_surface_distance(
            prediction, mask, include_background=True, symmetric=True
        )
    return hd95[:, 0].double(), assd[:, 0].double()


def made_up_masks(count, size=48):
    masks = []
    for seed in range(count):
        _, mask = synthesise_lesion(0, seed)
        small = torch.from_numpy(mask)[None, None].float()
        masks.append(torch.nn.functional.interpolate(small, (size, size + 16)) > 0.5)
    return torch.cat(masks).float()


def test_scores_are_those_of_monai():
    masks = made_up_masks(12)
    others = masks.roll(1, 0)
    noisy = (masks + 0.8 * torch.rand(masks.shape, generator=torch.Generator().manual_seed(0))) > 1
    for prediction in (others, noisy.float()):
        hd95, assd = monai_scores(prediction, masks)
        ours = boundary_scores(prediction, masks)
        torch.testing.assert_close(ours["hd95"], hd95, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours["assd"], assd, rtol=1e-5, atol=1e-5)


def test_a_shifted_square_by_hand():
    scores = boundary_scores(square(8, 8, 10), square(8, 11, 10))
    # The left side of one, without its corners, is 3 px from the other outline.
    assert scores["hd95"].item() == 3
    diagonal = 32 * math.sqrt(2)
    assert scores["hd95_relative"].item() == pytest.approx(3 / diagonal)
    assert scores["assd_relative"].item() == pytest.approx(scores["assd"].item() / diagonal)
    # Of the 36 pixels of either outline 14 are 3 px or more from the other: the 10 of the far side,
    # and 4 in the middle of the near side.
    assert scores["boundary_f1"].item() == pytest.approx(22 / 36)
    assert boundary_scores(square(8, 8, 10), square(8, 11, 10), 3.0)["boundary_f1"].item() == 1


@pytest.mark.parametrize(("shift", "f1"), [(0, 1.0), (1, 1.0), (2, 1.0), (9, 0.0)])
def test_boundary_f1_forgives_two_pixels(shift, f1):
    # A single pixel is its own outline.
    score = boundary_scores(square(8, 8, 1), square(8, 8 + shift, 1))["boundary_f1"].item()
    assert score == f1


def test_masks_that_touch_the_border_have_an_outline_there():
    full = torch.ones(1, 1, 16, 16)
    scores = boundary_scores(full, square(4, 4, 8, size=16))
    assert scores["hd95"].item() == pytest.approx(4 * math.sqrt(2), abs=1.7)
    assert boundary_scores(full, full)["assd"].item() == 0


def test_empty_masks_have_defined_scores():
    empty, lesion = torch.zeros(1, 1, 30, 40), torch.ones(1, 1, 30, 40)
    agreed = boundary_scores(empty, empty)
    assert {name: value.item() for name, value in agreed.items()} == {
        "hd95": 0,
        "hd95_relative": 0,
        "assd": 0,
        "assd_relative": 0,
        "boundary_f1": 1,
    }
    for prediction, mask in ((empty, lesion), (lesion, empty)):
        wrong = boundary_scores(prediction, mask)
        assert {name: value.item() for name, value in wrong.items()} == {
            "hd95": 50,
            "hd95_relative": 1,
            "assd": 50,
            "assd_relative": 1,
            "boundary_f1": 0,
        }


@pytest.mark.parametrize(("height", "width"), [(2300, 3100), (1, 5000)])
def test_distances_are_exact_in_large_images(height, width):
    first, second = torch.zeros(2, 1, 1, height, width)
    first[..., 0, 0] = 1
    second[..., height - 1, width - 2 :] = 1
    far, near = math.hypot(height - 1, width - 1), math.hypot(height - 1, width - 2)
    scores = boundary_scores(first[None, 0], second[None, 0])
    # Of the pair of pixels one is as far as the other pixel is near, to the last bit.
    assert scores["hd95"].item() == np.percentile([near, far], 95)
    assert scores["assd"].item() == np.mean([near, near, far])


def test_distances_are_those_of_all_pairs():
    masks = made_up_masks(3, size=40)
    noisy = (torch.rand(masks.shape, generator=torch.Generator().manual_seed(1)) > 0.6).float()
    for prediction in (masks.roll(1, 0), noisy):
        found = boundary_scores(prediction, masks)
        for index in range(3):
            points = []
            for mask in (prediction[index, 0], masks[index, 0]):
                inside = torch.nn.functional.pad(mask, (1, 1, 1, 1)) > 0.5
                crossed = [inside.roll(step, axis) for step in (1, -1) for axis in (0, 1)]
                outline = inside & ~torch.stack(crossed).all(0)
                points.append(outline.nonzero().numpy())
            apart = np.hypot(*(points[0][:, None] - points[1]).transpose(2, 0, 1))
            there, back = apart.min(1), apart.min(0)
            assert found["assd"][index].item() == pytest.approx(np.append(there, back).mean())
            hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
            assert found["hd95"][index].item() == pytest.approx(hd95, rel=1e-12)


def test_images_of_a_batch_do_not_mix():
    masks, others = made_up_masks(4), made_up_masks(4).flip(0)
    together = boundary_scores(others, masks)
    assert set(together) == set(BOUNDARY_SCORES)
    for index in range(4):
        alone = boundary_scores(others[[index]], masks[[index]])
        assert all(alone[name].item() == together[name][index].item() for name in BOUNDARY_SCORES)
