"""Auxiliary heads: maps of the lesion from the inside of a network.

Source: the DeepLabV3+ distillation repository, where they are the `resnet1`, `resnet2` and `aspp`
outputs. They belong to the method: the network that is shipped has none.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.features import check_paths, feature_shapes, watch
from lightning_modules.losses import WeightedSum, auxiliary_bce_loss
from lightning_modules.one_pass import Answer
from lightning_modules.segmentation import Segmentation
from lightning_modules.teacher import FrozenTeacher, OnTeachersNetwork

__all__ = ["AuxiliaryHeads"]

KEY = "lightning_module.auxiliary"


class AuxiliaryHead(nn.Module):
    """A map of logits from a feature map, linear apart from its enlargements.

    3x3 convolution to half the channels, nearest x2, 3x3 to a quarter, nearest to the image's size
    (published: to 224 px), 1x1 to one channel.

    Args:
        channels: of the feature map, at least 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(channels // 2, channels // 4, 3, padding=1)
        self.conv3 = nn.Conv2d(channels // 4, 1, 1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Return logits `(B, 1, *size)` of features `(B, C, h, w)`."""
        half = F.interpolate(self.conv1(features), scale_factor=2, mode="nearest")
        return self.conv3(F.interpolate(self.conv2(half), size=size, mode="nearest"))


class AuxiliarySegmentation(Segmentation):
    """`Segmentation` of a network that also has auxiliary heads, as far as a loss term needs them.

    Args:
        auxiliary: a head's name to the path of the module that feeds it, such as
            `{aspp: head.aspp}`.
        settings: everything that `Segmentation` takes; `losses` may have `auxiliary_bce`.

    Raises:
        UserError: the network has no module at a path, or it gives no feature map.
    """

    loss_functions: ClassVar = {
        **Segmentation.loss_functions,
        "auxiliary_bce": auxiliary_bce_loss,
    }
    loss_inputs: ClassVar = (*Segmentation.loss_inputs, "auxiliary")

    def __init__(
        self, *args: Any, auxiliary: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.auxiliary = dict(auxiliary or {}) if self.losses.needs("auxiliary") else {}
        if self.losses.needs("auxiliary") and not self.auxiliary:
            raise UserError(
                f"{KEY} is empty, and a loss term needs auxiliary heads; give a head's name and "
                f"the path of the module that feeds it, such as {KEY}.aspp=head.aspp."
            )
        check_paths(self.network, self.auxiliary, KEY)
        shapes = feature_shapes(self.network, self.auxiliary, KEY) if self.auxiliary else {}
        self.auxiliary_heads = nn.ModuleDict({k: AuxiliaryHead(v[0]) for k, v in shapes.items()})

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return (*self.network.parameters(), *self.auxiliary_heads.parameters())

    def respond(self, batch: Mapping[str, Any], losses: WeightedSum | None) -> Answer:
        if losses is None or not losses.needs("auxiliary"):
            return super().respond(batch, losses)
        with watch(self.network, self.auxiliary) as features:
            answer = super().respond(batch, losses)
        size = batch["image"].shape[-2:]
        maps = {k: head(features[k], size).float() for k, head in self.auxiliary_heads.items()}
        return {**answer, "auxiliary": maps}


class AuxiliaryHeads(OnTeachersNetwork, AuxiliarySegmentation):
    """Trains auxiliary heads on the frozen network of a teacher, so that it can teach with them.

    See `OnTeachersNetwork`; the published code let the statistics of the BatchNorm drift.

    Args:
        teacher: whose network it is; none where the weights come from a checkpoint of this class.
        settings: everything that `AuxiliarySegmentation` takes.

    Raises:
        UserError: the teacher's network is another than this one.
    """

    def __init__(self, *args: Any, teacher: FrozenTeacher | None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not self.auxiliary:
            raise UserError(
                "lightning_module.losses.auxiliary_bce.weight=0 leaves nothing to train; give it a "
                "value above 0."
            )
        self.take_network(teacher)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return self.auxiliary_heads.parameters()

    def predict(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `Segmentation` does, and the heads' logits by name as `auxiliary`."""
        return self.prediction(self.respond(batch, self.losses))

    def prediction(self, answer: Answer) -> dict[str, Any]:
        maps = {name: logits.detach() for name, logits in answer["auxiliary"].items()}
        return {**super().prediction(answer), "auxiliary": maps}
