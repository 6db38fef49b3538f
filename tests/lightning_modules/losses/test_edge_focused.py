"""Edge-focused distillation against the reference and its switches by hand."""

import pytest
import torch

from common.errors import UserError
from datamodules import edge_distance
from lightning_modules.losses import edge_closeness, efkd_loss


def distances(mask):
    return torch.stack([edge_distance(sample) for sample in mask])


def square(size=32, low=8, high=24):
    mask = torch.zeros(1, 1, size, size)
    mask[..., low:high, low:high] = 1
    return mask


def test_loss_and_gradient_match_the_reference(golden, manifest):
    values = golden("efkd_loss")
    for case in manifest["files"]["efkd_loss.npz"]["cases"]:
        key = case["key"]
        mask, teacher, t = (values[f"{key}_{part}"] for part in ("x", "teacher", "t"))
        student = values[f"{key}_student"].requires_grad_()
        options = {k: v for k, v in case["config"].items() if k != "temperature"}
        loss = efkd_loss(student, teacher, distances(mask), mask, t, 250, **options)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
        torch.testing.assert_close(student.grad, values[f"{key}_grad"], rtol=1e-5, atol=1e-8)


def test_no_gradient_reaches_the_teacher():
    mask = square()
    student = torch.randn(mask.shape, requires_grad=True)
    teacher = torch.randn(mask.shape, requires_grad=True)
    efkd_loss(student, teacher, distances(mask), mask, torch.tensor([5]), 250).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_edge_and_body_are_averaged_apart():
    mask = square()
    distance = distances(mask)
    closeness = 1 - distance / distance.max()
    edge = closeness > 0.7
    student = torch.where(edge, 2.0, 3.0)
    loss = efkd_loss(
        student,
        torch.zeros_like(mask),
        distance,
        mask,
        torch.tensor([100]),
        250,
        edge_weight=10,
        body_weight=1,
        edge_time_dependent=False,
    )
    assert loss.item() == pytest.approx(10 * 4 + 9)


def test_time_independent_edge_is_the_same_at_every_time():
    mask, student = square(), torch.randn(1, 1, 32, 32)
    losses = [
        [
            efkd_loss(
                student,
                torch.zeros_like(mask),
                distances(mask),
                mask,
                torch.tensor([t]),
                250,
                edge_time_dependent=dependent,
            ).item()
            for t in (1, 100, 240)
        ]
        for dependent in (False, True)
    ]
    assert len(set(losses[0])) == 1
    assert len(set(losses[1])) == 3


def test_small_bodies_contribute_nothing_on_request():
    mask = square()
    student = torch.randn(mask.shape)
    arguments = (student, torch.zeros_like(mask), distances(mask), mask, torch.tensor([240]), 250)
    # At t = 240 of 250 a single pixel is body, as published.
    with_body = efkd_loss(*arguments, edge_weight=0, body_weight=1)
    assert with_body > 0
    assert efkd_loss(*arguments, edge_weight=0, body_weight=1, min_area=1) == with_body
    assert efkd_loss(*arguments, edge_weight=0, body_weight=1, min_area=64) == 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_empty_and_full_masks_are_all_edge(value):
    mask = torch.full((2, 1, 16, 16), value)
    student = torch.randn(mask.shape, requires_grad=True)
    loss = efkd_loss(
        student, torch.zeros_like(mask), distances(mask), mask, torch.tensor([0, 249]), 250
    )
    loss.backward()
    assert loss.item() == pytest.approx(3 * student.detach().square().mean().item(), rel=1e-5)
    assert student.grad.isfinite().all()


def test_sample_weights_scale_each_sample():
    mask = torch.cat((square(), square(low=4, high=20)))
    student, t = torch.randn(mask.shape), torch.tensor([5, 50])

    def loss(rows, **options):
        return efkd_loss(
            student[rows], torch.zeros_like(mask[rows]), distances(mask[rows]), mask[rows], t[rows],
            250, **options,
        )  # fmt: skip

    weighted = loss([0, 1], sample_weight=torch.tensor([0.25, 2.0]))
    expected = (0.25 * loss([0]) + 2 * loss([1])) / 2
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize("band", [0.5, 2.0, 5.0])
def test_an_edge_of_pixels_is_the_same_band_at_every_time_and_size_of_lesion(band):
    mask = torch.cat((square(), square(low=4, high=28)))
    distance, t = distances(mask), torch.tensor([3, 240])
    student = torch.where(distance <= band, 2.0, 3.0)
    options = {"edge_weight": 10, "body_weight": 1, "edge_band": band}
    loss = efkd_loss(student, torch.zeros_like(mask), distance, mask, t, 250, **options)
    assert loss.item() == pytest.approx(10 * 4 + 9)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_with_an_edge_of_pixels_a_mask_without_outline_is_all_body(value):
    mask = torch.full((2, 1, 16, 16), value)
    student = torch.randn(mask.shape)
    options = {"edge_weight": 10, "body_weight": 2, "edge_band": 3}
    arguments = (student, torch.zeros_like(mask), distances(mask), mask, torch.tensor([0, 249]))
    loss = efkd_loss(*arguments, 250, **options)
    assert loss.item() == pytest.approx(2 * student.square().mean().item(), rel=1e-5)


def test_a_band_must_not_be_negative():
    mask = square()
    with pytest.raises(UserError, match="edge_band=-1 must be at least 0 px"):
        efkd_loss(mask, mask, distances(mask), mask, torch.tensor([5]), 250, edge_band=-1)


@pytest.mark.parametrize("dependent", [True, False])
def test_a_closeness_that_is_known_changes_nothing(dependent):
    mask, student, t = square(), torch.randn(1, 1, 32, 32), torch.tensor([100])
    distance = distances(mask)
    arguments = (student, torch.zeros_like(mask))
    options = {"edge_time_dependent": dependent}
    expected = efkd_loss(*arguments, distance, mask, t, 250, **options)
    closeness = edge_closeness(distance, mask)
    unused = torch.full_like(distance, float("nan"))
    known = efkd_loss(*arguments, unused, mask, t, 250, closeness=closeness, **options)
    assert torch.equal(known, expected)
