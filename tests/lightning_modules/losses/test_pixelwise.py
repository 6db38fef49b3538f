"""Plain losses by hand."""

import pytest
import torch

from lightning_modules.losses import huber_loss, l1_loss, l2_loss

PREDICTION = torch.tensor([0.0, 0.5, 3.0]).view(1, 1, 1, 3)
TARGET = torch.zeros(1, 1, 1, 3)


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        (l1_loss, {}, 3.5 / 3),
        (l2_loss, {}, 9.25 / 3),
        (huber_loss, {}, (0.125 + 2.5) / 3),
        (huber_loss, {"delta": 0.5}, (0.125 + 0.5 * 2.75) / 3),
    ],
)
def test_values(loss, options, expected):
    assert loss(PREDICTION, TARGET, **options).item() == pytest.approx(expected)
    assert loss(PREDICTION.bfloat16(), TARGET, **options).dtype == torch.float32


@pytest.mark.parametrize("loss", [l1_loss, l2_loss, huber_loss])
def test_a_time_weight_is_a_factor_of_each_sample(loss):
    prediction, target = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    each = torch.stack([loss(p, t) for p, t in zip(prediction, target, strict=True)])
    weight = torch.tensor([0.5, 0.0, 2.0])
    torch.testing.assert_close(loss(prediction, target, time_weight=weight), (each * weight).mean())
    torch.testing.assert_close(loss(prediction, target), each.mean())
