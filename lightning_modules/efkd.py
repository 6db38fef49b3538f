"""Edge-focused knowledge distillation of a diffusion student."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from common.errors import UserError
from lightning_modules.diffusion import DiffusionSegmentation
from lightning_modules.losses import WeightedSum, efkd_loss, probability_kd_loss
from lightning_modules.processes import output_from_x0, predict_x0, snr
from lightning_modules.teacher import FrozenTeacher

__all__ = ["EdgeFocusedDistillation"]


class EdgeFocusedDistillation(DiffusionSegmentation):
    """`DiffusionSegmentation` with a frozen teacher whose output the student also matches.

    The term `efkd` compares with a denoising teacher's network at the student's noise. Where
    student and teacher have different objectives, the teacher's output is converted to the
    clean mask, clamped to [-1, 1] and converted to the student's objective, in float32. The
    conversion of a noise-predicting teacher multiplies its error by up to 175 at large `t`, so
    each sample's distillation term is then weighted by `min(1, SNR(t))`.

    The term `probability_kd` compares the clean mask that the student predicts with the
    probability of any teacher, such as one that needs a single pass. The clean mask of a
    noise-predicting student has the same error at large `t` and the same weight.
    Source: the EFKD repository for `efkd` at equal objectives.

    Args:
        teacher: the frozen teacher.
        snr_weighting: the weighting above; never applied where nothing is converted.
        settings: everything that `DiffusionSegmentation` takes; `losses` may have `efkd` and
            `probability_kd`.

    Raises:
        UserError: `efkd` has a weight and the teacher denoises nothing.
    """

    loss_functions: ClassVar = {
        **DiffusionSegmentation.loss_functions,
        "efkd": efkd_loss,
        "probability_kd": probability_kd_loss,
    }
    output_names: ClassVar = (*DiffusionSegmentation.output_names, "student")
    teacher_inputs: ClassVar = ("teacher", "teacher_probability")
    loss_inputs: ClassVar = (
        *DiffusionSegmentation.loss_inputs,
        *teacher_inputs,
        "student",
        "sample_weight",
        "x0_weight",
    )

    def __init__(
        self, *args: Any, teacher: FrozenTeacher, snr_weighting: bool = True, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        if teacher is not None and teacher.objective is None and self.losses.needs("teacher"):
            raise UserError(
                "lightning_module.losses.efkd needs a diffusion teacher, and this one predicts in "
                "one pass; set lightning_module.losses.efkd.weight=0 and give "
                "lightning_module.losses.probability_kd.weight a value."
            )
        self.teacher = teacher
        self.snr_weighting = snr_weighting

    def on_fit_start(self) -> None:
        self.teacher.to(self.device, self.dtype)

    def extra_loss_inputs(
        self,
        losses: WeightedSum,
        batch: Mapping[str, Any],
        x_t: Tensor,
        t: Tensor,
    ) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        faint = snr(self.schedule, t).clamp(max=1) if self.snr_weighting else None
        if losses.needs("teacher"):
            answer = self.teacher.denoise(x_t, batch["image"], t).float()
            same = self.teacher.objective == self.objective
            if not same:
                x0 = predict_x0(self.schedule, self.teacher.objective, answer, x_t, t).clamp(-1, 1)
                answer = output_from_x0(self.schedule, self.objective, x0, x_t, t)
            extra |= {"teacher": answer, "sample_weight": None if same else faint}
        if losses.needs("teacher_probability"):
            probability = self.teacher.predict(batch)["probability"]
            direct = self.objective == "x0"
            extra |= {
                "teacher_probability": probability,
                "x0_weight": None if direct else faint,
            }
        return extra
