"""The variance schedule of the diffusion and the closed-form forward process."""

import math

import torch
from torch import Tensor, nn

from common.errors import UserError, check_choice

__all__ = ["NoiseSchedule", "snr"]

MODES = ("linear", "quadratic", "cosine", "sigmoid")


class NoiseSchedule(nn.Module):
    """Variance schedule with every quantity that training and sampling derive from it.

    All buffers have shape `(num_timesteps,)`, are computed in float64 and kept in float32 on the
    module's device; they are rebuilt from the arguments and never stored in a state dict.

    With `b0 = beta_start` and `b1 = beta_end`:

    - `linear`: `linspace(b0, b1)`;
    - `quadratic`: `linspace(sqrt(b0), sqrt(b1))^2`;
    - `sigmoid`: `sigmoid(linspace(-6, 6)) (b1 - b0) + b0`;
    - `cosine`: from `alphas_cumprod_u = cos^2(pi/2 (u/T + 0.008)/1.008)`, clipped to `[b0, b1]`.

    Sources: Ho et al., "Denoising Diffusion Probabilistic Models", 2020; Nichol and Dhariwal, 2021
    (cosine). The cosine clip to `[beta_start, beta_end]` is that of the DermoSegDiff code.

    Args:
        num_timesteps: `T`, at least 1.
        beta_start, beta_end: first and last variance, `0 < beta_start <= beta_end < 1`.
        mode: one of the four above, in any case.
        cosine_clip_max: upper clip of the cosine mode in place of `beta_end`, such as 0.999.

    Attributes:
        betas, alphas, alphas_cumprod, alphas_cumprod_prev, sqrt_recip_alphas,
        sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, posterior_variance: float32 `(T,)`.

    Raises:
        UserError: an argument is outside its range.
    """

    def __init__(
        self,
        num_timesteps: int = 250,
        beta_start: float = 4e-4,
        beta_end: float = 0.08,
        mode: str = "linear",
        cosine_clip_max: float | None = None,
    ) -> None:
        super().__init__()
        mode = str(mode).lower()
        check_choice("schedule.mode", mode, MODES)
        if num_timesteps < 1:
            raise UserError(f"schedule.num_timesteps={num_timesteps} must be at least 1.")
        if not 0 < beta_start <= beta_end < 1:
            raise UserError(
                f"schedule.beta_start={beta_start} and schedule.beta_end={beta_end} must satisfy "
                "0 < beta_start <= beta_end < 1."
            )
        self.num_timesteps = int(num_timesteps)
        self.beta_start = float(beta_start)
        self.beta_end = float(beta_end)
        self.mode = mode
        self.cosine_clip_max = cosine_clip_max

        betas = self._betas()
        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        alphas_cumprod_prev = torch.cat((alphas_cumprod.new_ones(1), alphas_cumprod[:-1]))
        self._alphas_cumprod = alphas_cumprod.tolist()
        for name, values in {
            "betas": betas,
            "alphas": alphas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "sqrt_recip_alphas": alphas.rsqrt(),
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "posterior_variance": betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod),
        }.items():
            self.register_buffer(name, values.float(), persistent=False)

    def _betas(self) -> Tensor:
        steps, start, end = self.num_timesteps, self.beta_start, self.beta_end
        float64 = torch.float64
        if self.mode == "linear":
            return torch.linspace(start, end, steps, dtype=float64)
        if self.mode == "quadratic":
            return torch.linspace(start**0.5, end**0.5, steps, dtype=float64).square()
        if self.mode == "sigmoid":
            return torch.linspace(-6, 6, steps, dtype=float64).sigmoid() * (end - start) + start
        u = torch.arange(steps + 1, dtype=float64) / steps
        alphas_cumprod = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
        return betas.clamp(start, end if self.cosine_clip_max is None else self.cosine_clip_max)

    def alpha_cumprod(self, t: int) -> float:
        """Return `alphas_cumprod` at one time in double precision, 1 at `t = -1` (the clean end).

        Samplers need differences such as `1 - alpha`, which float32 would round away, and the
        host's copy costs no device synchronisation.
        """
        return 1.0 if t < 0 else self._alphas_cumprod[t]

    def settings(self) -> dict[str, int | float | str | None]:
        """Return the constructor's arguments, to compare two schedules or to store one."""
        return {
            "num_timesteps": self.num_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "mode": self.mode,
            "cosine_clip_max": self.cosine_clip_max,
        }

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw from the forward process: `x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise`.

        Args:
            x0: clean signal `(B, C, H, W)`, masks in {-1, 1}.
            t: integer time steps `(B,)` in `[0, num_timesteps)`.
            noise: standard normal noise shaped like `x0`.

        Source: Ho et al., 2020, equation 4.
        """
        signal = at_time(self.sqrt_alphas_cumprod, t, x0)
        return signal * x0 + at_time(self.sqrt_one_minus_alphas_cumprod, t, x0) * noise


def snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return the signal-to-noise ratio `abar_t / (1 - abar_t)` at integer times `t`."""
    alphas_cumprod = schedule.alphas_cumprod[t]
    return alphas_cumprod / (1 - alphas_cumprod)


def at_time(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Gather `values[t]`, shaped to broadcast over the trailing axes of `like`."""
    return values[t].view(-1, *[1] * (like.ndim - 1))
