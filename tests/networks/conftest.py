"""What every network from an image to logits must do, and what its presets promise."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import networks
from networks.blocks import channels_come_last

CONF = Path(__file__).resolve().parents[2] / "conf" / "network"


@pytest.fixture
def check_network() -> Callable[..., None]:
    """Checks a network from end to end at some sizes.

    `once` are the paths of modules that are called once a forward; `idle` begins the names of the
    parameters that the library leaves without gradient.
    """

    def check(
        build: Callable[[], nn.Module],
        *sizes: tuple[int, int],
        once: Sequence[str] = (),
        idle: tuple[str, ...] = (),
    ) -> None:
        network = build()
        for size in sizes:
            output = network(image=torch.randn(3, 3, *size))
            assert output.shape == (3, 1, *size)
        output.square().mean().backward()
        for key, parameter in network.named_parameters():
            if idle and key.startswith(idle):
                assert parameter.grad is None, key
            else:
                assert parameter.grad is not None, key
                assert parameter.grad.isfinite().all(), key
                assert parameter.grad.any(), key

        network.eval()
        calls = Counter()
        for key in once:

            def count(module, inputs, result, key=key):
                calls[key] += 1

            network.get_submodule(key).register_forward_hook(count)
        image = torch.randn(3, 3, *sizes[0])
        first = network(image)
        assert calls == dict.fromkeys(once, 1)
        assert torch.equal(first, network(image))
        limits = {"rtol": 0, "atol": 1e-4 * first.abs().max().item()}
        torch.testing.assert_close(network(image[1:2])[0], first[1], **limits)

        with torch.device("meta"):
            shape_only = build().eval()(torch.empty(1, 3, *sizes[0]))
        assert shape_only.is_meta
        assert shape_only.shape == (1, 1, *sizes[0])

        batch = {"image": {0: torch.export.Dim("batch")}}
        program = torch.export.export(network, (image[:2],), dynamic_shapes=batch)
        torch.testing.assert_close(program.module()(image), first, **limits)

    return check


@pytest.fixture
def check_preset() -> Callable[[str, int, float], None]:
    """Checks a preset's size, its 10^9 multiply-adds at 128 px, its comment and its tiny self."""

    def check(preset: str, parameters: int, gmac: float) -> None:
        text = (CONF / f"{preset}.yaml").read_text()
        assert f"{parameters:,} parameters, {gmac:.1f} GMAC a call at 128 px." in text
        spec = yaml.safe_load(text)
        cls = getattr(networks, spec["name"])
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network = cls(**spec["kwargs"]).eval()
            network(torch.empty(1, 3, 128, 128))
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=1e-3)
        tiny = cls(**spec["tiny"])
        for size in (16, 32):
            assert tiny(torch.randn(2, 3, size, size)).shape == (2, 1, size, size)

    return check


@pytest.fixture
def torch_home(tmp_path, monkeypatch) -> Path:
    """The folder of torchvision's downloads, empty; nothing can be downloaded to it."""

    def refuse(url, *arguments, **settings):
        raise AssertionError(f"a test downloads {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def turned_convolutions():
    """Returns a list of the convolutions whose output has not its channels last, as they run."""

    def watch(network):
        turned = []
        for key, part in network.named_modules():
            if isinstance(part, torch.nn.Conv2d):

                def look(part, given, output, key=key):
                    if output.shape[1] > 1 and not channels_come_last(output):
                        turned.append(key)

                part.register_forward_hook(look)
        return turned

    return watch
