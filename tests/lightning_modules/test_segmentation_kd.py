"""One-pass distillation: what the student is compared with, and a teacher that never moves."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from common.errors import UserError
from lightning_modules import (
    AuxiliaryHeads,
    DiffusionSegmentation,
    Segmentation,
    SegmentationDistillation,
)
from lightning_modules.losses import (
    auxiliary_bce_loss,
    auxiliary_kd_loss,
    bce_loss,
    bernoulli_kl_loss,
    logit_kd_loss,
)
from lightning_modules.processes import DDIM, NoiseSchedule
from lightning_modules.teacher import FrozenTeacher
from networks import UNet

ADAM = {"name": "Adam", "lr": 1e-2}
PATHS = {"deep": "encoder.3", "early": "encoder.0"}
ALL = {
    "bce": {"weight": 1},
    "logit_kd": {"weight": 1},
    "bernoulli_kl": {"weight": 0.5, "temperature": 4.0},
    "auxiliary_kd": {"weight": 0.05},
    "auxiliary_bce": {"weight": 1},
}


def make(student, teacher, losses, **settings):
    return SegmentationDistillation(student, losses, ADAM, teacher=teacher, **settings)


@pytest.fixture
def teacher():
    """A wider network than the student's, with auxiliary heads."""
    network = UNet(base_width=3)
    heads = AuxiliaryHeads(
        network, {"auxiliary_bce": {"weight": 1}}, ADAM, teacher=None, auxiliary=PATHS
    )
    return FrozenTeacher(heads)


def test_every_term_compares_what_it_says(unet, teacher, lesions):
    module = make(unet, teacher, ALL, auxiliary=PATHS)
    batch = lesions()
    values, answer = module.weighted_losses(batch, module.losses)
    theirs = teacher.predict(batch)
    logits, maps = answer["logits"], answer["auxiliary"]
    expected = {
        "bce": bce_loss(logits, batch["mask"]),
        "logit_kd": logit_kd_loss(logits, theirs["logits"]),
        "bernoulli_kl": bernoulli_kl_loss(logits, theirs["logits"], 4.0),
        "auxiliary_kd": auxiliary_kd_loss(maps, theirs["auxiliary"]),
        "auxiliary_bce": auxiliary_bce_loss(maps, batch["mask"]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value.detach())
    total = sum(ALL[name]["weight"] * value for name, value in expected.items())
    torch.testing.assert_close(values["loss"], total)
    values["loss"].backward()
    assert all(p.grad is not None for p in module.trained_parameters())
    assert all(p.grad is None for p in teacher.module.parameters())


def test_one_call_of_each_network_a_step_and_a_teacher_that_does_not_move(
    unet, teacher, lesions, make_trainer, calls
):
    module = make(unet, teacher, ALL, auxiliary=PATHS)
    before = {key: value.clone() for key, value in teacher.module.state_dict().items()}
    assert any("running_var" in key for key in before)
    student_calls, teacher_calls = calls(unet), calls(teacher.network)
    loader = DataLoader([lesions(4)], batch_size=None)
    make_trainer(max_epochs=6, check_val_every_n_epoch=6).fit(module, loader, loader)
    assert len(student_calls) == len(teacher_calls) == 6 + 1
    after = teacher.module.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert not teacher.module.training
    statistics = [v for k, v in unet.state_dict().items() if k.endswith("num_batches_tracked")]
    assert {int(count) for count in statistics} == {6}, "the student's move once a step"


def test_the_teacher_is_outside_of_the_student(unet, teacher):
    module = make(unet, teacher, ALL, auxiliary=PATHS)
    own = {id(p) for p in (*unet.parameters(), *module.auxiliary_heads.parameters())}
    assert {id(p) for p in module.parameters()} == own
    optimizer = module.configure_optimizers()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
    prefixes = {key.split(".")[0] for key in module.state_dict()}
    assert prefixes == {"network", "auxiliary_heads"}
    assert copy.deepcopy(module).teacher is teacher


def test_heads_exist_where_a_term_needs_them(unet, teacher):
    module = make(unet, teacher, {"logit_kd": {"weight": 1}}, auxiliary=PATHS)
    assert len(module.auxiliary_heads) == 0
    assert all(key.startswith("network.") for key in module.state_dict())


@pytest.mark.parametrize("kind", ["turns", "several"])
def test_a_mean_has_no_auxiliary_maps(unet, teacher, lesions, kind):
    module = teacher.module
    mean = FrozenTeacher(*[module] * (1 + (kind == "several")), turns=kind == "turns")
    with pytest.raises(UserError, match="auxiliary_kd needs the auxiliary maps of one teacher"):
        make(unet, mean, ALL, auxiliary=PATHS)
    student, batch = make(unet, mean, {"logit_kd": {"weight": 1}}), lesions()
    values, answer = student.weighted_losses(batch, student.losses)
    expected = logit_kd_loss(answer["logits"], torch.logit(mean.predict(batch)["probability"]))
    torch.testing.assert_close(values["logit_kd"], expected)


def test_a_student_imitates_its_teacher(unet, lesions, make_trainer):
    # The teacher calls the right half lesion, which no mask says.
    class RightHalf(nn.Module):
        def forward(self, image):
            side = torch.linspace(-4, 4, image.shape[-1])
            return side.expand(len(image), 1, *image.shape[-2:])

    teacher = FrozenTeacher(Segmentation(RightHalf(), {"bce": {"weight": 1}}, ADAM))
    module = make(unet, teacher, {"bernoulli_kl": {"weight": 1, "temperature": 2.0}})
    batch = lesions(4)
    make_trainer(max_epochs=150).fit(module, DataLoader([batch], batch_size=None))
    result = module.eval().predict(batch)["probability"]
    expected = teacher.predict(batch)["probability"]
    assert (result - expected).abs().mean() < 0.06


def test_a_diffusion_teacher_teaches_by_its_probability(unet, tiny_network, lesions):
    diffusion = DiffusionSegmentation(
        tiny_network,
        NoiseSchedule(250, 4e-4, 0.08),
        DDIM(2, ensemble=3),
        {"l2": {"weight": 1}},
        ADAM,
        {"num_images": 1, "ensemble": 1, "num_timesteps": 2},
        objective="x0",
    )
    teacher = FrozenTeacher(diffusion)
    module = make(unet, teacher, {"logit_kd": {"weight": 1}})
    batch = lesions()
    chance = teacher.predict(batch)["probability"]
    values, answer = module.weighted_losses(batch, module.losses)
    expected = bce_loss(answer["logits"], chance.clamp(1 / 510, 1 - 1 / 510))
    torch.testing.assert_close(values["loss"], expected)
    known = {**batch, "teacher_probability": torch.full_like(chance, 0.25)}
    values, answer = module.weighted_losses(known, module.losses)
    expected = bce_loss(answer["logits"], known["teacher_probability"])
    torch.testing.assert_close(values["loss"], expected)


def test_a_probability_of_0_or_1_gives_finite_logits(unet, lesions):
    module = make(unet, FrozenTeacher(nn.Identity()), {"bernoulli_kl": {"weight": 1}})
    batch = lesions()
    extra = module.extra_loss_inputs(module.losses, {**batch, "teacher_probability": batch["mask"]})
    assert extra["teacher_logits"].abs().max() < 7


def test_a_student_is_tested_without_the_losses_that_need_its_teacher(
    unet, teacher, lesions, make_trainer
):
    loader = DataLoader([lesions()], batch_size=None)
    module = make(unet, None, ALL, auxiliary=PATHS)
    (scores,) = make_trainer().test(module, loader, verbose=False)
    left = {"test/loss", "test/loss/bce", "test/loss/auxiliary_bce"}
    assert {key for key in scores if "loss" in key} == left
    (scores,) = make_trainer().test(
        make(unet, None, {"logit_kd": {"weight": 1}}), loader, verbose=False
    )
    assert not [key for key in scores if "loss" in key]


def test_a_teacher_without_the_heads_is_refused(unet, teacher):
    plain = FrozenTeacher(Segmentation(UNet(base_width=3), {"bce": {"weight": 1}}, ADAM))
    with pytest.raises(UserError, match="needs a teacher with an auxiliary head deep"):
        make(unet, plain, ALL, auxiliary=PATHS)
    with pytest.raises(UserError, match="needs a teacher with an auxiliary head third"):
        make(unet, teacher, ALL, auxiliary={**PATHS, "third": "encoder.1"})


def test_the_teacher_is_not_asked_when_its_terms_are_off(unet, lesions, calls, teacher):
    seen = calls(teacher.network)
    module = make(unet, teacher, {"bce": {"weight": 1}, "logit_kd": {"weight": 0}})
    module.weighted_losses(lesions(), module.losses)
    assert seen == []
