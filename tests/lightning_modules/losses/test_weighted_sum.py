"""Loss terms by name and weight."""

import pytest
import torch

from common.errors import UserError
from lightning_modules.losses import WeightedSum, l1_loss, l2_loss

INPUTS = ("prediction", "target")


def scaled_loss(prediction, target, scale=1.0):
    return (prediction - target).mean() * scale


def refused(prediction, target):
    raise AssertionError("a term of weight 0 was computed")


FUNCTIONS = {"l1": l1_loss, "l2": l2_loss, "scaled": scaled_loss, "refused": refused}
PREDICTION, TARGET = torch.full((2, 1, 2, 2), 3.0), torch.ones(2, 1, 2, 2)


def test_terms_are_weighted_and_reported_unweighted():
    losses = WeightedSum(
        {"l2": {"weight": 0.5}, "scaled": {"weight": 2, "scale": 10.0}}, FUNCTIONS, INPUTS
    )
    total, terms = losses(prediction=PREDICTION, target=TARGET, other=None)
    assert total.item() == 0.5 * 4 + 2 * 20
    assert {k: v.item() for k, v in terms.items()} == {"l2": 4, "scaled": 20}


def test_a_single_term_keeps_its_weight():
    total, _ = WeightedSum({"l2": {"weight": 0.1}}, FUNCTIONS, INPUTS)(
        prediction=PREDICTION, target=TARGET
    )
    assert total.item() == pytest.approx(0.4)


def test_weight_zero_switches_the_computation_off():
    losses = WeightedSum({"l1": {"weight": 1}, "refused": {"weight": 0}}, FUNCTIONS, INPUTS)
    _, terms = losses(prediction=PREDICTION, target=TARGET)
    assert list(terms) == ["l1"]
    assert losses.needs("target")
    assert not losses.needs("mask")


def test_gradient_flows_through_the_total_only():
    prediction = PREDICTION.clone().requires_grad_()
    total, terms = WeightedSum({"l2": {"weight": 1}}, FUNCTIONS, INPUTS)(
        prediction=prediction, target=TARGET
    )
    assert total.requires_grad
    assert not terms["l2"].requires_grad


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"l3": {"weight": 1}}, r"losses.l3 is not a loss term here; choose from l1, l2"),
        ({"scaled": {"weight": 1, "scal": 2}}, r"losses.scaled.scal .* weight, scale"),
        ({"l1": {"weight": 1, "target": 2}}, r"losses.l1.target is not an option"),
        ({"scaled": {"weight": 1, "scale": "2"}}, r"losses.scaled.scale=2 must be a number"),
        ({"scaled": {"weight": 1, "scale": True}}, r"losses.scaled.scale=True must be a number"),
        ({"l1": {"weight": -1}}, r"losses.l1.weight=-1"),
        ({"l1": {}}, r"losses.l1.weight=None"),
        ({"l1": {"weight": 0}}, r"Every weight"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(UserError, match=message):
        WeightedSum(config, FUNCTIONS, INPUTS)


def test_terms_can_be_left_out_by_what_they_use():
    def close(prediction, target):
        return (prediction - target).abs()

    def taught(prediction, teacher):
        return (prediction - teacher).abs()

    functions = {"close": close, "taught": taught}
    inputs = ("prediction", "target", "teacher")
    both = WeightedSum({"close": {"weight": 2}, "taught": {"weight": 3}}, functions, inputs)
    values = {key: torch.tensor(v) for key, v in zip(inputs, (1.0, 3.0, 6.0), strict=True)}
    assert both(**values)[0] == 2 * 2 + 3 * 5
    rest = both.without("teacher")
    assert rest(**values) == (4.0, {"close": 2.0})
    assert both(**values)[0] == 19, "the sum itself is as it was"
    assert both.without("prediction") is None
    assert both.without().weights == both.weights
    assert both.faded(0.5, "teacher")(**values)[0] == 2 * 2 + 1.5 * 5
    assert both.faded(0.5, "prediction")(**values)[0] == 2 + 1.5 * 5
    assert both.faded(0, "teacher")(**values) == (4.0, {"close": 2.0})
    assert both(**values)[0] == 19
