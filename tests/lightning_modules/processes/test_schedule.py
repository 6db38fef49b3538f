"""Noise schedules against the reference's buffers."""

import pytest
import torch

from common.errors import UserError
from lightning_modules.processes import NoiseSchedule, snr

BUFFERS = (
    "betas",
    "alphas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_recip_alphas",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "posterior_variance",
)


def test_buffers_match_the_reference(golden, manifest):
    values = golden("schedules")
    for case in manifest["files"]["schedules.npz"]["cases"]:
        schedule = NoiseSchedule(
            case["timesteps"], case["beta_start"], case["beta_end"], case["mode"]
        )
        for name in BUFFERS:
            # The reference accumulates in float32, where 1 - x loses digits; hence the absolute
            # tolerance beside the relative one.
            torch.testing.assert_close(
                getattr(schedule, name), values[f"{case['key']}_{name}"], rtol=1e-5, atol=2e-6
            )
        assert schedule.alphas_cumprod[-1].item() == pytest.approx(case["abar_T"], rel=2e-6)


@pytest.mark.parametrize("mode", ["linear", "quadratic", "cosine", "sigmoid"])
def test_forward_process_matches_the_reference(golden, mode):
    values = golden("q_sample")
    schedule = NoiseSchedule(250, 4e-4, 0.08, mode)
    x_t = schedule.q_sample(*(values[f"{mode}_{k}"] for k in ("x0", "t", "noise")))
    torch.testing.assert_close(x_t, values[f"{mode}_xt"], rtol=0, atol=3e-6)


def test_buffers_are_float32_move_with_the_module_and_are_not_stored():
    schedule = NoiseSchedule(50, 1e-4, 0.1, "LINEAR")
    assert schedule.mode == "linear"
    assert all(getattr(schedule, name).dtype == torch.float32 for name in BUFFERS)
    assert schedule.state_dict() == {}
    assert schedule.to("meta").betas.device.type == "meta"


def test_double_precision_copy_includes_the_clean_end():
    schedule = NoiseSchedule(20)
    assert schedule.alpha_cumprod(-1) == 1
    assert schedule.alpha_cumprod(7) == pytest.approx(schedule.alphas_cumprod[7].item(), rel=1e-6)


def test_cosine_reaches_pure_noise_with_a_wider_clip():
    published = NoiseSchedule(250, 4e-4, 0.08, "cosine")
    wide = NoiseSchedule(250, 4e-4, 0.08, "cosine", cosine_clip_max=0.999)
    assert published.alphas_cumprod[-1] > 2e-3
    assert wide.alphas_cumprod[-1] < 1e-5
    assert wide.betas.max() == pytest.approx(0.999)


def test_settings_rebuild_the_schedule():
    schedule = NoiseSchedule(30, 1e-3, 0.2, "quadratic")
    assert torch.equal(NoiseSchedule(**schedule.settings()).betas, schedule.betas)


def test_signal_to_noise_ratio():
    schedule = NoiseSchedule(10, 0.1, 0.5)
    t = torch.tensor([0, 3, 9])
    abar = schedule.alphas_cumprod[t]
    torch.testing.assert_close(snr(schedule, t), abar / (1 - abar))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((250, 4e-4, 0.08, "square"), "mode=square does not exist; choose one of linear"),
        ((0, 4e-4, 0.08), "num_timesteps=0"),
        ((10, 0.2, 0.1), "beta_start=0.2 and schedule.beta_end=0.1"),
        ((10, 0.0, 0.1), "0 < beta_start"),
        ((10, 0.1, 1.0), "beta_end=1.0"),
    ],
)
def test_illegal_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule(*arguments)
