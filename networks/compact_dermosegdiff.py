"""A student of DermoSegDiff that is small in multiply-adds as well as in parameters.

As in DermoSegDiff an image (guidance) branch gates a noisy-mask branch level by level. But the
image branch sees neither the noisy mask nor the time, so what it computes is shared by all steps
and ensemble members of a mask; it works on patches of pixels, is wider than the mask branch, and
only its lowest level has attention.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from networks.blocks import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    channels_come_last,
    check_denoising_inputs,
    inference_copy,
)

__all__ = ["CompactDermoSegDiff"]

TIME_WIDTH = 16


class GuidanceEncoder(nn.Module):
    """Image features of every level, from high to low resolution.

    Args:
        channels: of the image.
        widths, depths: channels and residual blocks of each level.
        patch_size: side of the squares of pixels that become one position.
        groups: group-norm groups.
        attention: heads, and features a head, at the lowest level.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        patch_size: int,
        groups: int,
        attention: tuple[int, int],
    ) -> None:
        super().__init__()
        self.stem = _stem(channels, widths[0], patch_size)
        self.levels = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width, width, None, groups) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        self.attention = SelfAttention(widths[-1], *attention)
        self.downsample = _downsample(widths)

    def forward(self, g: Tensor) -> list[Tensor]:
        g = self.levels[0](self.stem(g))
        features = [g]
        for down, level in zip(self.downsample, self.levels[1:], strict=True):
            g = level(down(g))
            features.append(g)
        features[-1] = self.attention(g)
        return features


class GuidedDenoiser(nn.Module):
    """Denoises a mask by the features of its image.

    Args:
        channels: of the noisy mask.
        x_widths: channels of each level of the noisy-mask branch, which has one block a level.
        g_widths: channels of the image features, which are those of the decoder too.
        depths: residual blocks of each level of the decoder.
        patch_size, groups: as in `GuidanceEncoder`.
    """

    def __init__(
        self,
        channels: int,
        x_widths: Sequence[int],
        g_widths: Sequence[int],
        depths: Sequence[int],
        patch_size: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.time = TimeEmbedding(TIME_WIDTH)
        time_dim = self.time.out_dim
        self.stem = _stem(channels, x_widths[0], patch_size)
        self.encoder = nn.ModuleList(
            ResidualBlock(width, width, time_dim, groups) for width in x_widths
        )
        self.gates = nn.ModuleList(
            nn.Conv2d(g_width, x_width, 1)
            for g_width, x_width in zip(g_widths, x_widths, strict=True)
        )
        self.downsample = _downsample(x_widths)
        below = [*g_widths[1:], 0]
        self.merge = nn.ModuleList(
            nn.Conv2d(x_width + g_width + lower, g_width, 1)
            for x_width, g_width, lower in zip(x_widths, g_widths, below, strict=True)
        )
        self.decoder = nn.ModuleList(
            nn.ModuleList(ResidualBlock(width, width, time_dim, groups) for _ in range(depth))
            for width, depth in zip(g_widths, depths, strict=True)
        )
        self.head = nn.Sequential(
            nn.Conv2d(g_widths[0], channels * patch_size**2, 3, padding=1),
            nn.PixelShuffle(patch_size),
        )

    def forward(self, x: Tensor, features: Sequence[Tensor], time: Tensor) -> Tensor:
        """Return the denoised mask.

        Args:
            x: noisy mask `(B, channels_x, H, W)`.
            features: of `GuidanceEncoder` for the same images.
            time: integer times `(B,)`.
        """
        embedding = self.time(time)
        if channels_come_last(features[0]):
            # A mask of one channel does not say in which order it is.
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        skips = []
        for level, block in enumerate(self.encoder):
            if level:
                x = self.downsample[level - 1](x)
            x = self.gates[level](features[level]) * block(x, embedding)
            skips.append([x, features[level]])
        z = None
        for skip, merge, blocks in zip(
            reversed(skips), reversed(self.merge), reversed(self.decoder), strict=True
        ):
            if z is not None:
                skip.append(F.interpolate(z, scale_factor=2.0, mode="nearest"))
            z = merge(torch.cat(skip, dim=1))
            for block in blocks:
                z = block(z, embedding)
        return self.head(z)


class CompactDermoSegDiff(nn.Module):
    """Boundary-aware denoising network whose guidance is computed once a mask.

    Args:
        g_widths: channels of each level of the image branch and of the decoder.
        x_widths: channels of each level of the noisy-mask branch.
        g_depths: residual blocks of each level of the image branch.
        z_depths: residual blocks of each level of the decoder.
        patch_size: side in pixels of the squares on which the highest level works.
        resnet_block_groups: group-norm groups, of which every width is a multiple.
        attention_heads, attention_head_dim: of the attention at the lowest level.
        channels_x, channels_g: channels of the noisy mask and of the image.

    Raises:
        UserError: an argument is outside what is said above.
    """

    def __init__(
        self,
        g_widths: Sequence[int],
        x_widths: Sequence[int],
        g_depths: Sequence[int],
        z_depths: Sequence[int],
        patch_size: int = 2,
        resnet_block_groups: int = 4,
        attention_heads: int = 2,
        attention_head_dim: int = 32,
        channels_x: int = 1,
        channels_g: int = 3,
    ) -> None:
        super().__init__()
        numbers = {
            "g_widths": g_widths,
            "x_widths": x_widths,
            "g_depths": g_depths,
            "z_depths": z_depths,
        }
        _check_levels(numbers, resnet_block_groups)
        for key, value in (
            ("patch_size", patch_size),
            ("attention_heads", attention_heads),
            ("attention_head_dim", attention_head_dim),
        ):
            if value < 1:
                raise UserError(f"network.kwargs.{key}={value} must be at least 1.")
        self.channels_x = channels_x
        self.channels_g = channels_g
        self.size_multiple = patch_size * 2 ** (len(g_widths) - 1)
        self.guidance = GuidanceEncoder(
            channels_g,
            g_widths,
            g_depths,
            patch_size,
            resnet_block_groups,
            (attention_heads, attention_head_dim),
        )
        self.denoiser = GuidedDenoiser(
            channels_x, x_widths, g_widths, z_depths, patch_size, resnet_block_groups
        )

    def forward(self, x: Tensor, g: Tensor, time: Tensor) -> Tensor:
        """Predict noise, clean mask or velocity, as trained.

        Args:
            x: noisy mask `(B, channels_x, H, W)`.
            g: image `(B, channels_g, H, W)`, as normalised in training.
            time: integer time step of each sample, `(B,)`, from 0.

        Returns:
            `(B, channels_x, H, W)`, equal to `denoiser(x, guidance(g), time)`.

        Raises:
            UserError: height or width is not a multiple of `size_multiple`, or the two inputs do
                not fit together.
        """
        check_denoising_inputs(self, x, g)
        return self.denoiser(x, self.guidance(g), time)

    def folded(self, num_timesteps: int) -> nn.Module:
        """Return a copy for inference that computes the same with less work.

        As `DermoSegDiff.folded`.
        """
        folded = inference_copy(self)
        times = torch.arange(num_timesteps, device=folded.denoiser.head[0].weight.device)
        embedding = folded.denoiser.time(times)
        for block in [m for m in folded.modules() if isinstance(m, ResidualBlock)]:
            block.fold(embedding)
        folded.denoiser.time = nn.Identity()
        return folded.requires_grad_(False)


def _stem(channels: int, width: int, patch_size: int) -> nn.Module:
    return nn.Sequential(
        nn.PixelUnshuffle(patch_size), nn.Conv2d(channels * patch_size**2, width, 3, padding=1)
    )


def _downsample(widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(Downsample(above, below) for above, below in pairwise(widths))


def _check_levels(numbers: dict[str, Sequence[int]], groups: int) -> None:
    levels = len(numbers["g_widths"])
    if groups < 1:
        raise UserError(f"network.kwargs.resnet_block_groups={groups} must be at least 1.")
    for key, values in numbers.items():
        if len(values) != levels or not values:
            raise UserError(
                f"network.kwargs.{key} has {len(values)} levels and g_widths {levels}; give all "
                "four lists the same number, at least one."
            )
        multiple = groups if "widths" in key else 1
        if any(value < 1 or value % multiple for value in values):
            raise UserError(
                f"network.kwargs.{key}={list(values)} must be whole numbers of at least 1"
                f"{f', multiples of resnet_block_groups={groups}' if multiple > 1 else ''}."
            )
