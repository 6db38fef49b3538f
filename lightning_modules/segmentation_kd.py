"""Knowledge distillation of a student that segments in one pass."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from common.errors import UserError
from lightning_modules.auxiliary import AuxiliarySegmentation
from lightning_modules.losses import (
    WeightedSum,
    auxiliary_kd_loss,
    bernoulli_kl_loss,
    logit_kd_loss,
)
from lightning_modules.one_pass import Answer
from lightning_modules.teacher import FrozenTeacher

__all__ = ["SegmentationDistillation"]

# Where a teacher says no more than a probability, it is known to a grey level at best.
LEAST_PROBABILITY = 1 / 510


class SegmentationDistillation(AuxiliarySegmentation):
    """`Segmentation` with a frozen teacher whose logits, or auxiliary maps, the student matches.

    Any module that has `predict` can teach. Of one that predicts `logits`, as every method here
    that needs a single pass does, these are taken; of others, such as a diffusion teacher, those of
    its `probability`, kept off 0 and 1 by half a grey level.

    Source: the DeepLabV3+ distillation repository (`logit_kd`, `auxiliary_kd`) and the README of
    the distilled UNet (`bernoulli_kl`).

    Args:
        teacher: the frozen teacher; none where a trained student is only used.
        settings: everything that `AuxiliarySegmentation` takes; `losses` may have `logit_kd`,
            `bernoulli_kl` and `auxiliary_kd`.

    Raises:
        UserError: a loss term needs auxiliary heads that the teacher does not have, or that would
            be a mean.
    """

    loss_functions: ClassVar = {
        **AuxiliarySegmentation.loss_functions,
        "logit_kd": logit_kd_loss,
        "bernoulli_kl": bernoulli_kl_loss,
        "auxiliary_kd": auxiliary_kd_loss,
    }
    teacher_inputs: ClassVar = ("teacher_logits", "teacher_auxiliary")
    loss_inputs: ClassVar = (*AuxiliarySegmentation.loss_inputs, *teacher_inputs)

    def __init__(self, *args: Any, teacher: FrozenTeacher | None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if teacher is not None and self.losses.needs("teacher_auxiliary"):
            if teacher.averages:
                raise UserError(
                    "lightning_module.losses.auxiliary_kd needs the auxiliary maps of one teacher; "
                    "set teacher.turns=false and give one, or set the weight of auxiliary_kd to 0."
                )
            theirs = getattr(teacher.module, "auxiliary_heads", {})
            missing = [name for name in self.auxiliary if name not in theirs]
            if missing:
                raise UserError(
                    f"lightning_module.losses.auxiliary_kd needs a teacher with an auxiliary head "
                    f"{missing[0]}; train one as experiment=deeplab_aux_isic2018 does, or set the "
                    "weights of auxiliary_kd and auxiliary_bce to 0."
                )
        self.teacher = teacher

    def live_terms(self) -> list[str]:
        """Return the terms of nonzero weight that need more of the teacher than a probability."""
        return ["auxiliary_kd"] if self.losses.needs("teacher_auxiliary") else []

    def on_fit_start(self) -> None:
        self.teacher.to(self.device, self.dtype)

    def extra_loss_inputs(self, losses: WeightedSum, batch: Mapping[str, Any]) -> Answer:
        if not any(losses.needs(name) for name in self.teacher_inputs):
            return {}
        answer = self.teacher.predict(batch)
        logits = answer.get("logits")
        if logits is None:
            logits = torch.logit(answer["probability"].float(), eps=LEAST_PROBABILITY)
        return {"teacher_logits": logits, "teacher_auxiliary": answer.get("auxiliary")}
