"""Building blocks against the reference's numbers and their definitions."""

import pytest
import torch

from networks.blocks import (
    ConvBlock,
    EfficientChannelAttention,
    LinearAttention,
    SelfAttention,
    TimeEmbedding,
    WeightStandardisedConv2d,
)


@pytest.mark.parametrize("dim", [16, 64])
def test_time_embedding_matches_the_reference(golden, dim):
    values = golden("time_embedding")
    embedding = TimeEmbedding(dim).sinusoidal(values["t"])
    torch.testing.assert_close(embedding, values[f"dim{dim}"], rtol=0, atol=2e-6)


def test_channel_attention_kernel_sizes_match_the_reference(golden_json):
    for channels, size in golden_json("eca_kernel_sizes").items():
        assert EfficientChannelAttention.kernel_size(int(channels)) == size


def test_channel_attention_gates_every_channel_by_one_number():
    attention = EfficientChannelAttention(16)
    h = torch.randn(2, 16, 4, 4)
    ratio = attention(h) / h
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    assert ratio.min() > 0
    assert ratio.max() < 1


def test_standardised_kernel_has_zero_mean_and_unit_variance():
    conv = WeightStandardisedConv2d(6, 5, 3, padding=1)
    weight = conv.standardised_weight().flatten(1)
    torch.testing.assert_close(weight.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
    expected = conv.weight.flatten(1).var(1, unbiased=False)
    torch.testing.assert_close(weight.var(1, unbiased=False), expected / (expected + 1e-5))


def test_a_folded_convolution_gives_the_same_bits():
    conv = WeightStandardisedConv2d(6, 8, 3, padding=1)
    torch.nn.init.normal_(conv.weight, 0.3, 2.0)
    plain, x = conv.folded(), torch.randn(2, 6, 9, 7)
    assert type(plain) is torch.nn.Conv2d
    assert torch.equal(plain(x), conv(x))


def test_standardised_kernel_stays_float32_under_autocast():
    conv = WeightStandardisedConv2d(6, 5, 3, padding=1)
    outside = conv.standardised_weight()
    with torch.autocast("cpu", torch.bfloat16):
        inside = conv.standardised_weight()
        out = conv(torch.randn(1, 6, 8, 8))
    assert torch.equal(inside, outside)
    assert out.dtype == torch.bfloat16


def test_scale_and_shift_act_between_norm_and_activation():
    block = ConvBlock(4, 8, groups=4)
    z = torch.randn(2, 4, 6, 6)
    normed = block.norm(block.conv(z))
    scale, shift = torch.randn(2, 8, 1, 1), torch.randn(2, 8, 1, 1)
    expected = torch.nn.functional.silu(normed * (1 + scale) + shift)
    torch.testing.assert_close(block(z, scale, shift), expected)
    torch.testing.assert_close(block(z), torch.nn.functional.silu(normed))


def test_self_attention_equals_its_definition():
    attention = SelfAttention(8, heads=2, head_dim=4)
    z = torch.randn(2, 8, 3, 5)
    q, k, v = attention.to_qkv(attention.norm(z)).view(2, 3, 2, 4, 15).unbind(1)
    weights = (torch.einsum("bhdi,bhdj->bhij", q, k) * 4**-0.5).softmax(-1)
    out = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(2, 8, 3, 5)
    torch.testing.assert_close(attention(z), attention.to_out(out) + z)


def test_linear_attention_equals_its_definition():
    attention = LinearAttention(8, heads=2, head_dim=4)
    z = torch.randn(2, 8, 3, 5)
    q, k, v = attention.to_qkv(attention.norm(z)).view(2, 3, 2, 4, 15).unbind(1)
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
    out = torch.einsum("bhde,bhdn->bhen", context, q.softmax(-2) * 4**-0.5).reshape(2, 8, 3, 5)
    torch.testing.assert_close(attention(z), attention.out_norm(attention.to_out(out)) + z)
