"""Losses against masks: the references' numbers, by hand, grey edges and extreme logits."""

import math

import pytest
import torch

from common.errors import UserError
from lightning_modules.losses import WeightedSum, bce_loss, dice_loss, focal_loss

FUNCTIONS = {"bce": bce_loss, "dice": dice_loss, "focal": focal_loss}
ALL = list(FUNCTIONS.values())


def weighted(config, **inputs):
    return WeightedSum(config, FUNCTIONS, tuple(inputs))(**inputs)[0]


def column(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_the_dice_loss_of_a_batch_is_the_deeplab_references(golden_cases):
    cases = golden_cases("deeplab_kd", "dice_soft")
    assert len(cases) == 5
    config = {"dice": {"weight": 1, "smooth": 1e-6, "per_image": False}}
    for case in cases:
        case.check(
            weighted(config, logits=case.inputs["logits"], mask=case.inputs["target"]),
        )


def test_the_dice_loss_of_the_distilled_unet(golden_cases):
    cases = golden_cases("distilled_unet", "dice_loss")
    assert len(cases) == 4
    for case in cases:
        options = {
            "smooth": case.params["smooth"],
            "per_image": case.params["reduction"] == "sample",
        }
        loss = dice_loss(case.inputs["logits"], case.inputs["target"], **options)
        assert loss.dtype == torch.float64
        case.check(loss)


def test_the_label_loss_is_the_deeplab_references(golden_cases):
    cases = golden_cases("deeplab_kd", "student_distill_label_only")
    assert len(cases) == 2
    for case in cases:
        logits, mask = case.inputs["student_main"], case.inputs["target"]
        case.check(weighted({"bce": {"weight": 1}}, logits=logits, mask=mask))


# Logits of the probabilities 1/2 and 3/4 against masks of 1 and 0.
LOGITS, MASK = column(0.0, math.log(3)), column(1.0, 0.0)


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        (bce_loss, {}, (math.log(2) + math.log(4)) / 2),
        (dice_loss, {}, (0.2 + 1 - 1 / 1.75) / 2),
        (dice_loss, {"per_image": False}, 1 - 2 / 3.25),
        (dice_loss, {"per_image": False, "smooth": 1e-9}, 1 - 1 / 2.25),
        (focal_loss, {}, (0.25 * 0.25 * math.log(2) + 0.75 * 0.5625 * math.log(4)) / 2),
        (focal_loss, {"gamma": 1.0}, (0.25 * 0.5 * math.log(2) + 0.75**2 * math.log(4)) / 2),
        (focal_loss, {"alpha": -1}, (0.25 * math.log(2) + 0.5625 * math.log(4)) / 2),
        (focal_loss, {"alpha": -1, "gamma": 0}, (math.log(2) + math.log(4)) / 2),
    ],
)
def test_values_by_hand(loss, options, expected):
    assert loss(LOGITS, MASK, **options).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ALL)
def test_half_precision_is_computed_in_float32(loss):
    logits, mask = torch.randn(2, 1, 8, 8).bfloat16(), torch.rand(2, 1, 8, 8).bfloat16()
    value = loss(logits, mask)
    assert value.dtype == torch.float32
    assert value == loss(logits.float(), mask.float())
    assert loss(logits.double(), mask.float()).dtype == torch.float64


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_logits_are_finite(loss, size):
    logits = column(size, size, -size, -size).requires_grad_()
    value = loss(logits, column(0.0, 1.0, 0.0, 1.0))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0, 1, 1.5, 2.0])
def test_pixels_that_are_quite_right_have_a_focal_gradient(gamma):
    logits = column(200.0, -200.0).requires_grad_()
    focal_loss(logits, column(1.0, 0.0), gamma=gamma).backward()
    assert logits.grad.tolist() == column(0.0, 0.0).tolist()


@pytest.mark.parametrize("loss", ALL)
def test_soft_masks_lie_between_the_hard_ones(loss):
    logits = torch.full((1, 1, 4, 4), 0.8)
    low, soft, high = (loss(logits, torch.full_like(logits, y)) for y in (1.0, 0.7, 0.0))
    assert low < soft < high


def test_the_cross_entropy_of_a_soft_mask_is_least_at_the_mask():
    mask = torch.full((1, 1, 2, 2), 0.3)
    logits = torch.logit(mask).requires_grad_()
    bce_loss(logits, mask).backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(mask), rtol=0, atol=1e-7)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 5.0])
def test_the_focal_loss_of_a_soft_mask_is_least_beyond_the_mask(gamma):
    logits = torch.linspace(-12, 12, 481)
    for y in (0.1, 0.3, 0.5, 0.7, 0.9):
        each = [focal_loss(z, torch.full_like(z, y), -1, gamma) for z in logits.view(-1, 1, 1, 1)]
        values = torch.stack(each)
        best = logits[values.argmin()].sigmoid().item()
        assert values.min() > 0
        falls = values.diff() < 0
        assert (falls.int().diff() <= 0).all(), "one valley"
        assert abs(best - 0.5) >= abs(y - 0.5) - 0.02
        assert (best - 0.5) * (y - 0.5) >= 0


def test_smoothing_makes_empty_masks_harmless():
    empty = torch.zeros(2, 1, 8, 8)
    assert dice_loss(torch.full_like(empty, -50), empty) < 1e-6
    half = dice_loss(empty, empty, per_image=True)
    assert half.item() == pytest.approx(1 - 1 / 33)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (dice_loss, {"smooth": 0.0}, "losses.dice.smooth=0"),
        (dice_loss, {"smooth": -1}, "losses.dice.smooth=-1"),
        (focal_loss, {"alpha": 1.1}, "losses.focal.alpha=1.1 .* -1 is off"),
        (focal_loss, {"alpha": -0.5}, "losses.focal.alpha=-0.5"),
        (focal_loss, {"alpha": math.nan}, "losses.focal.alpha=nan"),
        (focal_loss, {"gamma": -1}, "losses.focal.gamma=-1"),
        (focal_loss, {"gamma": 0.5}, "losses.focal.gamma=0.5 must be at least 1; 0 is off"),
        (focal_loss, {"gamma": math.nan}, "losses.focal.gamma=nan"),
    ],
)
def test_options_out_of_range_are_named(loss, options, message):
    with pytest.raises(UserError, match=message):
        loss(LOGITS, MASK, **options)
