"""Building blocks of the DermoSegDiff family of denoising networks.

Source: Bozorgpour et al., "DermoSegDiff: A Boundary-aware Segmentation Diffusion Model for Skin
Lesion Delineation", 2023. `B` is the batch, `C` channels, `H` and `W` height and width in pixels.
"""

import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError

WEIGHT_STANDARDISATION_EPS = 1e-5


class WeightStandardisedConv2d(nn.Conv2d):
    """Convolution whose kernel has zero mean and unit variance per output channel.

    `W_o <- (W_o - mean(W_o)) / sqrt(var(W_o) + 1e-5)` over all other axes, biased variance, no
    learned gain. The standardisation is done in float32 also under autocast.
    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", 2019.
    """

    def standardised_weight(self) -> Tensor:
        """Return the kernel that is convolved with, shape `(C_out, C_in, k, k)`, float32."""
        flat = self.weight.float().flatten(1)
        flat = F.layer_norm(flat, flat.shape[1:], eps=WEIGHT_STANDARDISATION_EPS)
        return flat.view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardised_weight().to(x.dtype), self.bias)

    def folded(self) -> nn.Conv2d:
        """Return the plain convolution that computes the same, to the last bit."""
        arguments = (self.in_channels, self.out_channels, self.kernel_size)
        plain = nn.Conv2d(*arguments, padding=self.padding, bias=self.bias is not None)
        state = {**self.state_dict(), "weight": self.standardised_weight()}
        plain.load_state_dict(state)
        return plain.to(self.weight.device)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the integer time step, followed by a two-layer perceptron.

    `e(t) = [sin(t f_0), ..., cos(t f_0), ...]` with `f_j = 10000^(-j / (dim/2 - 1))`, then
    Linear(dim, 4 dim), GELU, Linear(4 dim, 4 dim).

    Args:
        dim: width of the sinusoidal part, even and at least 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.out_dim = 4 * dim
        self.expand = nn.Linear(dim, self.out_dim)
        self.project = nn.Linear(self.out_dim, self.out_dim)

    def sinusoidal(self, time: Tensor) -> Tensor:
        """Return the sinusoidal part, shape `(B, dim)`, float32, all sines first."""
        half = self.dim // 2
        exponent = torch.arange(half, device=time.device, dtype=torch.float32)
        frequencies = torch.exp(exponent * (-math.log(10000) / (half - 1)))
        angles = time[:, None].float() * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    def forward(self, time: Tensor) -> Tensor:
        embedding = self.sinusoidal(time).to(self.expand.weight.dtype)
        return self.project(F.gelu(self.expand(embedding)))


class TimeProjection(nn.Linear):
    """Scale and shift of a block from the time embedding `(B, in_features)`, after a SiLU."""

    def forward(self, time: Tensor) -> Tensor:
        return super().forward(F.silu(time))


class EfficientChannelAttention(nn.Module):
    """Channel gate from a short convolution along the channel axis.

    `h * sigmoid(conv1d_k(mean_HW(h)))`, kernel size `k` the odd number next to
    `|log2(C) + 1| / 2`. Source: Wang et al., "ECA-Net", 2020, equation 12 with gamma 2 and b 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = self.kernel_size(channels)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    @staticmethod
    def kernel_size(channels: int) -> int:
        """Return the odd kernel size for a number of channels."""
        size = int(abs(math.log2(max(channels, 1)) + 1) / 2)
        return size if size % 2 else size + 1

    def forward(self, h: Tensor) -> Tensor:
        gate = self.conv(h.mean(dim=(2, 3))[:, None]).sigmoid()
        return h * gate[:, 0, :, None, None]


class ConvBlock(nn.Module):
    """Weight-standardised 3x3 convolution, group norm, optional scale and shift, SiLU."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.conv = WeightStandardisedConv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(
        self, z: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        h = self.conv(z)
        if not h.requires_grad:
            return self._modulate(h, scale, shift)
        # What follows the convolution is cheap to do again in the backward pass, and keeping its
        # intermediate results would take half of the memory of a training step.
        return checkpoint(
            self._modulate, h, scale, shift, use_reentrant=False, preserve_rng_state=False
        )

    def _modulate(self, h: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        h = self.norm(h)
        if scale is not None:
            h = torch.addcmul(shift, h, scale + 1)
        return F.silu(h)


class ResidualBlock(nn.Module):
    """Two `ConvBlock`s, the first modulated by the time embedding, with a residual path.

    Args:
        in_channels, out_channels: widths; a 1x1 convolution adapts the residual where they differ.
        time_dim: width of the time embedding; none for a block that does not know the time.
        groups: groups of the two group norms.
        channel_attention: gate the result by `EfficientChannelAttention` before the sum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int | None,
        groups: int,
        channel_attention: bool = False,
    ) -> None:
        super().__init__()
        self.time = None if time_dim is None else TimeProjection(time_dim, 2 * out_channels)
        self.block1 = ConvBlock(in_channels, out_channels, groups)
        self.block2 = ConvBlock(out_channels, out_channels, groups)
        self.channel_attention = (
            EfficientChannelAttention(out_channels) if channel_attention else nn.Identity()
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, z: Tensor, time: Tensor | None = None) -> Tensor:
        modulation = ()
        if self.time is not None:
            modulation = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = self.block2(self.block1(z, *modulation))
        return self.channel_attention(h) + self.shortcut(z)

    def fold(self, embedding: Tensor) -> None:
        """Compute once what depends on no image; the block then cannot be trained any more.

        Kernels are standardised, which changes no bit, and the modulation is a table.

        Args:
            embedding: of every time step, `(T, time_dim)`.
        """
        if self.time is not None:
            self.time = nn.Embedding.from_pretrained(self.time(embedding))
        for part in (self.block1, self.block2):
            part.conv = part.conv.folded()


class Attention(nn.Module):
    """What both attentions share: a norm before, queries, keys and values, a residual after.

    Args:
        channels: width of input and output.
        heads, head_dim: number of heads and features a head.
    """

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.norm = nn.GroupNorm(1, channels)
        self.to_qkv = nn.Conv2d(channels, 3 * heads * head_dim, 1, bias=False)
        self.to_out = nn.Conv2d(heads * head_dim, channels, 1)

    def queries_keys_values(self, z: Tensor) -> Tensor:
        """Return the three of them stacked, `(3, B, heads, head_dim, H W)`."""
        qkv = self.to_qkv(self.norm(z))
        return rearrange(qkv, "b (qkv h d) y x -> qkv b h d (y x)", qkv=3, h=self.heads)

    def merge_heads(self, values: Tensor, height: int) -> Tensor:
        """Map `(B, heads, head_dim, H W)` back to `(B, channels, H, W)`."""
        return self.to_out(rearrange(values, "b h d (y x) -> b (h d) y x", y=height))


class LinearAttention(Attention):
    """Attention of linear cost in the number of positions.

    Queries are normalised over the features of a head, keys over the positions.
    Source: Shen et al., "Efficient Attention: Attention with Linear Complexities", 2021.
    """

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__(channels, heads, head_dim)
        self.out_norm = nn.GroupNorm(1, channels)

    def forward(self, z: Tensor) -> Tensor:
        attend = self._rows_of_channels if channels_come_last(z) else self._rows_of_positions
        return self.out_norm(attend(z)) + z

    def _rows_of_positions(self, z: Tensor) -> Tensor:
        query, key, value = self.queries_keys_values(z)
        query = query.softmax(dim=-2) * self.head_dim**-0.5
        context = key.softmax(dim=-1) @ value.transpose(-1, -2)
        return self.merge_heads(context.transpose(-1, -2) @ query, z.shape[-2])

    def _rows_of_channels(self, z: Tensor) -> Tensor:
        """Do the same without copies where the channels of a position lie together in memory.

        Contexts are made for all pairs of heads at once, of which those of a head with itself
        count, and the output's kernel is applied to them before the queries are.
        """
        heads = (self.heads, self.head_dim)
        positions = rearrange(self.norm(z), "b c y x -> b (y x) c")
        for_query, for_key, for_value = self.to_qkv.weight[:, :, 0, 0].chunk(3)
        query = F.linear(positions, for_query).unflatten(-1, heads).softmax(dim=-1).flatten(-2)
        key = (for_key @ positions.transpose(1, 2)).softmax(dim=-1)
        context = (key @ F.linear(positions, for_value)).unflatten(1, heads).unflatten(-1, heads)
        kernel = self.to_out.weight[:, :, 0, 0].unflatten(1, heads) * self.head_dim**-0.5
        context = torch.einsum("b h i h j, c h j -> b h i c", context, kernel).flatten(1, 2)
        out = query @ context + self.to_out.bias
        return rearrange(out, "b (y x) c -> b c y x", y=z.shape[-2])


def channels_come_last(values: Tensor) -> bool:
    """Tell whether the channels of a position lie together in memory."""
    last = values.is_contiguous(memory_format=torch.channels_last)
    return last and not values.is_contiguous()


class SelfAttention(Attention):
    """Full softmax attention over all positions."""

    def forward(self, z: Tensor) -> Tensor:
        query, key, value = self.queries_keys_values(z).transpose(-1, -2)
        out = F.scaled_dot_product_attention(query, key, value).transpose(-1, -2)
        return self.merge_heads(out, z.shape[-2]) + z


class Downsample(nn.Sequential):
    """Halve height and width by space-to-depth and a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.PixelUnshuffle(2), nn.Conv2d(4 * in_channels, out_channels, 1))


class Upsample(nn.Sequential):
    """Double height and width by nearest neighbours and a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )


def inference_copy(network: nn.Module) -> nn.Module:
    """Return a copy of a network that is not trained any more."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def check_denoising_inputs(network: nn.Module, x: Tensor, g: Tensor) -> None:
    """Refuse a noisy mask and an image that a network cannot take.

    Args:
        network: with `size_multiple`, `channels_x` and `channels_g`.
        x, g: noisy mask and image, `(B, C, H, W)`.

    Raises:
        UserError: height or width does not fit, or the two do not fit together.
    """
    check_image_size(g, type(network).__name__, network.size_multiple)
    if x.shape[-2:] != g.shape[-2:] or (x.shape[1], g.shape[1]) != (
        network.channels_x,
        network.channels_g,
    ):
        raise UserError(
            f"The noisy mask {tuple(x.shape)} and image {tuple(g.shape)} must have the same "
            f"size and {network.channels_x} and {network.channels_g} channels."
        )


def check_image_size(image: Tensor, network: str, multiple: int) -> None:
    """Refuse images whose height or width is not a multiple of a number of pixels.

    Args:
        image: `(B, C, H, W)`.
        network: its name, for the message.
        multiple: what both sizes must be a multiple of.

    Raises:
        UserError: with the nearest legal size.
    """
    height, width = image.shape[-2:]
    if height % multiple or width % multiple:
        legal = [max(multiple, round(size / multiple) * multiple) for size in (height, width)]
        raise UserError(
            f"An image of {height}x{width} pixels does not fit {network}: height and width must be "
            f"multiples of {multiple}, such as {legal[0]}x{legal[1]}."
        )
