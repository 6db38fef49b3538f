"""Samplers against recorded trajectories, closed forms and each other."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch

from common.errors import UserError
from lightning_modules.processes import DDIM, DDPM, DPMSolver, NoiseSchedule, predict_x0


def stub_denoiser(schedule, image):
    """The reference's analytic stand-in for a network, which predicts noise."""
    offset = 0.1 * torch.tanh(3 * image.mean(1, keepdim=True) - 1.5)

    def predict(x_t, t):
        times = torch.full((len(x_t),), t)
        noise = 0.9 * x_t + offset * torch.cos(torch.tensor(t / 50))
        return predict_x0(schedule, "noise", noise, x_t, times)

    return predict


def network_denoiser(schedule, network, image):
    def predict(x_t, t):
        times = torch.full((len(x_t),), t)
        return predict_x0(schedule, "noise", network(x_t, image, times), x_t, times)

    return predict


def noise_stream(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_ancestral_trajectory_matches_the_reference(golden, manifest, golden_network, index):
    values = golden("reverse")
    case = manifest["files"]["reverse.npz"]["cases"][index]
    key = case["key"]
    schedule = NoiseSchedule(case["T"], case["beta_start"], case["beta_end"], case["mode"])
    image = values[f"{key}_images"]
    if key.startswith("net"):
        denoise = network_denoiser(schedule, golden_network("dsd_2level")[0], image)
    else:
        denoise = stub_denoiser(schedule, image)
    draws = iter([values[f"{key}_init_noise"], *values[f"{key}_step_noise"]])
    trajectory = []
    sampler = DDPM(case["T"], clip_x0=False)
    with torch.no_grad():
        sample = sampler.sample(
            denoise, schedule, lambda: next(draws), lambda t, step: trajectory.append(step.previous)
        )
    expected = values[f"{key}_traj"]
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.stack(trajectory), expected, rtol=0, atol=1e-5 * scale)
    assert torch.equal(sample, trajectory[-1])
    assert next(draws, None) is None, "the reference draws once for x_T and once a later step"


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 250])
def test_grid_is_trailing_and_strictly_decreasing(steps):
    times = DDIM(steps).timesteps(NoiseSchedule(250))
    assert len(times) == steps
    assert times[0] == 249
    assert all(a > b for a, b in itertools.pairwise(times))
    assert times[-1] >= 0
    if steps == 250:
        assert times == list(range(249, -1, -1))


def test_grid_rounds_like_the_usual_trailing_spacing():
    # diffusers' convention: numpy's round(arange(T, 0, -T / steps)) - 1, halves to even.
    for total, steps in ((250, 20), (250, 4), (250, 7), (1000, 16)):
        usual = np.round(np.arange(total, 0, -total / steps)) - 1
        assert DDIM(steps).timesteps(NoiseSchedule(total)) == usual.astype(int).tolist()


@pytest.mark.parametrize("sampler", [DDIM(1), DDPM(1), DPMSolver(1, order=3)])
def test_one_step_returns_the_predicted_clean_signal(sampler):
    schedule = NoiseSchedule(250)
    clean = torch.rand(2, 1, 4, 4) * 2 - 1
    sample = sampler.sample(lambda x, t: clean, schedule, noise_stream(0, clean.shape))
    assert torch.equal(sample, clean)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(10), DDIM(10, eta=1.0), DDPM(10), DDPM(250), DPMSolver(10), DPMSolver(20, order=3)],
)
def test_a_perfect_denoiser_gives_back_the_truth(sampler):
    schedule = NoiseSchedule(250)
    truth = torch.randint(0, 2, (2, 1, 4, 4)) * 2.0 - 1
    sample = sampler.sample(lambda x, t: truth, schedule, noise_stream(0, truth.shape))
    torch.testing.assert_close(sample, truth)


def test_deterministic_step_keeps_the_implied_noise():
    schedule = NoiseSchedule(250)
    x0, noise = torch.randn(1, 1, 3, 3).clamp(-1, 1), torch.randn(1, 1, 3, 3)
    x_t = schedule.q_sample(x0, torch.tensor([200]), noise)
    step = DDIM(5).step(schedule, x_t, x0, 200, 99, draw=lambda: pytest.fail("drew noise"))
    expected = schedule.q_sample(x0, torch.tensor([99]), noise)
    torch.testing.assert_close(step.previous, expected, rtol=1e-5, atol=1e-5)
    assert step.x0 is x0


def test_ddim_with_full_variance_is_ancestral_sampling():
    schedule = NoiseSchedule(250)
    image = torch.rand(2, 3, 4, 4)
    runs = [
        sampler.sample(stub_denoiser(schedule, image), schedule, noise_stream(3, (2, 1, 4, 4)))
        for sampler in (DDPM(250, clip_x0=False), DDIM(250, eta=1.0, clip_x0=False))
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-4)


def test_ancestral_samples_have_the_variance_of_the_data():
    # For data N(0, s^2) the exact denoiser is linear, and samples must have the data's variance.
    schedule = NoiseSchedule(250)
    deviation = 0.5

    def denoise(x_t, t):
        abar = schedule.alphas_cumprod[t]
        return abar.sqrt() * deviation**2 / (abar * deviation**2 + 1 - abar) * x_t

    shape = (64, 1, 16, 16)
    # Ancestral sampling with the posterior variance is known to lose a little.
    for sampler, tolerance in ((DDPM(250, clip_x0=False), 0.05), (DDIM(250, clip_x0=False), 0.02)):
        sample = sampler.sample(denoise, schedule, noise_stream(0, shape))
        assert sample.std().item() == pytest.approx(deviation, rel=tolerance)


def test_clean_signal_is_clipped_on_request():
    schedule = NoiseSchedule(250)
    outside = torch.full((1, 1, 2, 2), 3.0)
    seen = []
    for clip in (True, False):
        DDIM(3, clip_x0=clip).sample(
            lambda x, t: outside,
            schedule,
            noise_stream(0, outside.shape),
            lambda t, step: seen.append(step.x0.max().item()),
        )
    assert seen == [1, 1, 1, 3, 3, 3]


def mixture_denoiser(schedule, means=(-1.0, 0.2, 1.0), deviation=0.3, weights=(0.3, 0.2, 0.5)):
    """The exact posterior mean of a Gaussian mixture, which is what a network would learn."""
    centres = torch.tensor(means, dtype=torch.float64)
    shares = torch.tensor(weights, dtype=torch.float64)

    def denoise(x_t, t):
        abar = schedule.alpha_cumprod(t)
        variance = abar * deviation**2 + 1 - abar
        apart = x_t[..., None] - abar**0.5 * centres
        belief = (shares.log() - apart.square() / (2 * variance)).softmax(-1)
        return (belief * (centres + abar**0.5 * deviation**2 / variance * apart)).sum(-1)

    return denoise


def states_of(sampler, schedule, denoise, start):
    """Return the signal after each step, by the time it belongs to."""
    states = []
    sampler.sample(denoise, schedule, lambda: start, lambda t, step: states.append(step.previous))
    return dict(zip([*sampler.timesteps(schedule)[1:], -1], states, strict=True))


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda n: DDIM(n, clip_x0=False), 1),
        (lambda n: DPMSolver(n, clip_x0=False, order=1), 1),
        (lambda n: DPMSolver(n, clip_x0=False, order=2), 2),
        # Not in the limit, where its second difference counts half (see the class).
        (lambda n: DPMSolver(n, clip_x0=False, order=3), 2.75),
    ],
)
def test_errors_fall_with_the_order_of_the_solver(make, order):
    # So many times that the grid of every solver is smooth; the end is common to all grids.
    schedule = NoiseSchedule(20000, beta_start=1e-5, beta_end=1e-3)
    denoise = mixture_denoiser(schedule)
    start = torch.randn(1, 1, 20, 50, generator=torch.Generator().manual_seed(0)).double()
    common = 20000 // 20 - 1
    exact = states_of(DPMSolver(1000, clip_x0=False, order=3), schedule, denoise, start)[common]
    steps = [20, 40, 80]
    errors = [
        (states_of(make(n), schedule, denoise, start)[common] - exact).abs().mean().item()
        for n in steps
    ]
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert rates == pytest.approx([order] * 2, abs=0.2), (errors, rates)


def test_ten_steps_of_the_solver_have_half_the_error_of_ddim():
    schedule = NoiseSchedule(250)
    denoise = mixture_denoiser(schedule)
    start = torch.randn(1, 1, 40, 50, generator=torch.Generator().manual_seed(1)).double()
    exact = DDIM(250, clip_x0=False).sample(denoise, schedule, lambda: start)
    errors = {
        sampler: (sampler.sample(denoise, schedule, lambda: start) - exact).abs().mean().item()
        for sampler in (DPMSolver(10, clip_x0=False), DDIM(10, clip_x0=False))
    }
    solver, ddim = errors.values()
    assert solver < 0.5 * ddim, errors


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 14, 15, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_solver_is_that_of_diffusers(num_steps, order):
    schedule = NoiseSchedule(250)
    denoise = mixture_denoiser(schedule)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    theirs = diffusers.DPMSolverMultistepScheduler(
        trained_betas=schedule.betas.tolist(),
        num_train_timesteps=250,
        solver_order=order,
        prediction_type="sample",
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(num_steps)
    sampler = DPMSolver(num_steps, order=order, clip_x0=False)
    assert theirs.timesteps.tolist() == sampler.timesteps(schedule)
    expected, x = [], start
    for t in theirs.timesteps:
        x = theirs.step(denoise(x, int(t)), t, x).prev_sample
        expected.append(x)
    ours = states_of(sampler, schedule, denoise, start)
    torch.testing.assert_close(
        torch.stack(list(ours.values())), torch.stack(expected), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("num_steps", [1, 5, 50, 250])
def test_ddim_is_that_of_diffusers(num_steps):
    schedule = NoiseSchedule(250)
    denoise = mixture_denoiser(schedule)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    theirs = diffusers.DDIMScheduler(
        trained_betas=schedule.betas.tolist(),
        num_train_timesteps=250,
        prediction_type="sample",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    theirs.set_timesteps(num_steps)
    x = start
    for t in theirs.timesteps:
        x = theirs.step(denoise(x, int(t)), t, x).prev_sample
    ours = DDIM(num_steps, clip_x0=False).sample(denoise, schedule, lambda: start)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(0), "num_steps=0"),
        (lambda: DDPM(2.5), "num_steps=2.5"),
        (lambda: DDPM(1, ensemble=0), "ensemble=0"),
        (lambda: DDIM(1, eta=1.5), "eta=1.5"),
        (lambda: DPMSolver(5, order=4), "order=4"),
        (lambda: DDIM(251).timesteps(NoiseSchedule(250)), "num_steps=251 exceeds"),
    ],
)
def test_illegal_arguments_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
