"""Samplers: from noise to a clean signal in a chosen number of network calls.

A sampler is told the clean signal that a network predicts at each step, whatever its objective.
It steps down a grid of integer times with trailing spacing: the first is always `T - 1`, the last
step always returns the clean signal.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from common.errors import UserError
from lightning_modules.processes.schedule import NoiseSchedule

__all__ = ["DDIM", "DDPM"]


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

    Raises:
        UserError: an argument is outside its range.
    """

    def __init__(self, num_steps: int, ensemble: int = 1, clip_x0: bool = True) -> None:
        for key, value in (("num_steps", num_steps), ("ensemble", ensemble)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"sampler.{key}={value} must be a whole number of at least 1.")
        self.num_steps = num_steps
        self.ensemble = ensemble
        self.clip_x0 = clip_x0

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
        x = draw()
        for t, t_prev in zip(times, [*times[1:], -1], strict=True):
            x0 = predict_x0(x, t)
            if self.clip_x0:
                x0 = x0.clamp(-1, 1)
            step = self.step(schedule, x, x0, t, t_prev, draw)
            if on_step is not None:
                on_step(t, step)
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
    ) -> SamplerStep:
        """Go from time `t` to `t_prev`; `t_prev = -1` is the clean signal."""


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
        num_steps, ensemble, clip_x0: as in `Sampler`.
        eta: 0 is deterministic given `x_T`, 1 has the variance of ancestral sampling.
    """

    def __init__(
        self, num_steps: int, ensemble: int = 1, clip_x0: bool = True, eta: float = 0.0
    ) -> None:
        super().__init__(num_steps, ensemble, clip_x0)
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
    ) -> SamplerStep:
        if t_prev < 0:
            return SamplerStep(x0, x0)
        abar, abar_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev)
        noise = (x_t - abar**0.5 * x0) / (1 - abar) ** 0.5
        variance = self.eta**2 * (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        previous = abar_prev**0.5 * x0 + (1 - abar_prev - variance) ** 0.5 * noise
        if self.eta > 0:
            previous = previous + variance**0.5 * draw()
        return SamplerStep(previous, x0)
