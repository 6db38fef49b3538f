"""Distillation of a classifier: D-KD, SSD-KD and the baselines BLKD, FitNet and RKD.

Source: Wang et al., "SSD-KD: A self-supervised diverse knowledge distillation method for
lightweight skin lesion classification using dermoscopic images", Medical Image Analysis 84, 2023,
and its repository.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from common.errors import UserError, check_choice
from lightning_modules.adapters import ChannelAdapter, ProjectionHead
from lightning_modules.classification import Classification
from lightning_modules.features import check_paths, feature_shapes, last_map, watched
from lightning_modules.losses import (
    WeightedSum,
    channel_gram_rmse,
    hint_mse,
    kd_kl,
    relational_kd,
    ss_contrastive,
    ss_kd,
    ss_similarity,
    transformed_kd,
)
from lightning_modules.one_pass import Answer
from lightning_modules.teacher import FrozenTeacher, OnTeachersNetwork

__all__ = ["ClassificationDistillation", "SelfSupervisedHead"]

VAL_LOSSES = ("cross_entropy", "full_kd")
# What a term needs of the inside of a network, by the name that the loss terms have for it.
TAPS = {
    "pooled": "pooled",
    "teacher_pooled": "pooled",
    "similarity": "pooled",
    "teacher_similarity": "pooled",
    "adapted": "features",
    "teacher_features": "features",
}
# What only rotated views have.
TURNED = (
    "transformed_logits",
    "teacher_transformed_logits",
    "similarity",
    "teacher_similarity",
)


class ClassificationDistillation(Classification):
    """`Classification` with a frozen teacher, of which the student learns in several ways.

    | term | what the student matches |
    |---|---|
    | `kd` | the teacher's probabilities, softened |
    | `drkd` | relations between the images of a batch: distances and angles of pooled features |
    | `crkd` | relations between channels of the last feature map, adapted to the teacher's |
    | `hint` | that feature map itself |
    | `transformed_kd` | the teacher's probabilities of rotated images |
    | `ss_kd` | the teacher's similarity of rotated images with upright ones |

    Once the last two have weights, the network is given all four rotations of an image, `drkd`,
    `crkd` and `hint` compare all of them, and `cross_entropy` and `kd` the upright one.

    Args:
        teacher: the frozen teacher; none where a trained student is only used.
        image_size: side of the images in px, at which feature maps are compared.
        taps: module paths in the student: `pooled`, the vector that enters its head, and
            `features`, its last feature map, which null finds.
        teacher_taps: the same in the teacher.
        val_loss: `cross_entropy`, as SSD-KD has it, or `full_kd`, the loss of the training, as
            D-KD.
        settings: everything that `Classification` takes.

    Raises:
        UserError: a path leads nowhere, or a term needs what the teacher does not have.
    """

    loss_functions: ClassVar = {
        **Classification.loss_functions,
        "kd": kd_kl,
        "drkd": relational_kd,
        "crkd": channel_gram_rmse,
        "hint": hint_mse,
        "transformed_kd": transformed_kd,
        "ss_kd": ss_kd,
    }
    teacher_inputs: ClassVar = (
        "teacher_logits",
        "teacher_pooled",
        "teacher_features",
        "teacher_transformed_logits",
        "teacher_similarity",
    )
    loss_inputs: ClassVar = (
        *Classification.loss_inputs,
        *teacher_inputs,
        "pooled",
        "adapted",
        "transformed_logits",
        "transformed_label",
        "similarity",
    )

    def __init__(
        self,
        *args: Any,
        teacher: FrozenTeacher | None,
        image_size: int,
        taps: Mapping[str, str | None],
        teacher_taps: Mapping[str, str | None],
        val_loss: str = "cross_entropy",
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        check_choice("lightning_module.val_loss", val_loss, VAL_LOSSES)
        if val_loss == "full_kd":
            self.choose_scored_terms(self.losses, self.test_terms)
        self.teacher = teacher
        self.taps: dict[str, str] = {}
        self.teacher_taps: dict[str, str] = {}
        # A module's attributes, so that there are none where no term needs them.
        self.adapter: nn.Module | None = None
        self.projection: nn.Module | None = None
        if teacher is None:
            return
        wanted = {tap for name, tap in TAPS.items() if self.losses.needs(name)}
        shapes = {}
        for key, paths, network in (
            ("lightning_module.taps", taps, self.network),
            ("lightning_module.teacher_taps", teacher_taps, teacher.network),
        ):
            found = _resolved(network, wanted, paths, key)
            shapes[key] = _shapes(network, found, key, image_size)
            setattr(self, key.split(".")[1], found)
        ours, theirs = shapes.values()
        if "features" in wanted:
            self.adapter = ChannelAdapter(ours["features"], theirs["features"])
        if self.losses.needs("similarity"):
            if not hasattr(teacher.module, "projection"):
                raise UserError(
                    "lightning_module.losses.ss_kd needs a teacher with a self-supervised head; "
                    "train one as experiment=ssd_head_ham10000 does, or set the weight of ss_kd "
                    "to 0."
                )
            self.projection = ProjectionHead(ours["pooled"][0])

    @property
    def wants_views(self) -> bool:
        return _turned(self.losses)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        # The weights' order, and with it the optimizer's state, is that of their declaration.
        return self.parameters()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **settings: Any) -> Any:
        """Load weights; without a teacher, what only served to learn from it is left out."""
        if self.teacher is None:
            helpers = ("adapter.", "projection.")
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(helpers)}
        return super().load_state_dict(state_dict, *args, **settings)

    def on_fit_start(self) -> None:
        self.teacher.to(self.device, self.dtype)

    def truth(self, batch: Mapping[str, Any]) -> Answer:
        return {
            **super().truth(batch),
            "transformed_label": batch["label"].repeat_interleave(3),
        }

    def respond(self, batch: Mapping[str, Any], losses: WeightedSum | None) -> Answer:
        paths = _needed(self.taps, losses, ("pooled", "similarity", "adapted"))
        if not paths and not _turned(losses):
            return super().respond(batch, losses)
        logits, tapped = watched(self.network, paths, _rows(batch, losses))
        answer = _by_view(logits.float(), losses)
        if "features" in tapped:
            answer["adapted"] = self.adapter(tapped["features"]).float()
        if "pooled" in tapped:
            answer["pooled"] = tapped["pooled"].float()
        if losses.needs("similarity"):
            answer["similarity"] = ss_similarity(self.projection(tapped["pooled"]).float())
        return answer

    def extra_loss_inputs(self, losses: WeightedSum, batch: Mapping[str, Any]) -> Answer:
        if not any(losses.needs(name) for name in self.teacher_inputs):
            return {}
        paths = _needed(self.teacher_taps, losses, self.teacher_inputs)
        logits, tapped = self.teacher.watched(_rows(batch, losses), paths)
        answer = _by_view(logits.float(), losses)
        answer |= {name: values.float() for name, values in tapped.items()}
        if losses.needs("teacher_similarity"):
            projected = self.teacher.module.projection(answer["pooled"])
            answer["similarity"] = ss_similarity(projected.float())
        return {f"teacher_{name}": value.detach() for name, value in answer.items()}


class SelfSupervisedHead(OnTeachersNetwork, Classification):
    """Trains a projection head on the frozen network of a teacher: SSD-KD's first phase.

    The head learns to tell which upright image a rotated one is of. The predicted classes are the
    teacher's.

    Args:
        teacher: whose network it is; none where the weights come from a checkpoint of this class.
        taps: `pooled`, the path of the module whose vector enters the head.
        settings: everything that `Classification` takes.

    Raises:
        UserError: the teacher's network is another than this one, or the path leads nowhere.
    """

    loss_functions: ClassVar = {"ss_contrastive": ss_contrastive}
    loss_inputs: ClassVar = ("similarity",)

    def __init__(
        self, *args: Any, teacher: FrozenTeacher | None, taps: Mapping[str, str], **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        key = "lightning_module.taps"
        self.taps = _resolved(self.network, {"pooled"}, taps, key)
        (features,) = _shapes(self.network, self.taps, key, None)["pooled"]
        self.projection = ProjectionHead(features)
        self.choose_scored_terms(self.losses, None)
        self.take_network(teacher)

    @property
    def wants_views(self) -> bool:
        return True

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return self.projection.parameters()

    def respond(self, batch: Mapping[str, Any], losses: WeightedSum | None) -> Answer:
        if losses is None:
            return super().respond(batch, losses)
        logits, tapped = watched(self.network, self.taps, _rows(batch, losses))
        projected = self.projection(tapped["pooled"]).float()
        return {**_by_view(logits.float(), losses), "similarity": ss_similarity(projected)}


def _turned(losses: WeightedSum | None) -> bool:
    """Tell whether a loss term needs the rotated views."""
    return losses is not None and any(losses.needs(name) for name in TURNED)


def _rows(batch: Mapping[str, Any], losses: WeightedSum) -> Tensor:
    """Return the images of a batch, or all their views `(4B, 3, H, W)`, image by image."""
    return batch["views"].flatten(0, 1) if _turned(losses) else batch["image"]


def _by_view(logits: Tensor, losses: WeightedSum) -> Answer:
    """Divide logits into those of upright images and those of rotated ones."""
    if not _turned(losses):
        return {"logits": logits}
    views = logits.unflatten(0, (-1, 4))
    return {"logits": views[:, 0], "transformed_logits": views[:, 1:].flatten(0, 1)}


def _needed(
    taps: Mapping[str, str], losses: WeightedSum | None, names: Iterable[str]
) -> dict[str, str]:
    """Return the taps that the loss terms need for some of their inputs."""
    if losses is None:
        return {}
    wanted = {TAPS[name] for name in names if name in TAPS and losses.needs(name)}
    return {name: path for name, path in taps.items() if name in wanted}


def _resolved(
    network: nn.Module, wanted: Iterable[str], paths: Mapping[str, str | None], key: str
) -> dict[str, str]:
    """Return the paths of the taps that are wanted, all of which exist."""
    found = {}
    for name in wanted:
        path = paths.get(name)
        if path is None and name != "features":
            raise UserError(f"{key}.{name} has no value; give the path of a module.")
        found[name] = path or last_map(network, f"{key}.{name}")
    check_paths(network, found, key)
    return found


def _shapes(
    network: nn.Module, paths: Mapping[str, str], key: str, size: int | None
) -> dict[str, tuple[int, ...]]:
    """Return what the taps give for one image, without the batch."""
    sizes = {} if size is None else {"size": size}
    shapes = {}
    for name, path in paths.items():
        ndim = {"features": 3, "pooled": 1}[name]
        shapes |= feature_shapes(network, {name: path}, key, ndim=ndim, **sizes)
    return shapes
