"""A network for inference computes what it did, faster."""

import pytest
import torch

from lightning_modules import DiffusionSegmentation
from lightning_modules.processes import DDIM, NoiseSchedule
from networks import CompactDermoSegDiff
from networks.blocks import WeightStandardisedConv2d
from tasks.inference import accelerate

SETTINGS = {"fold": True, "channels_last": False, "compile": False}


@pytest.fixture
def module(tiny_network):
    """A module of 20 time steps."""
    return DiffusionSegmentation(
        tiny_network,
        NoiseSchedule(num_timesteps=20),
        DDIM(2, ensemble=2),
        losses={"l2": {"weight": 1}},
        optimizer={"name": "Adam", "lr": 1e-3},
        validation={"num_images": 1, "ensemble": 1, "num_timesteps": 4},
    )


@pytest.mark.parametrize("changes", [{}, {"fold": False}, {"channels_last": True}])
def test_the_masks_stay_the_same(module, changes):
    batch = {"image": torch.rand(2, 3, 16, 16), "id": ["a", "b"]}
    before = module.predict(batch)
    accelerate(module, SETTINGS | changes)
    after = module.predict(batch)
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, atol=2e-5, rtol=0)
    assert not module.network.training
    folded = not any(isinstance(m, WeightStandardisedConv2d) for m in module.network.modules())
    assert folded == (changes.get("fold") is not False)
    kernel = next(p for p in module.network.parameters() if p.ndim == 4 and p.shape[-1] == 3)
    last = kernel.is_contiguous(memory_format=torch.channels_last)
    assert last == bool(changes.get("channels_last"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_never_nan(module, dtype):
    batch = {"image": torch.rand(2, 3, 16, 16), "id": ["a", "b"]}
    expected = module.predict(batch)["probability"]
    accelerate(module, SETTINGS)
    module.network.to(dtype)
    for image in (batch["image"], torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)):
        found = module.predict({"image": image.to(dtype), "id": ["a", "b"]})
        assert all(values.dtype == torch.float32 for values in found.values())
        assert all(values.isfinite().all() for values in found.values())
    near = module.predict({**batch, "image": batch["image"].to(dtype)})["probability"]
    assert (near - expected).abs().mean() < 0.05


def test_what_is_sampled_by_its_parts_is_compiled_by_its_parts(module, monkeypatch):
    # The parts' inputs are recorded in place of a compiler that takes a minute.
    ran = []

    def compile(part):
        part._compiled_call_impl = lambda *inputs: (ran.append(part), part._call_impl(*inputs))[1]

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    network = CompactDermoSegDiff([8, 8], [4, 4], [1, 1], [1, 1], attention_head_dim=8)
    module.network = network
    batch = {"image": torch.rand(2, 3, 16, 16), "id": ["a", "b"]}
    before = module.predict(batch)["probability"]
    accelerate(module, SETTINGS | {"compile": True})
    after = module.predict(batch)["probability"]
    torch.testing.assert_close(after, before, atol=2e-5, rtol=0)
    # Two members of two steps.
    parts = module.network
    assert ran == [parts.guidance] + [parts.denoiser] * 4
