"""DermoSegDiff and LiteDermoSegDiff: the reference's numbers, sizes, costs and refusals."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import networks
from common.errors import UserError
from networks.blocks import WeightStandardisedConv2d
from networks.reference_weights import _rename

CONF = Path(__file__).resolve().parents[2] / "conf" / "network"
TINY = {"dim_x": 8, "dim_g": 8, "dim_mults": [1, 2], "attention_heads": 1, "attention_head_dim": 8}
GOLDEN_NETWORKS = ["dsd_2level", "dsd_3level", "lite_3level_eca"]


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_output_and_gradients_match_the_reference(golden_network, golden_json, name):
    network, tensors = golden_network(name)
    stored = golden_json(f"net_{name}")
    output = network(tensors["in.x"], tensors["in.g"], tensors["in.t"])
    loss = output.square().mean()
    loss.backward()

    tolerance = 2e-5 * tensors["out.y"].abs().max().item()
    torch.testing.assert_close(output, tensors["out.y"], rtol=0, atol=tolerance)
    torch.testing.assert_close(loss, tensors["out.loss"][0], rtol=1e-5, atol=0)
    assert sum(p.numel() for p in network.parameters()) == stored["n_params"]
    norms = {key: p.grad.norm().item() for key, p in network.named_parameters()}
    largest = max(stored["grad_norms"].values())
    for key, norm in stored["grad_norms"].items():
        assert norms[_rename(key)] == pytest.approx(norm, rel=1e-3, abs=1e-6 * largest), key


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_activations_match_the_reference(golden_network, golden_json, name):
    network, tensors = golden_network(name)
    seen = {}

    def keep(key, pick=None):
        def hook(module, inputs, output):
            seen[key] = output if pick is None else output[pick]

        return hook

    network.x_stem.register_forward_hook(keep("init_conv_x"))
    network.g_stem.register_forward_hook(keep("init_conv_g"))
    network.x_time.register_forward_hook(keep("time_mlp_x"))
    network.g_time.register_forward_hook(keep("time_mlp_g"))
    network.bottleneck.register_forward_hook(keep("bottleneck"))
    network.head_block.register_forward_hook(keep("final_rb"))
    for level, stage in enumerate(network.encoder):
        for index, part in enumerate("xghb"):
            stage.register_forward_hook(keep(f"enc{level}.{part}", index))
        network.x_downsample[level].register_forward_hook(keep(f"enc{level}_xdown"))
        network.g_downsample[level].register_forward_hook(keep(f"enc{level}_gdown"))
    for index, stage in enumerate(network.decoder):
        stage.register_forward_hook(keep(f"dec{index}_up"))
        stage.attention.register_forward_hook(keep(f"dec{index}"))
    with torch.no_grad():
        network(tensors["in.x"], tensors["in.g"], tensors["in.t"])

    stored = golden_json(f"net_{name}")["activation_stats"]
    assert seen.keys() == stored.keys()
    for key, stats in stored.items():
        values = seen[key]
        assert list(values.shape) == stats["shape"], key
        assert values.mean().item() == pytest.approx(stats["mean"], abs=2e-5), key
        assert values.std().item() == pytest.approx(stats["std"], rel=1e-4), key
        assert values.abs().sum().item() == pytest.approx(stats["l1"], rel=1e-4), key


@pytest.mark.parametrize(
    ("preset", "parameters", "gmac"),
    [
        ("dermosegdiff", 81_671_009, 28.05),
        ("dermosegdiff_ham10000", 40_355_937, 39.19),
        ("dermosegdiff_wide", 321_181_377, 104.8),
        ("dermosegdiff_wide_ham10000", 157_749_441, 147.9),
        ("lite_dermosegdiff", 9_346_529, 26.87),
        ("lite_dermosegdiff_ham10000", 8_504_929, 39.23),
    ],
)
def test_published_presets_have_the_published_size_and_cost(preset, parameters, gmac):
    spec = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = getattr(networks, spec["name"])(**spec["kwargs"])
        image = torch.empty(1, 3, 128, 128)
        network(torch.empty(1, 1, 128, 128), image, torch.zeros(1, dtype=torch.int64))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=1e-3)


def test_tiny_student_has_at_most_a_third_of_the_tiny_teacher():
    sizes = {}
    for preset in ("dermosegdiff_tiny", "lite_dermosegdiff_tiny"):
        spec = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
        network = getattr(networks, spec["name"])(**spec["kwargs"])
        sizes[preset] = sum(p.numel() for p in network.parameters())
    assert sizes["lite_dermosegdiff_tiny"] * 3 <= sizes["dermosegdiff_tiny"]


@pytest.mark.parametrize("cls", [networks.DermoSegDiff, networks.LiteDermoSegDiff])
@pytest.mark.parametrize("size", [(2, 2), (16, 24), (30, 8)])
def test_any_legal_size_runs_forward_and_backward(cls, size):
    network = cls(**TINY)
    output = network(torch.randn(3, 1, *size), torch.randn(3, 3, *size), torch.tensor([0, 5, 249]))
    output.square().mean().backward()
    assert output.shape == (3, 1, *size)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_samples_of_a_batch_do_not_mix():
    network = networks.LiteDermoSegDiff(**TINY, use_eca=True).eval()
    x, g, t = torch.randn(3, 1, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([3, 100, 200])
    together = network(x, g, t)
    for i in range(3):
        alone = network(x[i : i + 1], g[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_output_width_and_channels_are_arguments():
    network = networks.DermoSegDiff(**TINY, channels_x=2, channels_g=4, out_dim=5)
    out = network(torch.randn(1, 2, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([1]))
    assert out.shape == (1, 5, 8, 8)


def test_channel_attention_is_only_in_the_light_network():
    with pytest.warns(UserWarning, match="ignores use_eca"):
        teacher = networks.DermoSegDiff(**TINY, use_eca=True)
    student = networks.LiteDermoSegDiff(**TINY, use_eca=True)
    assert not any("channel_attention" in key for key in teacher.state_dict())
    assert sum("channel_attention" in key for key in student.state_dict()) == 4 * 2 + 2 + 2 * 2 + 1


def test_light_network_without_attention_is_the_teacher():
    teacher = networks.DermoSegDiff(**TINY)
    student = networks.LiteDermoSegDiff(**TINY)
    student.load_state_dict(teacher.state_dict())
    x, g, t = torch.randn(1, 1, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([7])
    assert torch.equal(teacher(x, g, t), student(x, g, t))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_dim": 16}, "init_dim=16 must equal dim_x=8 and dim_g=8"),
        ({"dim_x": 2}, "dim_x=2 must be even and at least 4"),
        ({"dim_g": 9}, "dim_g=9 must be even"),
        ({"dim_x_mults": [1, 2, 4]}, "dim_x_mults has 3 levels and dim_g_mults 2"),
        ({"resnet_block_groups": 3}, "not a multiple of resnet_block_groups=3"),
        ({"resnet_block_groups": 0}, "resnet_block_groups=0"),
        ({"attention_heads": 0}, "attention_heads=0"),
        ({"dim_x": 6, "resnet_block_groups": 2, "dim_mults": [1, 1]}, "multiple of 4"),
    ],
)
def test_illegal_arguments_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        networks.DermoSegDiff(**{**TINY, **changes})


def test_separable_convolution_is_refused():
    networks.LiteDermoSegDiff(**TINY, use_separable_conv=False)
    with pytest.raises(UserError, match="use_separable_conv"):
        networks.LiteDermoSegDiff(**TINY, use_separable_conv=True)


def test_illegal_size_names_the_legal_ones():
    network = networks.DermoSegDiff(**{**TINY, "dim_mults": [1, 1, 1]})
    with pytest.raises(UserError, match=r"30x32 .* multiples of 4, such as 32x32"):
        network(torch.randn(1, 1, 30, 32), torch.randn(1, 3, 30, 32), torch.tensor([1]))


def test_inputs_that_do_not_fit_together_are_refused():
    network = networks.DermoSegDiff(**TINY)
    with pytest.raises(UserError, match="same size"):
        network(torch.randn(1, 1, 8, 8), torch.randn(1, 3, 8, 16), torch.tensor([1]))
    with pytest.raises(UserError, match="1 and 3 channels"):
        network(torch.randn(1, 2, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([1]))


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_a_folded_network_matches_the_reference_too(golden_network, name):
    network, tensors = golden_network(name)
    folded = network.folded(250)
    with torch.no_grad():
        output = folded(tensors["in.x"], tensors["in.g"], tensors["in.t"])
    tolerance = 2e-5 * tensors["out.y"].abs().max().item()
    torch.testing.assert_close(output, tensors["out.y"], rtol=0, atol=tolerance)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert any(parameter.requires_grad for parameter in network.parameters())
    kernels = {key: value for key, value in folded.state_dict().items() if value.ndim == 4}
    for key, module in network.named_modules():
        if isinstance(module, WeightStandardisedConv2d):
            assert torch.equal(kernels[f"{key}.weight"], module.standardised_weight()), key
    with pytest.raises(IndexError):
        folded(tensors["in.x"], tensors["in.g"], torch.full_like(tensors["in.t"], 250))


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_the_order_of_memory_changes_nothing_and_is_kept(golden_network, turned_convolutions, name):
    network, tensors = golden_network(name)
    network = network.to(memory_format=torch.channels_last)
    inputs = [tensors[f"in.{key}"].contiguous(memory_format=torch.channels_last) for key in "xg"]
    turned = turned_convolutions(network)
    output = network(*inputs, tensors["in.t"])
    tolerance = 2e-5 * tensors["out.y"].abs().max().item()
    torch.testing.assert_close(output, tensors["out.y"], rtol=0, atol=tolerance)
    output.square().mean().backward()
    assert turned in ([], ["x_stem"])
    plain, _ = golden_network(name)
    plain(tensors["in.x"], tensors["in.g"], tensors["in.t"]).square().mean().backward()
    for (key, one), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=key)
