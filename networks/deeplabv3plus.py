"""DeepLabV3+ on dilated ResNets of output stride 8.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation", 2018, with dense convolutions. Backbones and pyramid are torchvision's.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.segmentation.deeplabv3 import ASPP

from common.errors import check_choice

__all__ = ["DeepLabV3Plus"]

BACKBONES = ("resnet18", "resnet50", "resnet101", "resnet152")
WEIGHTS = {None: None, "imagenet": "IMAGENET1K_V1"}
LOW_LEVEL_WIDTH = 48
WIDTH = 256
DROPOUT = 0.1


class DeepLabV3Plus(nn.Module):
    """Encoder-decoder with atrous spatial pyramid pooling; any image size.

    `backbone` has the state-dict keys of torchvision's ResNets without `fc`; `backbone.layer1` has
    stride 4, everything from `backbone.layer2` on stride 8. `head.aspp` gives 256 channels.

    Args:
        backbone: `resnet18`, `resnet50`, `resnet101` or `resnet152`. The first dilates only the
            first block of `layer3` and `layer4`, as the published student does; the others are
            torchvision's with `replace_stride_with_dilation=[False, True, True]`.
        weights: `imagenet` loads torchvision's IMAGENET1K_V1 into the backbone; `None` is random.
        atrous_rates: dilations of the pyramid's 3x3 convolutions, in pixels of stride 8.

    Raises:
        UserError: there is no such backbone or no such weights.
    """

    def __init__(
        self,
        backbone: str = "resnet101",
        weights: str | None = None,
        atrous_rates: Sequence[int] = (12, 24, 36),
    ) -> None:
        super().__init__()
        check_choice("network.kwargs.backbone", backbone, BACKBONES)
        check_choice("network.weights", weights, WEIGHTS)
        basic = backbone == "resnet18"
        # torchvision cannot dilate the basic blocks.
        dilation = {} if basic else {"replace_stride_with_dilation": [False, True, True]}
        resnet = get_model(backbone, weights=WEIGHTS[weights], **dilation)
        if basic:
            _dilate(resnet.layer3[0])
            _dilate(resnet.layer4[0])
        channels = resnet.fc.in_features
        del resnet.avgpool, resnet.fc
        self.backbone = nn.Sequential(OrderedDict(resnet.named_children()))
        self.head = DeepLabV3PlusHead(channels // 8, channels, atrous_rates)

    def forward(self, image: Tensor) -> Tensor:
        """Return the lesion's logits.

        Args:
            image: `(B, 3, H, W)`, normalised with ImageNet's statistics. In training `B` is at
                least 2, because the pooled branch leaves batch norm one value a sample.

        Returns:
            `(B, 1, H, W)`.
        """
        features = image
        for name, part in self.backbone.named_children():
            features = part(features)
            if name == "layer1":
                low_level = features
        return _resize(self.head(low_level, features), image)


class DeepLabV3PlusHead(nn.Module):
    """Pyramid on the last features, joined with a narrow projection of the first ones.

    Args:
        low_level_channels: channels of the first features, of stride 4.
        channels: channels of the last features, of stride 8.
        atrous_rates: dilations of the pyramid.
    """

    def __init__(self, low_level_channels: int, channels: int, atrous_rates: Sequence[int]) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(low_level_channels, LOW_LEVEL_WIDTH, 1, bias=False),
            nn.BatchNorm2d(LOW_LEVEL_WIDTH),
            nn.ReLU(inplace=True),
        )
        self.aspp = ASPP(channels, atrous_rates, WIDTH)
        self.aspp.project[-1].p = DROPOUT
        self.classifier = nn.Sequential(
            nn.Conv2d(LOW_LEVEL_WIDTH + WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(inplace=True),
            nn.Conv2d(WIDTH, 1, 1),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, low_level: Tensor, features: Tensor) -> Tensor:
        """Return logits `(B, 1, H/4, W/4)`, of the size of `low_level`."""
        pyramid = _resize(self.aspp(features), low_level)
        return self.classifier(torch.cat((self.project(low_level), pyramid), dim=1))


def _dilate(block: nn.Module) -> None:
    """Turn a basic block's stride of 2 into a dilation of its second convolution."""
    block.conv1.stride = block.downsample[0].stride = (1, 1)
    block.conv2.dilation = block.conv2.padding = (2, 2)


def _resize(values: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(values, like.shape[-2:], mode="bilinear", align_corners=False)
