"""Boundary weighting and its loss against the reference, and where the reference is mended."""

import pytest
import torch

from common.errors import UserError
from datamodules import edge_distance
from lightning_modules.losses import boundary_loss, boundary_weight


def distances(mask):
    return torch.stack([edge_distance(sample[:1]) for sample in mask])


def test_weights_match_the_reference(golden, manifest):
    values = golden("boundary_attention")
    for case in manifest["files"]["boundary_attention.npz"]["cases"]:
        key = case["key"]
        mask, t = values[f"{key}_x"], values[f"{key}_t"]
        weight = boundary_weight(distances(mask), mask, t, case["T"], case["gamma"])
        expected = values[f"{key}_W"]
        if case["name"] == "full_sample_in_mixed_batch":
            # The reference gives NaN for a full mask beside others; here it has no edge: ones.
            assert expected[0].isnan().all()
            assert torch.equal(weight[0], torch.ones(1, 32, 32))
            weight, expected = weight[1:], expected[1:]
        if case["name"] == "soft_values":
            continue  # Covered by the test below.
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected, rtol=0, atol=2e-6)


def test_soft_masks_are_cut_at_one_half(golden):
    soft = golden("boundary_attention")["c08_x"]
    t = golden("boundary_attention")["c08_t"]
    hard = (soft > 0).float()
    unit = (soft + 1) / 2
    weight = boundary_weight(distances(unit), unit, t, 250, 0.2)
    assert torch.equal(weight, boundary_weight(distances(hard), hard, t, 250, 0.2))


def test_both_mask_ranges_give_the_same():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:20, 5:25] = 1
    t = torch.tensor([10])
    first = boundary_weight(distances(mask), mask, t, 250, 0.2)
    second = boundary_weight(distances(mask), mask * 2 - 1, t, 250, 0.2)
    assert torch.equal(first, second)
    assert first.min() == 0
    assert first.max() == 1


@pytest.mark.parametrize(("pixels", "weighted"), [(10, False), (11, True)])
def test_masks_of_at_most_one_percent_are_not_weighted(pixels, weighted):
    mask = torch.zeros(1, 1, 32, 32)
    mask[0, 0, 10, 5 : 5 + pixels] = 1  # One percent of 32 x 32 is 10.24 pixels.
    weight = boundary_weight(distances(mask), mask, torch.tensor([10]), 250, 0.2)
    assert bool((weight == 1).all()) is not weighted


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_empty_and_full_masks_give_ones_and_finite_losses(value):
    mask = torch.full((2, 1, 16, 16), value)
    prediction = torch.randn(mask.shape, requires_grad=True)
    t = torch.tensor([0, 249])
    assert torch.equal(boundary_weight(distances(mask), mask, t, 250, 0.2), torch.ones_like(mask))
    loss = boundary_loss(prediction, torch.zeros_like(mask), distances(mask), mask, t, 250)
    loss.backward()
    torch.testing.assert_close(loss.detach(), prediction.detach().square().mean())
    assert prediction.grad.isfinite().all()


def test_loss_and_gradient_match_the_reference(golden, manifest):
    values = golden("boundary_loss")
    for case in manifest["files"]["boundary_loss.npz"]["cases"]:
        key = case["key"]
        mask, noise, t = (values[f"{key}_{part}"] for part in ("x", "noise", "t"))
        prediction = values[f"{key}_pred"].requires_grad_()
        loss = boundary_loss(
            prediction, noise, distances(mask), mask, t, case["T"], case["gamma"], case["root"]
        )
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
        torch.testing.assert_close(prediction.grad, values[f"{key}_grad"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", [{"root": "l3"}, {"gamma": -0.2}])
def test_options_out_of_range_are_named(options):
    mask = torch.zeros(1, 1, 8, 8)
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        boundary_loss(mask, mask, mask, mask, torch.tensor([1]), 10, **options)
