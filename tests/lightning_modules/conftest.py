"""What the tests of the one-pass methods share."""

import pytest
import torch
from torch import nn

from networks import UNet


class SmallClassifier(nn.Module):
    """Two convolutions with BatchNorm, pooled; three classes."""

    num_classes = 3

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(2 * width, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(image))


@pytest.fixture
def unet() -> UNet:
    """A network of one pass that costs next to nothing."""
    return UNet(base_width=2)


@pytest.fixture
def small_classifier() -> SmallClassifier:
    """A classifier that costs next to nothing."""
    return SmallClassifier(6)


@pytest.fixture
def wider_classifier() -> SmallClassifier:
    """Another of other feature sizes, for a teacher."""
    return SmallClassifier(10)


@pytest.fixture
def photographs():
    """Makes a batch of photographs of three classes that differ in their colour."""

    def make(count: int = 6, size: int = 16) -> dict:
        label = torch.arange(count) % 3
        image = torch.rand(count, 3, size, size) + torch.eye(3)[label][:, :, None, None]
        views = torch.stack([image.rot90(turn, (2, 3)) for turn in range(4)], dim=1)
        ids = [f"i{index}" for index in range(count)]
        return {"image": image, "views": views, "label": label, "id": ids}

    return make


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
