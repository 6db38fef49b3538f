"""Distillation of lesion maps: the references' numbers, by hand, and what reaches the teacher."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from lightning_modules.losses import (
    WeightedSum,
    auxiliary_bce_loss,
    auxiliary_kd_loss,
    bce_loss,
    bernoulli_kl_loss,
    dice_loss,
    focal_loss,
    logit_kd_loss,
    probability_kd_loss,
)

FUNCTIONS = {
    "bce": bce_loss,
    "dice": dice_loss,
    "focal": focal_loss,
    "logit_kd": logit_kd_loss,
    "bernoulli_kl": bernoulli_kl_loss,
    "auxiliary_bce": auxiliary_bce_loss,
    "auxiliary_kd": auxiliary_kd_loss,
}
INPUTS = ("logits", "mask", "teacher_logits", "auxiliary", "teacher_auxiliary")
BETWEEN_LOGITS = (logit_kd_loss, bernoulli_kl_loss)
WEIGHTS = {"bce": 1, "logit_kd": 1, "auxiliary_kd": 0.05, "auxiliary_bce": 1}


def weighted(weights, **inputs):
    terms = {name: w if isinstance(w, dict) else {"weight": w} for name, w in weights.items()}
    return WeightedSum(terms, FUNCTIONS, INPUTS)(**inputs)[0]


@pytest.mark.parametrize(
    ("mode", "terms"),
    [("full", tuple(WEIGHTS)), ("logits", ("bce", "logit_kd")), ("label_only", ("bce",))],
)
def test_the_students_loss_is_the_deeplab_references(golden_cases, mode, terms):
    cases = golden_cases("deeplab_kd", f"student_distill_{mode}")
    assert len(cases) == 2
    for case in cases:
        loss = weighted(
            {name: WEIGHTS[name] for name in terms},
            logits=case.inputs["student_main"],
            mask=case.inputs["target"],
            teacher_logits=case.inputs["teacher_main"],
            auxiliary=case.heads("student_aux_"),
            teacher_auxiliary=case.heads("teacher_aux_"),
        )
        case.check(loss)


def test_the_auxiliary_distillation_is_the_deeplab_references(golden_cases):
    cases = golden_cases("deeplab_kd", "feature_distill")
    assert [case.inputs["alpha"].item() for case in cases] == [0.05, 0.5] * 2
    for case in cases:
        loss = weighted(
            {"auxiliary_kd": case.inputs["alpha"].item(), "auxiliary_bce": 1},
            mask=case.inputs["target"],
            auxiliary=case.heads("student_aux_"),
            teacher_auxiliary=case.heads("teacher_aux_"),
        )
        case.check(loss)


def test_the_training_of_auxiliary_heads_is_the_deeplab_references(golden_cases):
    cases = golden_cases("deeplab_kd", "teacher_aux")
    assert len(cases) == 2
    for case in cases:
        heads = case.heads("aux_")
        assert list(heads) == ["resnet1", "resnet2", "aspp"]
        case.check(auxiliary_bce_loss(heads, case.inputs["target"]))


def test_the_divergence_of_the_distilled_unet(golden_cases):
    cases = golden_cases("distilled_unet", "binary_kl")
    assert len(cases) == 2
    for case in cases:
        logits = (case.inputs[f"{who}_logits"] for who in ("student", "teacher"))
        loss = bernoulli_kl_loss(*logits, temperature=case.params["T"])
        assert loss.dtype == torch.float64
        case.check(loss)


def test_the_students_loss_of_the_distilled_unet(golden_cases):
    cases = golden_cases("distilled_unet", "distillation_total")
    assert len(cases) == 2
    for case in cases:
        alpha, temperature = case.params["alpha"], case.params["T"]
        loss = weighted(
            {
                "dice": {"weight": alpha, "smooth": case.params["smooth"]},
                "bernoulli_kl": {"weight": 1 - alpha, "temperature": temperature},
            },
            logits=case.inputs["student_logits"],
            mask=case.inputs["target"],
            teacher_logits=case.inputs["teacher_logits"],
        )
        case.check(loss)


def test_values_by_hand():
    # Probabilities 1/2 of the student and 3/4 of the teacher at this temperature.
    student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2 * math.log(3))
    assert logit_kd_loss(student, teacher, 2.0).item() == pytest.approx(4 * math.log(2))
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert bernoulli_kl_loss(student, teacher, 2.0).item() == pytest.approx(expected)
    heads = {"a": student, "b": student}
    assert auxiliary_bce_loss(heads, student).item() == pytest.approx(2 * math.log(2))
    others = {"b": teacher, "c": teacher, "a": student}
    assert auxiliary_kd_loss(heads, others).item() == pytest.approx(2 * math.log(2))
    assert probability_kd_loss(student, torch.full_like(student, 0.75)).item() == 0.0625
    assert probability_kd_loss(student + 3, torch.ones_like(student)).item() == 1, "not clamped"


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_divergence_is_that_of_a_softmax_over_two_channels(temperature):
    student, teacher = torch.randn(2, 2, 1, 6, 7, dtype=torch.float64) * 3
    pairs = [F.pad(z / temperature, (0, 0, 0, 0, 1, 0)) for z in (student, teacher)]
    log_p, log_q = (F.log_softmax(pair, dim=1) for pair in pairs)
    divergence = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1).mean()
    expected = temperature**2 * divergence
    torch.testing.assert_close(bernoulli_kl_loss(student, teacher, temperature), expected)
    # The other term is this and the teacher's entropy.
    entropy = -(log_q.exp() * log_q).sum(1).mean() * temperature**2
    other = logit_kd_loss(student, teacher, temperature)
    torch.testing.assert_close(other, expected + entropy)


@pytest.mark.parametrize("loss", BETWEEN_LOGITS)
def test_equal_logits_are_a_minimum(loss):
    logits = (torch.randn(2, 1, 8, 8) * 5).requires_grad_()
    value = loss(logits, logits.detach().clone(), 2.0)
    value.backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-8)
    if loss is bernoulli_kl_loss:
        assert value == 0
    assert loss(logits + 0.5, logits, 2.0) > value


@pytest.mark.parametrize("loss", BETWEEN_LOGITS)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_logits_are_finite(loss, size):
    logits = torch.tensor([size, size, -size, -size, 0.0]).view(-1, 1, 1, 1).requires_grad_()
    teacher = torch.tensor([size, -size, size, -size, size]).view(-1, 1, 1, 1)
    value = loss(logits, teacher)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


def calls(student, teacher):
    """Every loss between a student's map and a teacher's."""
    yield logit_kd_loss(student, teacher, 2.0)
    yield bernoulli_kl_loss(student, teacher)
    yield auxiliary_kd_loss({"aspp": student}, {"aspp": teacher})
    yield probability_kd_loss(student, teacher)


def test_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(2, 2, 1, 8, 8).bfloat16()
    exact = calls(student.float(), teacher.float())
    for half, expected in zip(calls(student, teacher), exact, strict=True):
        assert half.dtype == torch.float32
        assert half == expected
    assert all(v.dtype == torch.float64 for v in calls(student.double(), teacher))
    assert auxiliary_bce_loss({"aspp": student}, teacher.sigmoid()).dtype == torch.float32


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(2, 2, 1, 8, 8).requires_grad_().unbind()
    student.retain_grad()
    teacher.retain_grad()
    sum(calls(student, teacher)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [(4, 4), (12, 20)])
def test_the_teachers_map_is_resized_to_the_students(size):
    student, teacher = torch.randn(2, 1, 8, 8), torch.rand(2, 1, *size)
    matched = F.interpolate(teacher, (8, 8), mode="bilinear", align_corners=False)
    for value, expected in zip(calls(student, teacher), calls(student, matched), strict=True):
        assert value == expected


def test_the_squared_error_is_least_at_the_teachers_probability():
    probability = torch.rand(2, 1, 4, 4)
    x0 = (probability * 2 - 1).requires_grad_()
    value = probability_kd_loss(x0, probability)
    value.backward()
    assert value < 1e-12
    torch.testing.assert_close(x0.grad, torch.zeros_like(x0), rtol=0, atol=1e-8)


def test_x0_weights_scale_each_sample():
    x0, probability = torch.randn(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    each = torch.stack([probability_kd_loss(x0[[i]], probability[[i]]) for i in range(3)])
    weight = torch.tensor([0.25, 0.0, 2.0])
    weighted_loss = probability_kd_loss(x0, probability, weight)
    torch.testing.assert_close(weighted_loss, (each * weight).mean())
    torch.testing.assert_close(probability_kd_loss(x0, probability), each.mean())


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
@pytest.mark.parametrize(
    ("loss", "term"), [(logit_kd_loss, "logit_kd"), (bernoulli_kl_loss, "bernoulli_kl")]
)
def test_illegal_temperatures_are_named(loss, term, temperature):
    with pytest.raises(UserError, match=f"losses.{term}.temperature={temperature} must be above 0"):
        loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), temperature)
