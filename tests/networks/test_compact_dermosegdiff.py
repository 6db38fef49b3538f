"""CompactDermoSegDiff: its budget, what it shares over steps, sizes and refusals."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import networks
from common.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf" / "network"
TINY = {
    "g_widths": [8, 16],
    "x_widths": [4, 8],
    "g_depths": [1, 2],
    "z_depths": [1, 1],
    "attention_heads": 1,
    "attention_head_dim": 8,
}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return networks.CompactDermoSegDiff(**TINY)


def inputs(count=2, size=(16, 24), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(count, channels, *size, generator=generator) for channels in (1, 3))
    return x, g, torch.randint(0, 250, (count,), generator=generator)


@pytest.mark.parametrize(
    ("preset", "parameters", "gmac", "again"),
    [("s", 1_000_000, 0.7, 0.3), ("m", 8_100_000, 2.8, 0.9)],
)
def test_presets_keep_to_their_budget(preset, parameters, gmac, again):
    spec = yaml.safe_load((CONF / f"compact_dermosegdiff_{preset}.yaml").read_text())
    with torch.device("meta"):
        network = getattr(networks, spec["name"])(**spec["kwargs"])
        x, g = torch.empty(1, 1, 128, 128), torch.empty(1, 3, 128, 128)
        t = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as whole:
            network(x, g, t)
        features = network.guidance(g)
        with FlopCounterMode(display=False) as step:
            network.denoiser(x, features, t)
    assert sum(p.numel() for p in network.parameters()) <= parameters
    assert whole.get_total_flops() / 2e9 <= gmac
    assert step.get_total_flops() / 2e9 <= again


@pytest.mark.parametrize("size", [(4, 4), (16, 24), (36, 8)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_any_legal_size_runs_forward_and_backward(size, patch_size):
    network = networks.CompactDermoSegDiff(**TINY, patch_size=patch_size)
    x, g, t = inputs(3, size)
    output = network(x, g, t)
    output.square().mean().backward()
    assert output.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_channels_are_arguments():
    network = networks.CompactDermoSegDiff(**TINY, channels_x=2, channels_g=4)
    out = network(torch.randn(1, 2, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([1]))
    assert out.shape == (1, 2, 8, 8)


def test_samples_of_a_batch_do_not_mix(network):
    x, g, t = inputs(3)
    together = network(x, g, t)
    for i in range(3):
        alone = network(x[i : i + 1], g[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_image_noisy_mask_and_time_all_matter(network):
    x, g, t = inputs()
    base = network(x, g, t)
    for other in ((x + 1, g, t), (x, g.flip(-1), t), (x, g, (t + 100) % 250)):
        assert (network(*other) - base).abs().max() > 1e-3


def test_gates_let_the_image_silence_the_noisy_mask(network):
    for gate in network.denoiser.gates:
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.zeros_(gate.bias)
    x, g, t = inputs()
    torch.testing.assert_close(network(x, g, t), network(x * 3, g, t))


def test_a_call_is_the_denoiser_on_the_guidance_of_the_image(network):
    x, g, t = inputs()
    features = network.guidance(g)
    for seed in range(2):
        x, _, t = inputs(seed=seed)
        torch.testing.assert_close(network(x, g, t), network.denoiser(x, features, t))


def test_a_folded_network_computes_the_same(network):
    folded = network.folded(250)
    x, g, t = inputs()
    torch.testing.assert_close(folded(x, g, t), network(x, g, t), rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not hasattr(folded.denoiser.time, "expand")
    with pytest.raises(IndexError):
        folded(x, g, torch.full_like(t, 250))


def test_the_order_of_memory_changes_nothing_and_is_kept(network, turned_convolutions):
    x, g, t = inputs()
    expected = network(x, g, t)
    network = network.to(memory_format=torch.channels_last)
    turned = turned_convolutions(network)
    output = network(x, g.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert not turned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_widths": [4]}, "x_widths has 1 levels and g_widths 2"),
        ({"g_depths": [1, 0]}, r"g_depths=\[1, 0\] must be whole numbers of at least 1\."),
        ({"g_widths": [8, 10]}, r"g_widths=\[8, 10\] .* multiples of resnet_block_groups=4"),
        ({"resnet_block_groups": 0}, "resnet_block_groups=0 must be at least 1"),
        ({"attention_heads": 0}, "attention_heads=0 must be at least 1"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
    ],
)
def test_illegal_arguments_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        networks.CompactDermoSegDiff(**{**TINY, **changes})


def test_inputs_that_do_not_fit_are_refused(network):
    with pytest.raises(UserError, match=r"30x32 .* multiples of 4, such as 32x32"):
        network(torch.randn(1, 1, 30, 32), torch.randn(1, 3, 30, 32), torch.tensor([1]))
    with pytest.raises(UserError, match="same size"):
        network(torch.randn(1, 1, 8, 8), torch.randn(1, 3, 8, 16), torch.tensor([1]))
    with pytest.raises(UserError, match="1 and 3 channels"):
        network(torch.randn(1, 2, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([1]))
