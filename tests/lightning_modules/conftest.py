"""What the tests of the one-pass methods share."""

import pytest
import torch

from networks import UNet


@pytest.fixture
def unet() -> UNet:
    """A network of one pass that costs next to nothing."""
    return UNet(base_width=2)


@pytest.fixture
def lesions():
    """Makes a batch of photographs whose lesions are bright."""

    def make(count: int = 2, size: int = 32) -> dict:
        mask = torch.zeros(count, 1, size, size)
        mask[:, :, size // 4 : size // 2, size // 4 : size // 2 + 4] = 1
        image = torch.rand(count, 3, size, size) * 0.3 + 0.5 * mask
        return {"image": image, "mask": mask, "id": [f"i{index}" for index in range(count)]}

    return make


@pytest.fixture
def calls():
    """Counts how often a module is called."""

    def count(module: torch.nn.Module) -> list:
        seen: list = []
        module.register_forward_hook(lambda *_: seen.append(1))
        return seen

    return count
