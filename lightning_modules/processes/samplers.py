"""Samplers: from noise to a clean signal in a chosen number of network calls.

A sampler is told the clean signal that a network predicts at each step, whatever its objective.
It steps down a grid of integer times with trailing spacing: the first is always `T - 1`, the last
step always returns the clean signal.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from common.errors import UserError
from lightning_modules.processes.schedule import NoiseSchedule

__all__ = ["DDIM", "DDPM", "DPMSolver"]

# From that many steps on the last steps need not be of lower order to be stable.
MANY_STEPS = 15


@dataclass
class SamplerStep:
    """Result of one step.

    Attributes:
        previous: the signal at the next lower time of the grid.
        x0: the clean signal that the step believed in.
    """

    previous: Tensor
    x0: Tensor


class Sampler(ABC):
    """Walks from `x_T` to `x_0`.

    Args:
        num_steps: network calls a sample, from 1 to the schedule's `num_timesteps`.
        ensemble: samples that are averaged into one mask, at least 1.
        clip_x0: clamp the predicted clean signal to [-1, 1] at every step.
        members_at_once: samples of one image that go through the network together, which changes
            the speed and not the mask; by default all on a GPU and one on a CPU.

    Raises:
        UserError: an argument is outside its range.
    """

    # Predictions of steps before that a step uses.
    memory = 0

    def __init__(
        self,
        num_steps: int,
        ensemble: int = 1,
        clip_x0: bool = True,
        members_at_once: int | None = None,
    ) -> None:
        for key, value in (
            ("num_steps", num_steps),
            ("ensemble", ensemble),
            ("members_at_once", 1 if members_at_once is None else members_at_once),
        ):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"sampler.{key}={value} must be a whole number of at least 1.")
        self.num_steps = num_steps
        self.ensemble = ensemble
        self.clip_x0 = clip_x0
        self.members_at_once = members_at_once

    @property
    def calls_per_mask(self) -> int:
        """Network calls for one mask: steps times ensemble members."""
        return self.num_steps * self.ensemble

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """Return the decreasing times at which the network is called, trailing spacing.

        Raises:
            UserError: more steps are asked for than the schedule has.
        """
        total = schedule.num_timesteps
        if self.num_steps > total:
            raise UserError(
                f"sampler.num_steps={self.num_steps} exceeds schedule.num_timesteps={total}; "
                "ask for at most that many steps."
            )
        return [round(total - i * total / self.num_steps) - 1 for i in range(self.num_steps)]

    def sample(
        self,
        predict_x0: Callable[[Tensor, int], Tensor],
        schedule: NoiseSchedule,
        draw: Callable[[], Tensor],
        on_step: Callable[[int, SamplerStep], None] | None = None,
    ) -> Tensor:
        """Return a sample `(B, C, H, W)` of the clean signal.

        Args:
            predict_x0: maps `(x_t, t)` to the predicted clean signal, `t` one integer for all.
            schedule: the noise schedule that the network was trained with.
            draw: returns fresh standard normal noise shaped like the sample; called once for `x_T`
                and once for every later step that adds noise.
            on_step: called after each step with its time and result.
        """
        times = self.timesteps(schedule)
        earlier: list[tuple[int, Tensor]] = []
        x = draw()
        for t, t_prev in zip(times, [*times[1:], -1], strict=True):
            x0 = predict_x0(x, t)
            if self.clip_x0:
                x0 = x0.clamp(-1, 1)
            step = self.step(schedule, x, x0, t, t_prev, draw, earlier)
            if on_step is not None:
                on_step(t, step)
            earlier = [(t, x0), *earlier][: self.memory]
            x = step.previous
        return x

    @abstractmethod
    def step(
        self,
        schedule: NoiseSchedule,
        x_t: Tensor,
        x0: Tensor,
        t: int,
        t_prev: int,
        draw: Callable[[], Tensor],
        earlier: Sequence[tuple[int, Tensor]] = (),
    ) -> SamplerStep:
        """Go from time `t` to `t_prev`; `t_prev = -1` is the clean signal.

        `earlier` are the times and predicted clean signals of the steps before, newest first.
        """


class DDPM(Sampler):
    """Ancestral sampling with the posterior variance of the forward process.

    `x_prev = c_0 x_0 + c_t x_t + sqrt(var) z` with the mean and variance of
    `q(x_prev | x_t, x_0)`; with as many steps as the schedule and `clip_x0=False` this is the
    published sampler. Source: Ho et al., 2020, equations 6 and 7.
    """

    def step(
        self,
        schedule: NoiseSchedule,
        x_t: Tensor,
        x0: Tensor,
        t: int,
        t_prev: int,
        draw: Callable[[], Tensor],
        earlier: Sequence[tuple[int, Tensor]] = (),
    ) -> SamplerStep:
        if t_prev < 0:
            return SamplerStep(x0, x0)
        abar, abar_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev)
        alpha = abar / abar_prev
        x0_share = abar_prev**0.5 * (1 - alpha) / (1 - abar)
        x_share = alpha**0.5 * (1 - abar_prev) / (1 - abar)
        variance = (1 - alpha) * (1 - abar_prev) / (1 - abar)
        return SamplerStep(x0_share * x0 + x_share * x_t + variance**0.5 * draw(), x0)


class DDIM(Sampler):
    """Non-Markovian sampling that skips steps; deterministic with `eta=0`.

    `x_prev = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - sigma^2) eps + sigma z` with
    `sigma = eta sqrt((1 - abar_prev)/(1 - abar) (1 - abar/abar_prev))`.
    Source: Song et al., "Denoising Diffusion Implicit Models", 2021, equations 12 and 16.

    Args:
        eta: 0 is deterministic given `x_T`, 1 has the variance of ancestral sampling.
        num_steps, ensemble, clip_x0, members_at_once: as in `Sampler`.
    """

    def __init__(
        self,
        num_steps: int,
        ensemble: int = 1,
        clip_x0: bool = True,
        eta: float = 0.0,
        members_at_once: int | None = None,
    ) -> None:
        super().__init__(num_steps, ensemble, clip_x0, members_at_once)
        if not 0 <= eta <= 1:
            raise UserError(f"sampler.eta={eta} must lie between 0 and 1.")
        self.eta = eta

    def step(
        self,
        schedule: NoiseSchedule,
        x_t: Tensor,
        x0: Tensor,
        t: int,
        t_prev: int,
        draw: Callable[[], Tensor],
        earlier: Sequence[tuple[int, Tensor]] = (),
    ) -> SamplerStep:
        if t_prev < 0:
            return SamplerStep(x0, x0)
        abar, abar_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev)
        noise = (x_t - abar**0.5 * x0) / (1 - abar) ** 0.5
        variance = self.eta**2 * (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        # Rounding must not make the root imaginary where the variance takes all of it.
        previous = abar_prev**0.5 * x0 + max(0.0, 1 - abar_prev - variance) ** 0.5 * noise
        if self.eta > 0:
            previous = previous + variance**0.5 * draw()
        return SamplerStep(previous, x0)


class DPMSolver(Sampler):
    """Deterministic multistep solver of the diffusion ODE, DPM-Solver++.

    With `lambda = ln(sqrt(abar) / sqrt(1 - abar))` and `h` its growth in a step, the predicted
    clean signal is taken for a polynomial in `lambda` through the last `order` predictions, and
    `x_prev = (sigma_prev / sigma) x_t + alpha_prev int_0^h e^(u - h) x_0(lambda + u) du` is solved
    exactly, at order 2 by its midpoint form. The first steps are of the order that the predictions
    so far allow; with fewer than 15 steps the last ones are of lower order again.

    Order 3 has half the second difference that the integral asks for, as in the authors' code and
    in diffusers: better in few steps, but errors fall with the square of their number in the end.
    Source: Lu et al., "DPM-Solver++", 2022, equation 9 and algorithm 2 (multistep).

    Args:
        order: 1 (the same as DDIM with `eta=0`), 2 or 3.
        num_steps, ensemble, clip_x0, members_at_once: as in `Sampler`.
    """

    def __init__(
        self,
        num_steps: int,
        ensemble: int = 1,
        clip_x0: bool = True,
        order: int = 2,
        members_at_once: int | None = None,
    ) -> None:
        super().__init__(num_steps, ensemble, clip_x0, members_at_once)
        if order not in (1, 2, 3):
            raise UserError(f"sampler.order={order} must be 1, 2 or 3.")
        self.order = order
        self.memory = order - 1

    def step(
        self,
        schedule: NoiseSchedule,
        x_t: Tensor,
        x0: Tensor,
        t: int,
        t_prev: int,
        draw: Callable[[], Tensor],
        earlier: Sequence[tuple[int, Tensor]] = (),
    ) -> SamplerStep:
        if t_prev < 0:
            return SamplerStep(x0, x0)
        order = min(self.order, len(earlier) + 1)
        if self.num_steps < MANY_STEPS:
            order = min(order, self.num_steps - self.timesteps(schedule).index(t))
        sigma, sigma_prev = ((1 - schedule.alpha_cumprod(u)) ** 0.5 for u in (t, t_prev))
        alpha_prev = schedule.alpha_cumprod(t_prev) ** 0.5
        now = _half_log_snr(schedule, t)
        h = _half_log_snr(schedule, t_prev) - now
        shrink = math.expm1(-h)
        previous = sigma_prev / sigma * x_t - alpha_prev * shrink * x0
        if order == 1:
            return SamplerStep(previous, x0)
        (time1, x0_1), (time2, x0_2) = earlier[0], earlier[order - 2]
        # Lengths of the steps before, in units of this one.
        r1 = (now - _half_log_snr(schedule, time1)) / h
        slope = (x0 - x0_1) / r1
        if order == 2:
            return SamplerStep(previous - alpha_prev * shrink / 2 * slope, x0)
        r2 = (_half_log_snr(schedule, time1) - _half_log_snr(schedule, time2)) / h
        bend = (slope - (x0_1 - x0_2) / r2) / (r1 + r2)
        slope = slope + r1 * bend
        previous = previous + alpha_prev * (shrink / h + 1) * slope
        return SamplerStep(previous - alpha_prev * ((shrink + h) / h**2 - 0.5) * bend, x0)


def _half_log_snr(schedule: NoiseSchedule, t: int) -> float:
    abar = schedule.alpha_cumprod(t)
    return (math.log(abar) - math.log1p(-abar)) / 2
