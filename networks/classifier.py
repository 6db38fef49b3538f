"""The classification networks of torchvision, by name, in two parts: backbone and head.

Sources: those of torchvision's models; He et al., "Deep Residual Learning for Image Recognition",
2016, and Sandler et al., "MobileNetV2", 2018, are teacher and student of SSD-KD.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torchvision import models

from common.errors import UserError, check_choice
from networks.metablock import MetaBlock
from networks.sizes import refuse_size

__all__ = ["Classifier"]

# Two architectures have the second kind alone, beside one that wants a network for larger images.
PREFERRED_WEIGHTS = ("IMAGENET1K_V1", "IMAGENET1K_SWAG_LINEAR_V1")
AUXILIARY = ("aux1", "aux2", "AuxLogits")
# Without a default in torchvision's classes, and yet free to choose.
SIZE_OPTIONS = ("image_size", "input_size")
# Dropout precedes the last layer, where there is none here.
OWN_OPTIONS = ("num_classes", "aux_logits", "init_weights", "dropout", "dropout_aux")
FEATURES_A_GROUP = 32


class Classifier(nn.Module):
    """A network of torchvision with a linear layer for any number of classes.

    `backbone` is torchvision's model without its last layer and the dropout before that; it gives
    the pooled vector `(B, features)`, and its parts have torchvision's names, such as
    `backbone.layer4` or `backbone.features`. `head` is the last layer. Auxiliary classifiers are
    left out.

    Args:
        architecture: name in torchvision, such as `resnet50` or `mobilenet_v2`.
        num_classes: logits, at least 2.
        weights: `imagenet` loads torchvision's first ImageNet weights into the backbone; `None` is
            random.
        metadata: numbers that go with each image, which a `MetaBlock` brings to bear on groups of
            32 features; `None` for images alone.
        options: more arguments of torchvision's model, such as `width_mult` of `mobilenet_v2`.

    Raises:
        UserError: an unknown name, option or weights, a combination that torchvision refuses, or
            metadata for a number of features that is no multiple of 32.
    """

    def __init__(
        self,
        architecture: str,
        num_classes: int = 8,
        weights: str | None = None,
        metadata: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        _check_architecture(architecture)
        check_choice("network.weights", weights, (None, "imagenet"))
        for key, value, least in (("num_classes", num_classes, 2), ("metadata", metadata or 0, 0)):
            if value < least:
                raise UserError(f"network.kwargs.{key}={value} must be at least {least}.")
        self.backbone = _build(architecture, weights, options or {})
        features = _cut(self.backbone)
        self.num_classes = num_classes
        self.metadata_inputs = metadata or 0
        self.metablock = None
        if metadata:
            if features % FEATURES_A_GROUP:
                raise UserError(
                    f"network.kwargs.metadata={metadata} needs a multiple of {FEATURES_A_GROUP} "
                    f"features, and {architecture} has {features}; choose another "
                    "network.kwargs.architecture, or network.kwargs.metadata=null."
                )
            self.metablock = MetaBlock(features // FEATURES_A_GROUP, metadata)
        self.head = nn.Linear(features, num_classes)

    def forward(self, image: Tensor, metadata: Tensor | None = None) -> Tensor:
        """Return the logits of the classes.

        Args:
            image: `(B, 3, H, W)`, normalised with ImageNet's statistics.
            metadata: float32 `(B, metadata)`, if the network was made for it, and only then.

        Returns:
            `(B, num_classes)`.

        Raises:
            UserError: the architecture refuses the size, or the metadata does not fit.
        """
        given = 0 if metadata is None else metadata.shape[1]
        if given != self.metadata_inputs:
            raise UserError(
                f"network.kwargs.metadata is {self.metadata_inputs or 'null'}, and the images come "
                f"with {given or 'no'} number(s) of metadata each; make the two agree by "
                "datamodule.metadata or network.kwargs.metadata."
            )
        try:
            features = self.backbone(image)
        except (AssertionError, RuntimeError):
            refuse_size(self.backbone, image, self.architecture, _size_advice(self.architecture))
            raise
        if self.metablock is not None:
            groups = features.unflatten(1, (-1, FEATURES_A_GROUP))
            features = self.metablock(groups, metadata).flatten(1)
        return self.head(features)


def _check_architecture(name: str) -> None:
    names = models.list_models(module=models)
    if name not in names:
        close = difflib.get_close_matches(name, names) or ["resnet50", "mobilenet_v2", "vit_b_16"]
        raise UserError(
            f"network.kwargs.architecture={name} does not exist; torchvision has, among many, "
            f"{', '.join(close)}."
        )


def _build(architecture: str, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    """Return torchvision's model with all its layers but the auxiliary classifiers."""
    accepted = _arguments(architecture)
    legal = [
        name
        for name, parameter in accepted.items()
        if name not in OWN_OPTIONS
        and (name in SIZE_OPTIONS or parameter.default is not parameter.empty)
    ]
    for name in options:
        if name not in legal:
            raise UserError(
                f"network.kwargs.options.{name} is not an option of {architecture}; it takes "
                f"{', '.join(legal) or 'none'}."
            )
    settings = dict(options)
    if "transform_input" in accepted:
        # torchvision has it with weights alone, but a checkpoint is loaded into a network without.
        settings.setdefault("transform_input", True)
    if weights is None and "init_weights" in accepted:
        settings["init_weights"] = True
    try:
        model = _get_model(architecture, weights=_published(architecture, weights), **settings)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if weights is not None and options:
            raise UserError(
                f"network.weights={weights} does not fit {architecture} with "
                f"network.kwargs.options of {', '.join(options)}; set network.weights=null."
            ) from error
        raise UserError(f"network.kwargs: {architecture} cannot be built: {error}") from error
    if hasattr(model, "aux_logits"):
        model.aux_logits = False
        for name in AUXILIARY:
            if hasattr(model, name):
                setattr(model, name, None)
    return model


def _get_model(architecture: str, **settings: Any) -> nn.Module:
    try:
        return models.get_model(architecture, **settings)
    except NotImplementedError:
        # What torch raises where values of tensors on the meta device are read, as RegNets do while
        # they are built: they are built on the CPU and moved.
        with torch.device("cpu"):
            model = models.get_model(architecture, **settings)
        return model.to(torch.get_default_device())


def _arguments(architecture: str) -> Mapping[str, inspect.Parameter]:
    """Return what the class of an architecture can be built with."""
    cls = get_type_hints(models.get_model_builder(architecture))["return"]
    parameters = inspect.signature(cls).parameters
    variadic = inspect.Parameter.VAR_KEYWORD
    return {name: p for name, p in parameters.items() if p.kind is not variadic}


def _published(architecture: str, weights: str | None) -> models.WeightsEnum | None:
    if weights is None:
        return None
    published = models.get_model_weights(architecture).__members__
    return next(published[name] for name in PREFERRED_WEIGHTS if name in published)


def _cut(model: nn.Module) -> int:
    """Take the last layer and the dropout before it out of a model; return its input features.

    Where the classifier is a convolution, the pooling after it stays.
    """
    layers = (nn.Linear, nn.Conv2d)
    path = [name for name, module in model.named_modules() if isinstance(module, layers)][-1]
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    siblings = list(parent.named_children())
    place = [key for key, _ in siblings].index(name)
    last = siblings[place][1]
    setattr(parent, name, nn.Identity())
    before, module = siblings[place - 1] if place else ("", None)
    if isinstance(module, nn.Dropout):
        setattr(parent, before, nn.Identity())
    return last.in_features if isinstance(last, nn.Linear) else last.in_channels


def _size_advice(architecture: str) -> str:
    options = [name for name in SIZE_OPTIONS if name in _arguments(architecture)]
    if not options:
        return ""
    return f"Without weights it can have others by network.kwargs.options.{options[0]}."
