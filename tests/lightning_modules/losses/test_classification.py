"""Losses of class logits: the reference's numbers, by hand, and where a batch has no weight."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from lightning_modules.losses import cross_entropy_loss, kd_kl

LOG2, LOG3, LOG4 = math.log(2), math.log(3), math.log(4)
# Probabilities (1/4, 3/4), (1/2, 1/2) and (3/4, 1/4).
LOGITS = torch.tensor([[0.0, LOG3], [0.0, 0.0], [LOG3, 0.0]], dtype=torch.float64)


def test_the_weighted_cross_entropy_is_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "weighted_ce")
    assert len(cases) == 3
    for case in cases:
        values = case.inputs
        loss = cross_entropy_loss(values["logits_s"], values["target"], values["class_weight"])
        case.check(loss)


def test_the_baseline_of_logits_is_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "blkd")
    assert len(cases) == 3
    for case in cases:
        values, share = case.inputs, case.params["lambd"]
        label = cross_entropy_loss(values["logits_s"], values["target"], values["class_weight"])
        teacher = kd_kl(values["logits_s"], values["logits_t"], case.params["T"])
        case.check((1 - share) * label + share * teacher)


@pytest.mark.parametrize(
    ("label", "class_weights", "label_smoothing", "expected"),
    [
        ([0, 0, 0], None, 0.0, (2 * LOG4 + LOG2 - LOG3) / 3),
        ([1, 0, 1], None, 0.0, (2 * LOG4 - LOG3 + LOG2) / 3),
        # Sample weights 3, 1 and 1, of which the sum is 5.
        ([1, 0, 0], [1.0, 3.0], 0.0, (3 * (LOG4 - LOG3) + LOG2 + LOG4 - LOG3) / 5),
        ([1, 0, 0], [2.0, 6.0], 0.0, (3 * (LOG4 - LOG3) + LOG2 + LOG4 - LOG3) / 5),
        ([1, 1, 0], [0.0, 1.0], 0.0, (LOG4 - LOG3 + LOG2) / 2),
        ([0, 0, 0], None, 0.5, (2 * LOG4 + LOG2 - LOG3) / 6 + (2 * LOG4 - LOG3 + LOG2) / 6),
    ],
)
def test_cross_entropy_by_hand(label, class_weights, label_smoothing, expected):
    weights = None if class_weights is None else torch.tensor(class_weights)
    value = cross_entropy_loss(LOGITS, torch.tensor(label), weights, label_smoothing)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch(label_smoothing):
    logits, weights = torch.randn(12, 5), torch.rand(5) + 0.1
    label = torch.randint(5, (12,))
    for w in (None, weights):
        value = cross_entropy_loss(logits, label, w, label_smoothing)
        expected = F.cross_entropy(logits, label, w, label_smoothing=label_smoothing)
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_batch_without_weight_costs_nothing(rows, label_smoothing):
    logits = torch.randn(rows, 2, requires_grad=True)
    label, weights = torch.zeros(rows, dtype=torch.int64), torch.tensor([0.0, 1.0])
    value = cross_entropy_loss(logits, label, weights, label_smoothing)
    assert value == 0
    value.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("label_smoothing", [-0.1, 1, math.nan])
def test_illegal_smoothing_is_named(label_smoothing):
    message = f"cross_entropy.label_smoothing={label_smoothing} must be in"
    with pytest.raises(UserError, match=message):
        cross_entropy_loss(LOGITS, torch.zeros(3, dtype=torch.int64), None, label_smoothing)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "expected"),
    [
        ([[0, 0]], [[0, LOG3]], 1.0, 0.25 * -LOG2 + 0.75 * (LOG3 - LOG2)),
        # Twice the logits at twice the temperature are the same probabilities.
        ([[0, 0]], [[0, 2 * LOG3]], 2.0, 4 * (0.25 * -LOG2 + 0.75 * (LOG3 - LOG2))),
        # A row without difference halves the mean.
        ([[0, 0], [5, 7]], [[0, LOG3], [1, 3]], 1.0, (0.75 * LOG3 - LOG2) / 2),
        ([[0, 0, 0]], [[0, 0, LOG2]], 1.0, 0.5 * (LOG3 - LOG4) + 0.5 * (LOG3 - LOG2)),
    ],
)
def test_the_divergence_by_hand(student, teacher, temperature, expected):
    student, teacher = (torch.tensor(z, dtype=torch.float64) for z in (student, teacher))
    assert kd_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_the_divergence_of_equal_logits_is_the_least():
    logits = (torch.randn(6, 8) * 5).requires_grad_()
    value = kd_kl(logits, logits.detach().clone())
    value.backward()
    assert value == 0
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-7)
    assert kd_kl(logits + torch.randn(6, 8), logits) > 0.01
    # A shift of all logits of a row is no change.
    shifted = kd_kl(logits + torch.randn(6, 1), logits)
    assert shifted.item() == pytest.approx(0, abs=1e-5)


def test_the_divergence_of_no_rows_is_nothing():
    logits = torch.randn(0, 8, requires_grad=True)
    value = kd_kl(logits, torch.randn(0, 8))
    assert value == 0
    value.backward()
    assert logits.grad.shape == (0, 8)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_logits_are_finite(size):
    logits = torch.tensor([[size, -size], [-size, size], [0.0, size]], requires_grad=True)
    teacher = torch.tensor([[-size, size], [-size, size], [size, 0.0]])
    value = kd_kl(logits, teacher) + cross_entropy_loss(logits, torch.tensor([1, 1, 0]))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = torch.randn(2, 6, 8).to(dtype)
    label, weights = torch.randint(8, (6,)), torch.rand(8).to(dtype)
    for half, exact in (
        (kd_kl(student, teacher), kd_kl(student.float(), teacher.float())),
        (
            cross_entropy_loss(student, label, weights),
            cross_entropy_loss(student.float(), label, weights.float()),
        ),
    ):
        assert half.dtype == torch.float32
        assert half == exact


def test_no_gradient_reaches_the_teacher():
    student, teacher = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    kd_kl(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_illegal_temperatures_are_named(temperature):
    message = f"losses.kd.temperature={temperature} must be above 0"
    with pytest.raises(UserError, match=message):
        kd_kl(LOGITS, LOGITS, temperature)
