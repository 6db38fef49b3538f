"""DeepLabV3 of torchvision with one logit.

Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

from common.errors import check_choice

__all__ = ["DeepLabV3"]

BACKBONES = ("resnet50", "resnet101", "mobilenet_v3_large")
WEIGHTS = {
    None: {"num_classes": 1, "weights_backbone": None},
    "imagenet": {"num_classes": 1, "weights_backbone": "IMAGENET1K_V1"},
    "coco": {"weights": "COCO_WITH_VOC_LABELS_V1"},
}


class DeepLabV3(nn.Module):
    """Dilated backbone, atrous spatial pyramid pooling and one convolution; any image size.

    `backbone` and `classifier` have torchvision's state-dict keys; the auxiliary classifier is left
    out.

    Args:
        backbone: `resnet50`, `resnet101` or `mobilenet_v3_large`.
        weights: `imagenet` loads torchvision's IMAGENET1K_V1 into the backbone; `coco` loads its
            COCO_WITH_VOC_LABELS_V1 into everything but the last layer; `None` is random.

    Raises:
        UserError: there is no such backbone or no such weights.
    """

    def __init__(self, backbone: str = "resnet101", weights: str | None = None) -> None:
        super().__init__()
        check_choice("network.kwargs.backbone", backbone, BACKBONES)
        check_choice("network.weights", weights, WEIGHTS)
        model = get_model(f"deeplabv3_{backbone}", **WEIGHTS[weights])
        self.backbone = model.backbone
        self.classifier = model.classifier
        if weights == "coco":
            self.classifier[-1] = nn.Conv2d(self.classifier[-1].in_channels, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the lesion's logits.

        Args:
            image: `(B, 3, H, W)`, normalised with ImageNet's statistics. In training `B` is at
                least 2, because the pooled branch leaves batch norm one value a sample.

        Returns:
            `(B, 1, H, W)`.
        """
        logits = self.classifier(self.backbone(image)["out"])
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
