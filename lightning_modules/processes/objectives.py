"""What a network predicts, and how one prediction converts into another.

With `a = sqrt(alphas_cumprod_t)` and `s = sqrt(1 - alphas_cumprod_t)`:

- `noise`: the noise `eps` (Ho et al., 2020), the published objective;
- `x0`: the clean mask, with which a single sampling step works;
- `v`: the velocity `a eps - s x_0` (Salimans and Ho, "Progressive Distillation", 2022).

All tensors are `(B, C, H, W)`, `t` is `(B,)`; everything is computed in float32.
"""

from torch import Tensor

from common.errors import UserError
from lightning_modules.processes.schedule import NoiseSchedule, at_time, snr

__all__ = ["OBJECTIVES", "min_snr_weight", "output_from_x0", "predict_x0", "training_target"]

OBJECTIVES = ("noise", "x0", "v")


def predict_x0(
    schedule: NoiseSchedule, objective: str, output: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """Convert a network's output into the clean signal it implies.

    For `noise` this is `(x_t - s eps) / a`, which multiplies the error of the output by `s / a`:
    about 175 at the last step of the published schedule.
    """
    output, x_t = output.float(), x_t.float()
    if _checked(objective) == "x0":
        return output
    signal = at_time(schedule.sqrt_alphas_cumprod, t, x_t)
    spread = at_time(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    if objective == "noise":
        return (x_t - spread * output) / signal
    return signal * x_t - spread * output


def output_from_x0(
    schedule: NoiseSchedule, objective: str, x0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """Convert a clean signal into the output that a network of this objective would have given."""
    x0, x_t = x0.float(), x_t.float()
    if _checked(objective) == "x0":
        return x0
    signal = at_time(schedule.sqrt_alphas_cumprod, t, x_t)
    spread = at_time(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    if objective == "noise":
        return (x_t - signal * x0) / spread
    return (signal * x_t - x0) / spread


def training_target(
    schedule: NoiseSchedule, objective: str, x0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Return what a network of this objective learns to predict from `x_t`."""
    if _checked(objective) == "x0":
        return x0
    if objective == "noise":
        return noise
    signal = at_time(schedule.sqrt_alphas_cumprod, t, x0)
    return signal * noise - at_time(schedule.sqrt_one_minus_alphas_cumprod, t, x0) * x0


def min_snr_weight(schedule: NoiseSchedule, objective: str, t: Tensor, gamma: float) -> Tensor:
    """Return the weight `(B,)` of each sample's squared error that evens out its times.

    It is `min(SNR, gamma)` on the error of the clean signal, expressed for what the network
    predicts: divided by the SNR for `noise`, by the SNR plus 1 for `v`.
    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023,
    section 3.4; they use `gamma = 5`.
    """
    ratio = snr(schedule, t)
    weight = ratio.clamp(max=gamma)
    return weight / {"x0": 1, "noise": ratio, "v": ratio + 1}[_checked(objective)]


def _checked(objective: str) -> str:
    if objective not in OBJECTIVES:
        raise UserError(
            f"lightning_module.objective={objective} does not exist; "
            f"choose one of {', '.join(OBJECTIVES)}."
        )
    return objective
