"""Edge-focused knowledge distillation of a diffusion student."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_modules.diffusion import DiffusionSegmentation
from lightning_modules.losses import WeightedSum, efkd_loss
from lightning_modules.processes import output_from_x0, predict_x0, snr
from lightning_modules.teacher import FrozenTeacher

__all__ = ["EdgeFocusedDistillation"]


class EdgeFocusedDistillation(DiffusionSegmentation):
    """`DiffusionSegmentation` with a frozen teacher whose output the student also matches.

    Where student and teacher have different objectives, the teacher's output is converted to the
    clean mask, clamped to [-1, 1] and converted to the student's objective, in float32. The
    conversion of a noise-predicting teacher multiplies its error by up to 175 at large `t`, so
    each sample's distillation term is then weighted by `min(1, SNR(t))`.
    Source: the EFKD repository for equal objectives.

    Args:
        teacher: the frozen teacher.
        snr_weighting: the weighting above; never applied where the objectives agree.
        settings: everything that `DiffusionSegmentation` takes; `losses` may have `efkd`.
    """

    loss_functions: ClassVar = {**DiffusionSegmentation.loss_functions, "efkd": efkd_loss}
    output_names: ClassVar = (*DiffusionSegmentation.output_names, "student")
    loss_inputs: ClassVar = (
        *DiffusionSegmentation.loss_inputs,
        "student",
        "teacher",
        "sample_weight",
    )

    def __init__(
        self, *args: Any, teacher: FrozenTeacher, snr_weighting: bool = True, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.teacher = teacher
        self.snr_weighting = snr_weighting

    def on_fit_start(self) -> None:
        self.teacher.to(self.device)

    def extra_loss_inputs(
        self,
        losses: WeightedSum,
        batch: Mapping[str, Any],
        x_t: Tensor,
        t: Tensor,
    ) -> dict[str, Any]:
        if not losses.uses("efkd"):
            return {}
        answer = self.teacher(x_t, batch["image"], t).float()
        weight = None
        if self.teacher.objective != self.objective:
            x0 = predict_x0(self.schedule, self.teacher.objective, answer, x_t, t).clamp(-1, 1)
            answer = output_from_x0(self.schedule, self.objective, x0, x_t, t)
            if self.snr_weighting:
                weight = snr(self.schedule, t).clamp(max=1)
        return {"teacher": answer, "sample_weight": weight}
