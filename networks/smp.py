"""The architectures and encoders of segmentation_models.pytorch, by name.

Sources: Iakubovskii, "Segmentation Models Pytorch", 2019; Wightman, "PyTorch Image Models", 2019,
for the encoders whose names begin with `tu-`.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError, check_choice
from networks.blocks import check_image_size
from networks.sizes import refuse_size

__all__ = ["SmpNetwork"]

OWN_ARGUMENTS = {
    "activation",
    "aux_params",
    "classes",
    "encoder_name",
    "encoder_weights",
    "in_channels",
}


class SmpNetwork(nn.Module):
    """A network of segmentation_models.pytorch with one logit; `model` holds it.

    `Unet` takes any image size, most others multiples of `size_multiple`, some encoders one size
    alone, which `options` may set (`img_size` or `dynamic_img_size` for many of timm).

    Args:
        architecture: `Unet`, `UnetPlusPlus`, `MAnet`, `Linknet`, `FPN`, `PSPNet`, `DeepLabV3`,
            `DeepLabV3Plus`, `PAN`, `UPerNet`, `Segformer` or `DPT`, in upper or lower case.
        encoder: name in that library, such as `resnet34` or `mit_b0`, or `tu-` and a name in timm,
            such as `tu-convnext_atto`. `DPT` takes vision transformers of timm only.
        weights: the encoder's pretrained weights, `imagenet` for most; for those of timm it stands
            for the weights that their name says. `None` is random.
        options: more arguments of the architecture; those it does not know go to timm's encoder.

    Raises:
        UserError: an unknown name, option or weights, or a combination the library refuses.
    """

    def __init__(
        self,
        architecture: str,
        encoder: str,
        weights: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Importing it takes seconds, and most runs have another network.
        from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING

        key = architecture.lower()
        check_choice("network.kwargs.architecture", key, list(MODEL_ARCHITECTURES_MAPPING))
        cls = MODEL_ARCHITECTURES_MAPPING[key]
        check_choice("network.weights", weights, [None, *_published_weights(encoder)])
        self.title = f"{cls.__name__} with encoder {encoder}"
        settings = {
            "encoder_name": encoder,
            # timm's encoders only want to know whether.
            "encoder_weights": (weights and True) if encoder.startswith("tu-") else weights,
            **_checked_options(options or {}, cls, encoder),
        }
        try:
            # Some encoders read values of tensors while they are built.
            with torch.device("cpu"):
                self.model = cls(in_channels=3, classes=1, **settings)
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"network.kwargs: {self.title} cannot be built: {error}") from error
        self.model.to(torch.get_default_device())
        divisible = self.model.requires_divisible_input_shape
        self.size_multiple = self.model.encoder.output_stride if divisible else 1

    def forward(self, image: Tensor) -> Tensor:
        """Return the lesion's logits.

        Args:
            image: `(B, 3, H, W)`, normalised as the encoder's weights want it.

        Returns:
            `(B, 1, H, W)`.

        Raises:
            UserError: height or width is not a multiple of `size_multiple`, or the encoder refuses
                the size.
        """
        check_image_size(image, self.title, self.size_multiple)
        try:
            return self.model(image)
        except (AssertionError, RuntimeError):
            advice = (
                "Many encoders of timm take others with "
                f"network.kwargs.options.img_size={image.shape[-2]}."
            )
            refuse_size(self.model, image, self.title, advice)
            raise


def _published_weights(encoder: str) -> list[str]:
    """Return the names of an encoder's pretrained weights; refuse an unknown encoder."""
    import timm
    from segmentation_models_pytorch.encoders import encoders

    if encoder in encoders:
        return list(encoders[encoder]["pretrained_settings"])
    name = encoder.removeprefix("tu-")
    if name != encoder and timm.is_model(name):
        return ["imagenet"] if timm.models.is_model_pretrained(name) else []
    names = [*encoders, *(f"tu-{name}" for name in timm.list_models())]
    close = difflib.get_close_matches(encoder, names) or ["resnet34", "mit_b0", "tu-convnext_atto"]
    raise UserError(
        f"network.kwargs.encoder={encoder} does not exist; there are, among many, "
        f"{', '.join(close)}. The names of timm begin with tu-."
    )


def _checked_options(options: Mapping[str, Any], cls: type, encoder: str) -> Mapping[str, Any]:
    """Return the options; refuse those that the library would ignore or that are set here."""
    parameters = inspect.signature(cls).parameters.values()
    variadic = inspect.Parameter.VAR_KEYWORD
    legal = [p.name for p in parameters if p.kind is not variadic and p.name not in OWN_ARGUMENTS]
    for name in options:
        if name in OWN_ARGUMENTS or not (name in legal or encoder.startswith("tu-")):
            raise UserError(
                f"network.kwargs.options.{name} is not an option of {cls.__name__} with encoder "
                f"{encoder}; it takes {', '.join(legal)}."
            )
    return options
