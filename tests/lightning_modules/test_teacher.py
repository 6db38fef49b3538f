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


def test_what_is_known_is_not_asked_again(batch):
    teacher = FrozenTeacher(Slanted(), turns=True)
    known = torch.full((2, 1, 6, 6), 0.25)
    assert teacher.predict({**batch, "teacher_probability": known})["probability"] is known
    assert teacher.module.asked == 0
