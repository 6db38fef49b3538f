"""Edge-focused knowledge distillation of a diffusion student."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.errors import UserError, check_choice
from lightning_modules.diffusion import DiffusionSegmentation
from lightning_modules.losses import (
    WeightedSum,
    consistency_loss,
    efkd_loss,
    probability_kd_loss,
)
from lightning_modules.processes import output_from_x0, predict_x0, snr
from lightning_modules.teacher import FrozenTeacher

__all__ = ["EdgeFocusedDistillation"]


class EdgeFocusedDistillation(DiffusionSegmentation):
    """`DiffusionSegmentation` with a frozen teacher whose output the student also matches.

    The term `efkd` compares with a denoising teacher's network at the student's noise, as
    published, or with the mask that any teacher predicts. Where what is compared with is not of
    the student's objective, it is converted to the clean mask, clamped to [-1, 1] and converted to
    the student's objective, in float32. The conversion of a noise-predicting teacher multiplies
    its error by up to 175 at large `t`, so each sample's distillation term is then weighted by
    `min(1, SNR(t))`.

    The term `probability_kd` compares the clean mask that the student predicts with the
    probability of any teacher, such as one that needs a single pass. The clean mask of a
    noise-predicting student has the same error at large `t` and the same weight.

    The term `consistency` compares it with the clean mask that the student itself predicts, without
    graph, from less noise: `consistency_jump` times lower on the path along which the teacher
    denoises.

    A teacher that is weaker than its student will be helps at first and holds it back later. With
    `distil_until` the weights of all terms that need the teacher fall linearly to 0 while the
    student trains; from then on the teacher is not asked. The losses of a validation keep them.
    Sources: the EFKD repository for `efkd` at equal objectives; Song et al., "Consistency Models",
    2023, algorithm 2 with DDIM as solver and no average of the student, for `consistency`;
    Cho and Hariharan, "On the Efficacy of Knowledge Distillation", 2019, for distillation that ends
    early.

    Args:
        teacher: the frozen teacher.
        snr_weighting: the weighting above; never applied where nothing is converted.
        efkd_target: what `efkd` compares with, `network` or `prediction`. The prediction is the
            mean over the members of the teacher's ensemble, which estimates the mean of the
            posterior: what a student that has one step should say.
        consistency_jump: how many times lie between the two predictions of `consistency`.
        distil_until: share of the training, in (0, 1], at which the teacher falls silent; none lets
            its terms keep their weights.
        settings: everything that `DiffusionSegmentation` takes; `losses` may have `efkd`,
            `probability_kd` and `consistency`.

    Raises:
        UserError: an argument is outside its range, a term has a weight that needs a teacher that
            denoises, and this one does not, or nothing is left to learn when the teacher is silent.
    """

    loss_functions: ClassVar = {
        **DiffusionSegmentation.loss_functions,
        "efkd": efkd_loss,
        "probability_kd": probability_kd_loss,
        "consistency": consistency_loss,
    }
    output_names: ClassVar = (*DiffusionSegmentation.output_names, "student")
    teacher_inputs: ClassVar = ("teacher", "teacher_probability", "consistent_x0")
    loss_inputs: ClassVar = (
        *DiffusionSegmentation.loss_inputs,
        *teacher_inputs,
        "student",
        "sample_weight",
        "x0_weight",
    )

    def __init__(
        self,
        *args: Any,
        teacher: FrozenTeacher,
        snr_weighting: bool = True,
        efkd_target: str = "network",
        consistency_jump: int = 25,
        distil_until: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        check_choice("lightning_module.efkd_target", efkd_target, ("network", "prediction"))
        if not 1 <= consistency_jump < self.schedule.num_timesteps:
            raise UserError(
                f"lightning_module.consistency_jump={consistency_jump} must lie in "
                f"[1, {self.schedule.num_timesteps})."
            )
        if distil_until is not None:
            if not 0 < distil_until <= 1:
                raise UserError(
                    f"lightning_module.distil_until={distil_until} must lie in (0, 1], or be null."
                )
            if self.losses.without(*self.teacher_inputs) is None:
                raise UserError(
                    f"lightning_module.distil_until={distil_until} leaves no term of "
                    "lightning_module.losses to train with when the teacher is silent; give l2 a "
                    "weight, or set distil_until to null."
                )
        self.distil_until = distil_until
        self.efkd_target = efkd_target
        if teacher is not None and teacher.objective is None:
            live = self.live_terms()
            if live:
                raise UserError(
                    f"lightning_module.losses.{live[0]} needs a diffusion teacher, and this one "
                    "predicts in one pass, or is several; set its weight to 0 and give "
                    "lightning_module.losses.probability_kd.weight a value, or set "
                    "lightning_module.efkd_target=prediction."
                )
        self.teacher = teacher
        self.snr_weighting = snr_weighting
        self.consistency_jump = consistency_jump

    def live_terms(self) -> list[str]:
        """Return the terms of nonzero weight that need more of the teacher than a probability."""
        live = {"efkd": self.efkd_target == "network", "consistency": True}
        return [term for term in self.losses.weights if live.get(term)]

    def on_fit_start(self) -> None:
        self.teacher.to(self.device, self.dtype)
        if self.distil_until is not None:
            self._silent_from = self.distil_until * self.trainer.estimated_stepping_batches
            if math.isinf(self._silent_from):
                raise UserError(
                    f"lightning_module.distil_until={self.distil_until} is a share of the training,"
                    " which has no end; set trainer.max_epochs or trainer.max_steps."
                )

    def training_terms(self) -> WeightedSum:
        if self.distil_until is None:
            return self.losses
        # A function of the step alone: a resumed run goes on where it was.
        left = max(0.0, 1 - self.trainer.global_step / self._silent_from)
        return self.losses.faded(left, *self.teacher_inputs)

    def extra_loss_inputs(
        self,
        losses: WeightedSum,
        batch: Mapping[str, Any],
        x_t: Tensor,
        t: Tensor,
    ) -> dict[str, Any]:
        faint = snr(self.schedule, t).clamp(max=1) if self.snr_weighting else None
        x0_weight = None if self.objective == "x0" else faint
        extra: dict[str, Any] = {"x0_weight": x0_weight}
        predicted = losses.needs("teacher") and self.efkd_target == "prediction"
        if losses.needs("teacher_probability") or predicted:
            probability = self.teacher.predict(batch)["probability"]
            extra["teacher_probability"] = probability
        if predicted:
            x0 = probability * 2 - 1
            answer = output_from_x0(self.schedule, self.objective, x0, x_t, t)
            extra |= {"teacher": answer, "sample_weight": x0_weight}
        denoised = losses.needs("teacher") and not predicted
        if denoised or losses.needs("consistent_x0"):
            answer = self.teacher.denoise(x_t, batch["image"], t).float()
            objective = self.teacher.objective
            x0 = predict_x0(self.schedule, objective, answer, x_t, t).clamp(-1, 1)
        if denoised:
            same = objective == self.objective
            if not same:
                answer = output_from_x0(self.schedule, self.objective, x0, x_t, t)
            extra |= {"teacher": answer, "sample_weight": None if same else faint}
        if losses.needs("consistent_x0"):
            extra["consistent_x0"] = self._from_less_noise(batch["image"], x_t, t, x0)
        return extra

    @torch.no_grad()
    def _from_less_noise(self, image: Tensor, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Return the clean mask that the student predicts further down the path to `x0`."""
        lower = (t - self.consistency_jump).clamp(min=0)
        noise = output_from_x0(self.schedule, "noise", x0, x_t, t)
        x_lower = self.schedule.q_sample(x0, lower, noise)
        output = self.network(x_lower, image, lower).float()
        return predict_x0(self.schedule, self.objective, output, x_lower, lower).clamp(-1, 1)
