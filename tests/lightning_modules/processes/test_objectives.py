"""The three objectives say the same thing in three ways."""

import pytest
import torch

from common.errors import UserError
from lightning_modules.processes import (
    OBJECTIVES,
    NoiseSchedule,
    min_snr_weight,
    output_from_x0,
    predict_x0,
    snr,
    training_target,
)

SCHEDULE = NoiseSchedule(250, 4e-4, 0.08)


def noisy_sample(times):
    t = torch.tensor(times)
    x0 = torch.randint(0, 2, (len(t), 1, 6, 5)) * 2.0 - 1
    noise = torch.randn(x0.shape)
    return x0, noise, t, SCHEDULE.q_sample(x0, t, noise)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_output_implies_the_clean_signal(objective):
    x0, noise, t, x_t = noisy_sample([0, 1, 60, 150])
    target = training_target(SCHEDULE, objective, x0, noise, t)
    implied = predict_x0(SCHEDULE, objective, target, x_t, t)
    torch.testing.assert_close(implied, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_converting_there_and_back_changes_nothing(objective):
    _, _, t, x_t = noisy_sample([1, 60, 150, 249])
    output = torch.randn(x_t.shape)
    x0 = predict_x0(SCHEDULE, objective, output, x_t, t)
    back = output_from_x0(SCHEDULE, objective, x0, x_t, t)
    torch.testing.assert_close(back, output, rtol=1e-3, atol=2e-4)


def test_noise_objective_multiplies_errors_at_the_last_step():
    _, noise, t, x_t = noisy_sample([249])
    clean = predict_x0(SCHEDULE, "noise", noise, x_t, t)
    off = predict_x0(SCHEDULE, "noise", noise + 0.01, x_t, t)
    assert (clean - off).mean().item() == pytest.approx(1.75, rel=0.01)


def test_velocity_by_hand():
    x0, noise, t, _ = noisy_sample([100])
    a, s = SCHEDULE.sqrt_alphas_cumprod[100], SCHEDULE.sqrt_one_minus_alphas_cumprod[100]
    torch.testing.assert_close(training_target(SCHEDULE, "v", x0, noise, t), a * noise - s * x0)


def test_half_precision_outputs_are_converted_in_float32():
    _, _, t, x_t = noisy_sample([200])
    x0 = predict_x0(SCHEDULE, "v", torch.randn(x_t.shape).bfloat16(), x_t, t)
    assert x0.dtype == torch.float32


@pytest.mark.parametrize("function", [predict_x0, output_from_x0, training_target])
def test_unknown_objective_is_named(function):
    x0, noise, t, _ = noisy_sample([1])
    with pytest.raises(UserError, match="objective=eps does not exist; choose one of noise, x0, v"):
        function(SCHEDULE, "eps", x0, *((noise, t)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_min_snr_weighs_the_same_clean_error_alike_for_every_objective(objective):
    x0, noise, t, x_t = noisy_sample([1, 5, 30, 60, 150, 249])
    believed = x0 + 0.1 * torch.randn(x0.shape)
    output = output_from_x0(SCHEDULE, objective, believed, x_t, t)
    target = training_target(SCHEDULE, objective, x0, noise, t)
    weight = min_snr_weight(SCHEDULE, objective, t, gamma=5.0)
    weighed = weight * (output - target).square().flatten(1).mean(1)
    expected = snr(SCHEDULE, t).clamp(max=5) * (believed - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(weighed, expected, rtol=2e-2, atol=1e-7)
    assert weight.isfinite().all()
