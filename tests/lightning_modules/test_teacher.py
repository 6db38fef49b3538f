"""What a frozen teacher says."""

import pytest
import torch

from lightning_modules.teacher import FrozenTeacher


class Slanted(torch.nn.Module):
    """Predicts the image's mean channel, darker to the right and further down."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Identity()
        self.asked = 0

    def predict(self, batch):
        self.asked += 1
        grey = batch["image"].mean(1, keepdim=True)
        height, width = grey.shape[-2:]
        slope = torch.linspace(1, 0.2, width) * torch.linspace(1, 0.5, height)[:, None]
        return {"probability": grey * slope}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.rand(2, 3, 6, 6, generator=generator), "id": ["a", "b"]}


def test_over_all_turns_a_teacher_has_no_favourite_direction(batch):
    teacher = FrozenTeacher(Slanted(), turns=True)
    found = teacher.predict(batch)["probability"]
    assert teacher.module.asked == 8
    for turn in (lambda z: z.rot90(1, (-2, -1)), lambda z: z.flip(-1), lambda z: z.flip(-2)):
        turned = teacher.predict({**batch, "image": turn(batch["image"])})["probability"]
        torch.testing.assert_close(turned, turn(found))
    plain = FrozenTeacher(Slanted()).predict(batch)["probability"]
    assert (plain - found).abs().max() > 0.05
    torch.testing.assert_close(found.mean(), plain.mean(), rtol=0.1, atol=0)


def test_several_are_frozen_moved_and_averaged(batch):
    members = [Slanted(), Slanted()]
    members[1].network = torch.nn.Conv2d(1, 1, 1)
    members[1].predict = lambda batch: {"probability": 1 - batch["image"].mean(1, keepdim=True)}
    teacher = FrozenTeacher(*members)
    assert teacher.averages
    assert not FrozenTeacher(Slanted()).averages
    assert not members[1].training
    assert not members[1].network.weight.requires_grad
    expected = sum(member.predict(batch)["probability"] for member in members) / 2
    torch.testing.assert_close(teacher.predict(batch)["probability"], expected)
    teacher.to(torch.device("cpu"), torch.float64)
    assert members[1].network.weight.dtype == torch.float64


def test_what_is_known_is_not_asked_again(batch):
    teacher = FrozenTeacher(Slanted(), turns=True)
    known = torch.full((2, 1, 6, 6), 0.25)
    assert teacher.predict({**batch, "teacher_probability": known})["probability"] is known
    assert teacher.module.asked == 0
