"""DermoSegDiff and its light student, one implementation.

A noisy-mask branch `x` and an image (guidance) branch `g` run side by side through the encoder; at
every level the image branch sees the noisy branch and gates it by multiplication. The decoder
continues the mask branch alone.
Sources: Bozorgpour et al., "DermoSegDiff", 2023, figure 2; the EFKD repository for the light
variant with efficient channel attention.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from networks.blocks import (
    Downsample,
    LinearAttention,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
    channels_come_last,
    check_denoising_inputs,
    inference_copy,
)

__all__ = ["DermoSegDiff", "LiteDermoSegDiff"]

BOTTLENECK_GROUPS = 4
HEAD_GROUPS = 1


class EncoderStage(nn.Module):
    """One level of the two-branch encoder.

    Returns the two branches before downsampling and the two skip tensors, each `x` width plus `g`
    width wide.
    """

    def __init__(
        self,
        x_width: int,
        g_width: int,
        time_dims: tuple[int, int],
        groups: int,
        channel_attention: bool,
        attention: tuple[int, int],
    ) -> None:
        super().__init__()
        both = x_width + g_width
        x_time, g_time = time_dims
        self.x_block1 = ResidualBlock(x_width, x_width, x_time, groups, channel_attention)
        self.g_block1 = ResidualBlock(g_width, g_width, g_time, groups, channel_attention)
        self.g_block2 = ResidualBlock(both, g_width, g_time, groups, channel_attention)
        self.gate = nn.Conv2d(g_width, x_width, 1)
        self.x_block2 = ResidualBlock(x_width, x_width, x_time, groups, channel_attention)
        self.x_attention = LinearAttention(x_width, *attention)
        self.g_attention = LinearAttention(both, *attention)

    def forward(
        self, x: Tensor, g: Tensor, x_time: Tensor, g_time: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.x_block1(x, x_time)
        early_skip = torch.cat((x, self.g_block1(g, g_time)), dim=1)
        g = self.g_block2(early_skip, g_time)
        x = self.x_attention(self.x_block2(self.gate(g) * x, x_time))
        late_skip = torch.cat((x, g), dim=1)
        return x, self.g_attention(late_skip), early_skip, late_skip


class Bottleneck(nn.Module):
    """Fuses the two branches at the lowest resolution by full and by linear attention."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        time_dim: int,
        channel_attention: bool,
        attention: tuple[int, int],
    ) -> None:
        super().__init__()
        groups = BOTTLENECK_GROUPS
        self.block1 = ResidualBlock(in_channels, channels, time_dim, groups, channel_attention)
        self.self_attention = SelfAttention(channels, *attention)
        self.linear_attention = LinearAttention(channels, *attention)
        self.block2 = ResidualBlock(2 * channels, channels, time_dim, groups, channel_attention)

    def forward(self, z: Tensor, time: Tensor) -> Tensor:
        z = self.block1(z, time)
        attended = self.self_attention(z) + self.linear_attention(z)
        return self.block2(torch.cat((z, attended), dim=1), time)


class DecoderStage(nn.Module):
    """One level of the decoder: both skips, linear attention, then upsampling."""

    def __init__(
        self,
        channels: int,
        skip_channels: int,
        out_channels: int,
        time_dim: int,
        groups: int,
        channel_attention: bool,
        attention: tuple[int, int],
        last: bool,
    ) -> None:
        super().__init__()
        wide = channels + skip_channels
        self.block1 = ResidualBlock(wide, channels, time_dim, groups, channel_attention)
        self.block2 = ResidualBlock(wide, channels, time_dim, groups, channel_attention)
        self.attention = LinearAttention(channels, *attention)
        self.upsample = (
            nn.Conv2d(channels, out_channels, 3, padding=1)
            if last
            else Upsample(channels, out_channels)
        )

    def forward(self, z: Tensor, early_skip: Tensor, late_skip: Tensor, time: Tensor) -> Tensor:
        z = self.block1(torch.cat((z, late_skip), dim=1), time)
        z = self.block2(torch.cat((z, early_skip), dim=1), time)
        return self.upsample(self.attention(z))


class DermoSegDiff(nn.Module):
    """Boundary-aware diffusion segmentation network.

    Args:
        dim_x: base width of the noisy-mask branch, even and at least 4.
        dim_g: base width of the image branch, even and at least 4.
        channels_x: channels of the noisy mask.
        channels_g: channels of the image.
        init_dim: only `None` or the value of both base widths; the head's width is fixed by `dim_x`
            and `dim_g`.
        out_dim: channels of the output, `channels_x` by default.
        dim_mults: width multipliers, one a level, for both branches.
        dim_x_mults, dim_g_mults: multipliers of one branch, `dim_mults` by default.
        resnet_block_groups: group-norm groups in encoder and decoder; the bottleneck always uses 4
            and the last block 1, as published.
        use_eca: accepted for configurations of the reference, which ignores it in this class.
        attention_heads, attention_head_dim: heads and features a head in every attention. The
            published 4 x 32 dominates the cost of small networks.

    Raises:
        UserError: an argument is outside what is said above, or a width is not a multiple of the
            number of groups.
    """

    channel_attention_allowed = False

    def __init__(
        self,
        dim_x: int,
        dim_g: int,
        channels_x: int = 1,
        channels_g: int = 3,
        init_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        dim_x_mults: Sequence[int] | None = None,
        dim_g_mults: Sequence[int] | None = None,
        resnet_block_groups: int = 4,
        use_eca: bool = False,
        attention_heads: int = 4,
        attention_head_dim: int = 32,
    ) -> None:
        super().__init__()
        x_mults = list(dim_x_mults or dim_mults)
        g_mults = list(dim_g_mults or dim_mults)
        groups = resnet_block_groups
        x_widths = [dim_x, *(dim_x * m for m in x_mults)]
        g_widths = [dim_g, *(dim_g * m for m in g_mults)]
        _check_arguments(x_widths, g_widths, init_dim, groups, attention_heads, attention_head_dim)
        if use_eca and not self.channel_attention_allowed:
            warnings.warn(
                f"{type(self).__name__} ignores use_eca=True, as published; "
                "LiteDermoSegDiff has channel attention.",
                stacklevel=2,
            )
        eca = use_eca and self.channel_attention_allowed
        attention = (attention_heads, attention_head_dim)
        levels = len(x_mults)

        self.channels_x = channels_x
        self.channels_g = channels_g
        self.size_multiple = 2 ** (levels - 1)
        self.x_stem = nn.Conv2d(channels_x, dim_x, 1)
        self.g_stem = nn.Conv2d(channels_g, dim_g, 1)
        self.x_time = TimeEmbedding(dim_x)
        self.g_time = TimeEmbedding(dim_g)
        x_time, g_time = self.x_time.out_dim, self.g_time.out_dim

        self.encoder = nn.ModuleList()
        self.x_downsample = nn.ModuleList()
        self.g_downsample = nn.ModuleList()
        for level in range(levels):
            x_in, g_in = x_widths[level], g_widths[level]
            x_out, g_out = x_widths[level + 1], g_widths[level + 1]
            last = level == levels - 1
            self.encoder.append(EncoderStage(x_in, g_in, (x_time, g_time), groups, eca, attention))
            self.x_downsample.append(_transition(x_in, x_out, last))
            self.g_downsample.append(_transition(x_in + g_in, g_out, last))

        self.bottleneck = Bottleneck(
            x_widths[-1] + g_widths[-1], x_widths[-1], x_time, eca, attention
        )
        self.decoder = nn.ModuleList(
            DecoderStage(
                x_widths[level + 1],
                x_widths[level] + g_widths[level],
                x_widths[level],
                x_time,
                groups,
                eca,
                attention,
                last=level == 0,
            )
            for level in reversed(range(levels))
        )
        self.head_block = ResidualBlock(2 * dim_x + dim_g, dim_x, x_time, HEAD_GROUPS, eca)
        self.head = nn.Conv2d(dim_x, out_dim or channels_x, 1)

    def forward(self, x: Tensor, g: Tensor, time: Tensor) -> Tensor:
        """Predict noise, clean mask or velocity, as trained.

        Args:
            x: noisy mask `(B, channels_x, H, W)`.
            g: image `(B, channels_g, H, W)`, as normalised in training.
            time: integer time step of each sample, `(B,)`, from 0.

        Returns:
            `(B, out_dim, H, W)`.

        Raises:
            UserError: height or width is not a multiple of `size_multiple`, or the two inputs do
                not fit together.
        """
        check_denoising_inputs(self, x, g)
        x_time, g_time = self.x_time(time), self.g_time(time)
        g = g_stem = self.g_stem(g)
        x = self.x_stem(x)
        if channels_come_last(g):
            # A mask of one channel does not say in which order it is.
            x = x.contiguous(memory_format=torch.channels_last)
        x_stem = x
        skips = []
        for stage, x_down, g_down in zip(
            self.encoder, self.x_downsample, self.g_downsample, strict=True
        ):
            x, g, *stage_skips = stage(x, g, x_time, g_time)
            skips.append(stage_skips)
            x, g = x_down(x), g_down(g)
        z = self.bottleneck(torch.cat((x, g), dim=1), x_time)
        for stage in self.decoder:
            z = stage(z, *skips.pop(), x_time)
        return self.head(self.head_block(torch.cat((z, x_stem, g_stem), dim=1), x_time))

    def folded(self, num_timesteps: int) -> nn.Module:
        """Return a copy for inference that computes the same with less work.

        Kernels are standardised once, which changes no bit, and the projections of every time step
        are tables. The copy cannot be trained, and times must be below `num_timesteps`.
        """
        folded = inference_copy(self)
        times = torch.arange(num_timesteps, device=folded.head.weight.device)
        x_embedding, g_embedding = folded.x_time(times), folded.g_time(times)
        image_blocks = {
            block for stage in folded.encoder for block in (stage.g_block1, stage.g_block2)
        }
        for block in [m for m in folded.modules() if isinstance(m, ResidualBlock)]:
            block.fold(g_embedding if block in image_blocks else x_embedding)
        folded.x_time = folded.g_time = nn.Identity()
        return folded.requires_grad_(False)


class LiteDermoSegDiff(DermoSegDiff):
    """The student of EFKD: the same graph with fewer levels and optional channel attention.

    Args:
        arguments, settings: those of `DermoSegDiff`; `use_eca` acts here.
        dim_mults: three levels by default.
        use_separable_conv: dead in the reference; only `False` is accepted.

    Raises:
        UserError: as `DermoSegDiff`, or `use_separable_conv` is true.
    """

    channel_attention_allowed = True

    def __init__(
        self,
        *arguments: Any,
        dim_mults: Sequence[int] = (1, 2, 4),
        use_separable_conv: bool = False,
        **settings: Any,
    ) -> None:
        if use_separable_conv:
            raise UserError(
                "use_separable_conv=true has no effect in the published code and is not "
                "implemented; set it to false."
            )
        super().__init__(*arguments, dim_mults=dim_mults, **settings)


def _transition(in_channels: int, out_channels: int, last: bool) -> nn.Module:
    """Downsample between levels; keep the resolution after the last one."""
    if last:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return Downsample(in_channels, out_channels)


def _check_arguments(
    x_widths: list[int],
    g_widths: list[int],
    init_dim: int | None,
    groups: int,
    attention_heads: int,
    attention_head_dim: int,
) -> None:
    dim_x, dim_g = x_widths[0], g_widths[0]
    if len(x_widths) != len(g_widths) or len(x_widths) < 2:
        raise UserError(
            f"dim_x_mults has {len(x_widths) - 1} levels and dim_g_mults {len(g_widths) - 1}; "
            "give both the same number, at least one."
        )
    for key, dim in (("dim_x", dim_x), ("dim_g", dim_g)):
        if dim < 4 or dim % 2:
            raise UserError(f"{key}={dim} must be even and at least 4, such as 8, 32 or 64.")
    if init_dim is not None and (init_dim, init_dim) != (dim_x, dim_g):
        raise UserError(
            f"init_dim={init_dim} must equal dim_x={dim_x} and dim_g={dim_g}, because the last "
            "block's width is fixed by them; leave it null."
        )
    for key, value in (
        ("resnet_block_groups", groups),
        ("attention_heads", attention_heads),
        ("attention_head_dim", attention_head_dim),
    ):
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1.")
    for branch, widths in (("x", x_widths), ("g", g_widths)):
        for level, width in enumerate(widths):
            # The image branch's last width only enters the bottleneck, which has no norm on it.
            normalised = branch == "x" or level < len(widths) - 1
            if width < 1 or (normalised and width % groups):
                raise UserError(
                    f"dim_{branch} and dim_{branch}_mults give width {width} at level {level}, "
                    f"which is not a multiple of resnet_block_groups={groups}; "
                    f"choose widths that are, such as {max(groups, width // groups * groups)}."
                )
    if x_widths[-1] % BOTTLENECK_GROUPS:
        raise UserError(
            f"dim_x and dim_x_mults give width {x_widths[-1]} in the bottleneck, which must be a "
            f"multiple of {BOTTLENECK_GROUPS}."
        )
