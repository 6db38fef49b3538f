"""Optimizers by name."""

import pytest
import torch

from common.errors import UserError
from lightning_modules.optimizers import build_optimizer


def parameters():
    return [torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.ones(3))]


def test_the_published_adam_takes_its_first_step():
    weights = parameters()
    optimizer = build_optimizer(weights, {"name": "Adam", "lr": 0.1, "betas": [0.7, 0.99]})
    (weights[0].square().sum() + weights[1].sum()).backward()
    optimizer.step()
    torch.testing.assert_close(weights[0].data, torch.tensor([0.9, -1.9]))
    torch.testing.assert_close(weights[1].data, torch.full((3,), 0.9))
    assert all(weight.grad is None for weight in weights), "held no longer than needed"


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_all_tensors_are_updated_at_once_unless_fused(name):
    assert build_optimizer(parameters(), {"name": name, "lr": 0.1}).defaults["foreach"] is True
    fused = build_optimizer(parameters(), {"name": name, "lr": 0.1, "fused": True})
    assert not fused.defaults["foreach"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "Lion", "lr": 0.1}, "optimizer.name=Lion does not exist; choose one of Adam"),
        ({"name": "Adam", "lr": -1}, "refused by Adam.*learning rate"),
        ({"name": "SGD", "lr": 0.1, "betas": [0.7, 0.99]}, "refused by SGD.*betas"),
        ({"name": "Adam", "lr": 0.1, "fused": True, "foreach": True}, "refused by Adam"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(parameters(), settings)
