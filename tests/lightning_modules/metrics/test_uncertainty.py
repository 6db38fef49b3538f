"""Doubt, calibration and referral by hand and against torchmetrics."""

import pytest
import torch
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.classification import binary_calibration_error

from lightning_modules.metrics import (
    CalibrationError,
    DoubtScores,
    doubt,
    expected_dice,
    uncertainty_correlation,
)


def test_doubt_is_the_ensembles_where_there_is_one():
    chance = torch.tensor([0.0, 0.1, 0.5, 1.0]).view(1, 1, 2, 2)
    assert doubt({"probability": chance}).flatten().tolist() == pytest.approx([0, 0.3, 0.5, 0])
    spread = torch.full_like(chance, 0.2)
    assert torch.equal(doubt({"probability": chance, "uncertainty": spread}), spread)
    # Samples that are certain, of which a tenth say lesion, have that standard deviation.
    samples = torch.tensor([1.0] + [0.0] * 9)
    assert samples.std(correction=0).item() == pytest.approx(0.3)


def test_the_expected_dice_by_hand():
    chance = torch.tensor([[0.9, 0.6, 0.2, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4, [0.4] * 4])
    found = expected_dice(chance.view(4, 1, 2, 2))
    assert found.tolist() == pytest.approx([2 * 1.5 / (1.7 + 2), 1, 1, 0])


def test_the_expected_dice_is_that_of_masks_drawn_from_the_probability():
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(1, 1, 64, 64, generator=generator) ** 2
    truths = torch.rand(200, 64 * 64, generator=generator) < chance.flatten()
    mask = chance.flatten() > 0.5
    dice = 2 * (truths & mask).sum(1) / (truths.sum(1) + mask.sum())
    assert expected_dice(chance).item() == pytest.approx(dice.mean().item(), abs=0.005)


def test_the_correlation_is_pearsons_for_each_image():
    generator = torch.Generator().manual_seed(0)
    unsure = torch.rand(3, 1, 20, 20, generator=generator)
    wrong = torch.rand(3, 1, 20, 20, generator=generator) < unsure
    found = uncertainty_correlation(unsure, wrong)
    for index in range(3):
        pair = torch.stack((unsure[index].flatten(), wrong[index].flatten().float()))
        assert found[index].item() == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-5)
    assert uncertainty_correlation(unsure, torch.zeros_like(wrong)).tolist() == [0, 0, 0]
    assert uncertainty_correlation(torch.full_like(unsure, 0.5), wrong).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_calibration_error_is_that_of_torchmetrics(bins):
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(4, 1, 30, 30, generator=generator)
    mask = (torch.rand(chance.shape, generator=generator) < chance**2).float()
    metric = CalibrationError(bins)
    metric.update(chance[:1], mask[:1])
    metric.update(chance[1:], mask[1:])
    theirs = binary_calibration_error(chance.flatten(), mask.flatten().long(), n_bins=bins)
    assert metric.compute().item() == pytest.approx(theirs.item(), abs=1e-5)


def test_calibrated_and_certain_probabilities_have_no_error():
    metric = CalibrationError()
    mask = torch.tensor([0.0, 1.0, 1.0])
    metric.update(mask, mask)
    assert metric.compute() == 0
    metric.update(1 - mask, mask)
    assert metric.compute() == 0.5


def test_referral_leaves_out_the_most_doubtful_images():
    doubts = torch.arange(20) / 20
    dices = 1 - doubts**2
    metric = DoubtScores(referral=0.1)
    order = torch.randperm(20)
    for rows in order.split(7):
        metric.update(doubts[rows], dices[rows])
    scores = metric.compute()
    assert scores["doubt_correlation"] == pytest.approx(1)
    assert scores["referral_dice"].item() == pytest.approx(dices[:18].mean().item())
    mixed = DoubtScores(referral=0)
    mixed.update(doubts, dices[order])
    expected = spearman_corrcoef(doubts, 1 - dices[order])
    assert mixed.compute()["doubt_correlation"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert mixed.compute()["referral_dice"].item() == pytest.approx(dices.mean().item())


@pytest.mark.parametrize("count", [1, 3, 7, 10, 100, 1000])
def test_the_referral_share_is_rounded_down_exactly(count):
    dices = torch.arange(count).double()
    for percent in range(100):
        metric = DoubtScores(referral=percent / 100)
        # The images of the highest Dice are the most uncertain.
        metric.update(dices, dices)
        kept = max(1, count - percent * count // 100)
        assert metric.compute()["referral_dice"].item() == (kept - 1) / 2


def test_a_pixel_that_is_not_finite_has_the_largest_calibration_error():
    chance, mask = torch.tensor([0.0, 1.0, torch.nan, -torch.inf]), torch.tensor([0.0, 1, 1, 0])
    metric = CalibrationError()
    metric.update(chance, mask)
    assert metric.compute() == 0.5


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images_have_defined_scores(count):
    metric = DoubtScores()
    if count:
        metric.update(torch.full((count,), 0.5), torch.full((count,), 0.8))
    scores = metric.compute()
    assert scores["doubt_correlation"] == 0
    assert scores["referral_dice"].item() == pytest.approx(0.8 if count else 0)
