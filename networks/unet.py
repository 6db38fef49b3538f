"""UNet with batch norm.

Source: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015,
with padded convolutions.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from networks.blocks import check_image_size

__all__ = ["UNet"]

LEVELS = 4


class UNet(nn.Module):
    """Four levels down and up, two 3x3 convolutions a level, trained from scratch.

    Args:
        base_width: channels at full resolution, at least 1; every level doubles them.

    Raises:
        UserError: `base_width` is below 1.
    """

    size_multiple = 2**LEVELS

    def __init__(self, base_width: int = 32) -> None:
        super().__init__()
        if base_width < 1:
            raise UserError(
                f"network.kwargs.base_width={base_width} must be at least 1, such as 16, 32 or 64."
            )
        widths = [base_width * 2**level for level in range(LEVELS + 1)]
        pairs = list(pairwise(widths))
        self.stem = _double_conv(3, base_width)
        self.encoder = nn.ModuleList(_double_conv(narrow, wide) for narrow, wide in pairs)
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in reversed(pairs)
        )
        self.decoder = nn.ModuleList(_double_conv(wide, narrow) for narrow, wide in reversed(pairs))
        self.head = nn.Conv2d(base_width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the lesion's logits.

        Args:
            image: `(B, 3, H, W)`, as normalised in training.

        Returns:
            `(B, 1, H, W)`.

        Raises:
            UserError: height or width is not a multiple of `size_multiple`.
        """
        check_image_size(image, "UNet", self.size_multiple)
        features = self.stem(image)
        skips = []
        for stage in self.encoder:
            skips.append(features)
            features = stage(F.max_pool2d(features, 2))
        for upsample, stage in zip(self.upsample, self.decoder, strict=True):
            features = stage(torch.cat((skips.pop(), upsample(features)), dim=1))
        return self.head(features)


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
