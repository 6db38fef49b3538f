"""Distillation: the reference's combined losses, and a teacher that is only ever asked."""

import copy
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from datamodules import edge_distance
from lightning_modules import EdgeFocusedDistillation
from lightning_modules.losses import edge_closeness, efkd_loss
from lightning_modules.processes import DDIM, NoiseSchedule, output_from_x0, predict_x0, snr
from lightning_modules.teacher import FrozenTeacher
from networks import DermoSegDiff


class Denoiser(torch.nn.Module):
    """As much of a diffusion module as a teacher needs."""

    def __init__(self, network, objective):
        super().__init__()
        self.network = network
        self.objective = objective

    def predict(self, batch):
        return {"probability": batch["image"].mean(1, keepdim=True)}


def frozen(network, objective):
    return FrozenTeacher(Denoiser(network, objective))


VALIDATION = {"num_images": 1, "ensemble": 1, "num_timesteps": 4}
EFKD_ISIC = {"weight": 0.25, "edge_weight": 5.0, "body_weight": 2.0, "edge_threshold": 0.3}


def make_module(student, teacher, losses, **settings):
    return EdgeFocusedDistillation(
        student,
        NoiseSchedule(250, 4e-4, 0.08),
        DDIM(2),
        losses,
        {"name": "Adam", "lr": 1e-3},
        VALIDATION,
        teacher=teacher,
        **settings,
    )


def golden_batch(values):
    mask = (values["x"] + 1) / 2
    return {
        "image": values["g"],
        "mask": mask,
        "edge_distance": torch.stack([edge_distance(m) for m in mask]),
    }


CASES = {
    "lite_isic": {
        "l2": {"weight": 1},
        "efkd": EFKD_ISIC,
        "boundary": {"weight": 0.25, "gamma": 0.2},
    },
    "lite_ham": {
        "l2": {"weight": 1},
        "efkd": {**EFKD_ISIC, "edge_threshold": 0.6},
        "boundary": {"weight": 0.2, "gamma": 0.2},
    },
    "misspelt_key": {"l2": {"weight": 0.5}, "boundary": {"weight": 0.25, "gamma": 0.2}},
    "both_keys_coefficient_wins": {
        "l2": {"weight": 0.5},
        "boundary": {"weight": 0.25, "gamma": 0.2},
    },
    "no_coefficient_defaults_to_1": {
        "l2": {"weight": 1},
        "boundary": {"weight": 1, "gamma": 0.2},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_combined_losses_match_the_reference(golden, golden_json, golden_network, case):
    student, _ = golden_network("lite_3level_eca")
    teacher, _ = golden_network("dsd_2level")
    stored = golden_json("p_losses")["kd"][case]
    values = golden("p_losses")
    module = make_module(student, frozen(teacher, "noise"), CASES[case])
    total, terms = module.diffusion_losses(golden_batch(values), values["t"], values["noise"])
    total.backward()

    assert total.item() == pytest.approx(stored["total"], rel=2e-6)
    for ours, theirs in (("l2", "l2"), ("boundary", "boundary"), ("efkd", "edge_focused_kd")):
        if theirs in stored["parts"]:
            assert terms[ours].item() == pytest.approx(stored["parts"][theirs], rel=2e-6)
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    assert norm.item() == pytest.approx(stored["grad_norm"], rel=1e-5)


def test_a_single_distillation_term_keeps_its_weight(golden, golden_json, golden_network):
    student, _ = golden_network("lite_3level_eca")
    teacher, _ = golden_network("dsd_2level")
    stored = golden_json("p_losses")["kd"]["single_efkd_coefficient_ignored"]
    values = golden("p_losses")
    module = make_module(student, frozen(teacher, "noise"), {"efkd": EFKD_ISIC})
    total, _ = module.diffusion_losses(golden_batch(values), values["t"], values["noise"])
    assert total.item() == pytest.approx(0.25 * stored["total"], rel=2e-6)


def test_golden_outputs_and_forward_process(golden, golden_network):
    values = golden("p_losses")
    schedule = NoiseSchedule(250, 4e-4, 0.08)
    x_t = schedule.q_sample(values["x"], values["t"], values["noise"])
    torch.testing.assert_close(x_t, values["xt"], rtol=0, atol=3e-6)
    teacher, _ = golden_network("dsd_2level")
    answer = frozen(teacher, "noise").denoise(x_t, values["g"], values["t"])
    torch.testing.assert_close(answer, values["teacher_pred"], rtol=0, atol=1e-5)


def test_teacher_is_frozen_and_outside_of_the_student(tiny_network):
    network = copy.deepcopy(tiny_network)
    teacher = frozen(network, "noise")
    module = make_module(tiny_network, teacher, {"efkd": EFKD_ISIC})
    assert not any(p.requires_grad for p in network.parameters())
    module.train()
    assert not network.training
    own = {id(p) for p in tiny_network.parameters()}
    assert {id(p) for p in module.parameters()} == own
    optimizer = module.configure_optimizers()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
    assert all(key.startswith("network.") for key in module.state_dict())
    assert copy.deepcopy(module).teacher is teacher


def test_teacher_is_not_asked_when_its_term_is_off(tiny_network):
    def refuse(*arguments):
        raise AssertionError("the teacher was asked")

    teacher = frozen(copy.deepcopy(tiny_network), "noise")
    teacher.network.forward = refuse
    mask = torch.zeros(1, 1, 8, 8)
    batch = {"image": torch.rand(1, 3, 8, 8), "mask": mask, "edge_distance": mask}
    arguments = (batch, torch.tensor([9]), torch.randn(mask.shape))
    losses = {"l2": {"weight": 1}, "efkd": {**EFKD_ISIC, "weight": 0}}
    make_module(tiny_network, teacher, losses).diffusion_losses(*arguments)
    with pytest.raises(AssertionError, match="was asked"):
        make_module(tiny_network, teacher, {"efkd": EFKD_ISIC}).diffusion_losses(*arguments)


@pytest.mark.parametrize(("theirs", "ours"), [("noise", "x0"), ("x0", "noise"), ("v", "x0")])
@pytest.mark.parametrize("weighting", [True, False])
def test_other_objectives_are_compared_in_the_students_space(tiny_network, theirs, ours, weighting):
    teacher = frozen(copy.deepcopy(tiny_network), theirs)
    losses = {"efkd": {"weight": 1, "edge_weight": 5.0}}
    module = make_module(tiny_network, teacher, losses, objective=ours, snr_weighting=weighting)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 4:10, 4:10] = 1
    distance = torch.stack([edge_distance(m) for m in mask])
    batch = {"image": torch.rand(2, 3, 16, 16), "mask": mask, "edge_distance": distance}
    t, noise = torch.tensor([5, 249]), torch.randn(mask.shape)
    total, _ = module.diffusion_losses(batch, t, noise)

    schedule = module.schedule
    x_t = schedule.q_sample(mask * 2 - 1, t, noise)
    answer = teacher.denoise(x_t, batch["image"], t)
    x0 = predict_x0(schedule, theirs, answer, x_t, t).clamp(-1, 1)
    expected = efkd_loss(
        tiny_network(x_t, batch["image"], t),
        output_from_x0(schedule, ours, x0, x_t, t),
        distance,
        mask,
        t,
        250,
        edge_weight=5.0,
        sample_weight=snr(schedule, t).clamp(max=1) if weighting else None,
    )
    torch.testing.assert_close(total, expected)
    if weighting:
        assert snr(schedule, t)[1] < 1e-4, "large times count for almost nothing"


def test_equal_objectives_are_neither_clamped_nor_weighted(tiny_network):
    network = DermoSegDiff(**{"dim_x": 8, "dim_g": 8, "dim_mults": [1, 1]})
    torch.nn.init.constant_(network.head.bias, 5.0)
    module = make_module(tiny_network, frozen(network, "x0"), {"efkd": {"weight": 1}},
                         objective="x0")  # fmt: skip
    mask = torch.zeros(1, 1, 8, 8)
    batch = {"image": torch.rand(1, 3, 8, 8), "mask": mask}
    extra = module.extra_loss_inputs(module.losses, batch, mask, torch.tensor([249]))
    assert extra["sample_weight"] is None
    assert extra["teacher"].max() > 1


def test_the_predicted_mask_is_compared_with_the_probability_of_any_teacher(tiny_network):
    teacher = frozen(copy.deepcopy(tiny_network), None)
    batch, t, noise = lesion_batch(), torch.tensor([3, 240]), torch.randn(2, 1, 16, 16)
    x_t = NoiseSchedule(250, 4e-4, 0.08).q_sample(batch["mask"] * 2 - 1, t, noise)
    output = tiny_network(x_t, batch["image"], t)
    chance = batch["image"].mean(1, keepdim=True)
    losses = {"probability_kd": {"weight": 2}}
    for objective in ("x0", "noise", "v"):
        module = make_module(tiny_network, teacher, losses, objective=objective)
        total, terms = module.diffusion_losses(batch, t, noise)
        x0 = predict_x0(module.schedule, objective, output, x_t, t)
        squares = ((x0 + 1) / 2 - chance).square().flatten(1).mean(1)
        weight = snr(module.schedule, t).clamp(max=1) if objective != "x0" else torch.ones(2)
        torch.testing.assert_close(total, 2 * (squares * weight).mean())
        torch.testing.assert_close(terms["probability_kd"], (squares * weight).mean())
        assert module.test_terms is None
    # What was computed once takes the teacher's place.
    known = {**batch, "teacher_probability": torch.full_like(chance, 0.25)}
    module = make_module(tiny_network, teacher, losses, objective="x0")
    total, _ = module.diffusion_losses(known, t, noise)
    torch.testing.assert_close(total, 2 * ((output + 1) / 2 - 0.25).square().mean())


def test_a_teacher_of_one_pass_cannot_be_asked_at_noise(tiny_network):
    teacher = frozen(copy.deepcopy(tiny_network), None)
    with pytest.raises(UserError, match="losses.efkd needs a diffusion teacher"):
        make_module(tiny_network, teacher, {"efkd": EFKD_ISIC})


def lesion_batch(count=2, size=16):
    mask = torch.zeros(count, 1, size, size)
    mask[:, :, 4:12, 3:11] = 1
    return {
        "image": torch.rand(count, 3, size, size),
        "mask": mask,
        "edge_distance": torch.stack([edge_distance(m) for m in mask]),
        "id": [str(index) for index in range(count)],
    }


def test_a_student_is_tested_without_the_losses_that_need_its_teacher(tiny_network, make_trainer):
    loader = torch.utils.data.DataLoader([lesion_batch()], batch_size=None)
    losses = {"l2": {"weight": 1}, "efkd": {"weight": 0.25}}
    (scores,) = make_trainer().test(make_module(tiny_network, None, losses), loader)
    assert {k for k in scores if "loss" in k} == {"test/loss", "test/loss/l2"}
    only = make_module(tiny_network, None, {"efkd": {"weight": 1}})
    (scores,) = make_trainer().test(only, loader)
    assert not [k for k in scores if "loss" in k]


@pytest.mark.parametrize("objective", ["noise", "x0", "v"])
def test_mixed_precision_is_for_the_networks_only(tiny_network, objective):
    teacher = frozen(copy.deepcopy(tiny_network), "x0")
    losses = {name: {"weight": 1} for name in EdgeFocusedDistillation.loss_functions}
    module = make_module(tiny_network, teacher, losses, objective=objective)
    batch, t = lesion_batch(), torch.tensor([10, 240])
    noise = torch.randn(2, 1, 16, 16)
    exact, _ = module.diffusion_losses(batch, t, noise)

    seen = {"network": set(), "kernels": set(), "losses": set()}
    stem, conv = tiny_network.x_stem, tiny_network.encoder[0].x_block1.block1.conv
    stem.register_forward_hook(lambda m, x, out: seen["network"].update((x[0].dtype, out.dtype)))
    conv.register_forward_hook(lambda m, x, out: seen["kernels"].add(m.standardised_weight().dtype))

    def watched(function):
        def term(**inputs):
            assert not torch.is_autocast_enabled("cpu")
            tensors = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
            seen["losses"].update(v.dtype for v in tensors if v.is_floating_point())
            return function(**inputs)

        return term

    terms = module.losses._terms
    for name, (function, required, options) in terms.items():
        terms[name] = (watched(function), required, options)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = module.diffusion_losses(batch, t, noise)
    assert seen == {
        "network": {torch.float32, torch.bfloat16},
        "kernels": {torch.float32},
        "losses": {torch.float32},
    }
    assert {value.dtype for value in [loss, *parts.values()]} == {torch.float32}
    assert {b.dtype for b in module.schedule.buffers()} == {torch.float32}
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)
    loss.backward()
    assert {p.grad.dtype for p in tiny_network.parameters()} == {torch.float32}


@pytest.mark.parametrize("objective", ["x0", "noise", "v"])
def test_the_student_can_match_the_mask_that_a_teacher_predicts(tiny_network, objective):
    # Also one of a single pass, which cannot be asked at noise.
    teacher = frozen(copy.deepcopy(tiny_network), None)
    losses = {"efkd": {"weight": 1, "edge_band": 2.0}}
    settings = {"efkd_target": "prediction", "objective": objective}
    module = make_module(tiny_network, teacher, losses, **settings)
    assert module.live_terms() == []
    batch, t, noise = lesion_batch(), torch.tensor([5, 249]), torch.randn(2, 1, 16, 16)
    total, _ = module.diffusion_losses(batch, t, noise)

    schedule = module.schedule
    x_t = schedule.q_sample(batch["mask"] * 2 - 1, t, noise)
    wanted = batch["image"].mean(1, keepdim=True) * 2 - 1
    expected = efkd_loss(
        tiny_network(x_t, batch["image"], t),
        output_from_x0(schedule, objective, wanted, x_t, t),
        batch["edge_distance"],
        batch["mask"],
        t,
        250,
        edge_band=2.0,
        sample_weight=None if objective == "x0" else snr(schedule, t).clamp(max=1),
    )
    torch.testing.assert_close(total, expected)
    known = {**batch, "teacher_probability": (wanted + 1) / 2, "image": batch["image"]}
    module.teacher.module.predict = None
    torch.testing.assert_close(module.diffusion_losses(known, t, noise)[0], expected)


def test_consistency_compares_with_what_is_predicted_from_less_noise(tiny_network):
    network = copy.deepcopy(tiny_network)
    torch.nn.init.constant_(network.head.bias, 0.3)
    module = make_module(
        tiny_network,
        frozen(network, "x0"),
        {"consistency": {"weight": 1}},
        objective="x0",
        consistency_jump=40,
    )
    assert module.live_terms() == ["consistency"]
    batch, t, noise = lesion_batch(), torch.tensor([100, 30]), torch.randn(2, 1, 16, 16)
    calls = []
    tiny_network.register_forward_hook(lambda m, x, y: calls.append((x[0], x[2], y)))
    total, _ = module.diffusion_losses(batch, t, noise)
    (x_lower, lower, target), (x_t, _, output) = calls
    assert lower.tolist() == [60, 0]
    assert not target.requires_grad
    assert output.requires_grad
    # One DDIM step of the teacher leads from one to the other.
    believed = network(x_t, batch["image"], t).clamp(-1, 1)
    for row, (now, then) in enumerate(((100, 60), (30, 0))):
        step = DDIM(2).step(
            module.schedule, x_t[[row]], believed[[row]], now, then, lambda: None
        ).previous  # fmt: skip
        torch.testing.assert_close(x_lower[[row]], step, rtol=1e-4, atol=1e-4)
    expected = ((output - target.clamp(-1, 1)) / 2).square().mean()
    torch.testing.assert_close(total, expected)


def test_terms_that_need_a_teacher_at_noise_say_so(tiny_network):
    teacher = frozen(copy.deepcopy(tiny_network), None)
    for losses, settings in (
        ({"consistency": {"weight": 1}}, {}),
        ({"consistency": {"weight": 1}, "efkd": EFKD_ISIC}, {"efkd_target": "prediction"}),
    ):
        with pytest.raises(UserError, match="losses.consistency needs a diffusion teacher"):
            make_module(tiny_network, teacher, losses, **settings)
    both = {"efkd": EFKD_ISIC, "consistency": {"weight": 1}, "l2": {"weight": 1}}
    module = make_module(tiny_network, frozen(copy.deepcopy(tiny_network), "noise"), both)
    assert module.live_terms() == ["efkd", "consistency"]


def test_a_teacher_can_fall_silent_while_the_student_trains(tiny_network, make_trainer):
    teacher = frozen(copy.deepcopy(tiny_network), "x0")
    losses = {"l2": {"weight": 1}, "efkd": {"weight": 0.5}, "probability_kd": {"weight": 2}}
    settings = {"objective": "x0", "distil_until": 0.5}
    module = make_module(tiny_network, teacher, losses, **settings)
    seen, asked = [], []
    whole = module.training_terms

    def watched_terms():
        seen.append((module.trainer.global_step, whole()))
        return seen[-1][1]

    module.training_terms = watched_terms
    teacher.network.register_forward_hook(lambda *_: asked.append(module.trainer.global_step))
    loader = torch.utils.data.DataLoader([lesion_batch()] * 4, batch_size=None)
    trainer = make_trainer(max_epochs=2, check_val_every_n_epoch=2)
    trainer.fit(module, loader, loader)
    assert [step for step, _ in seen] == list(range(8))
    for (_, terms), left in zip(seen, (1, 0.75, 0.5, 0.25, 0, 0, 0, 0), strict=True):
        kept = {"l2": 1.0, "efkd": 0.5 * left, "probability_kd": 2 * left}
        assert terms.weights == {name: weight for name, weight in kept.items() if weight}
    assert asked == [0, 1, 2, 3] + [8] * 4, "after training only for the losses of the validation"
    scores = {k.removeprefix("val/loss/"): v for k, v in trainer.callback_metrics.items()}
    total = scores["l2"] + 0.5 * scores["efkd"] + 2 * scores["probability_kd"]
    torch.testing.assert_close(scores["val/loss"], total)


def test_a_teacher_that_falls_silent_leaves_something_to_learn(tiny_network, make_trainer):
    teacher = frozen(copy.deepcopy(tiny_network), "x0")
    with pytest.raises(UserError, match="leaves no term .* give l2 a weight"):
        make_module(tiny_network, teacher, {"efkd": {"weight": 1}}, distil_until=0.5)
    losses = {"l2": {"weight": 1}, "efkd": {"weight": 1}}
    endless = make_module(tiny_network, teacher, losses, distil_until=0.5)
    loader = torch.utils.data.DataLoader([lesion_batch()], batch_size=None)
    with pytest.raises(UserError, match="has no end; set trainer.max_epochs"):
        make_trainer(max_epochs=-1).fit(endless, loader)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"efkd_target": "teacher"}, "efkd_target=teacher .* network, prediction"),
        ({"consistency_jump": 0}, r"consistency_jump=0 must lie in \[1, 250\)"),
        ({"consistency_jump": 250}, "consistency_jump=250 must lie"),
        ({"distil_until": 0}, r"distil_until=0 must lie in \(0, 1\]"),
        ({"distil_until": 1.5}, "distil_until=1.5 must lie"),
    ],
)
def test_illegal_arguments_are_named(tiny_network, settings, message):
    with pytest.raises(UserError, match=message):
        make_module(tiny_network, None, {"l2": {"weight": 1}}, **settings)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number out of a tensor."""

    waits: ClassVar = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert name not in self.waits, f"{name} waits for the device"
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("target", ["network", "prediction"])
@pytest.mark.parametrize("objective", ["noise", "x0"])
def test_a_training_step_never_waits_for_the_device(tiny_network, target, objective):
    losses = {name: {"weight": 1} for name in EdgeFocusedDistillation.loss_functions}
    losses["efkd"]["edge_band"] = 2.0
    module = make_module(
        tiny_network,
        frozen(copy.deepcopy(tiny_network), "x0"),
        losses,
        objective=objective,
        efkd_target=target,
        pure_noise_share=0.5,
        min_snr_gamma=5.0,
    )
    module._trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=3)), global_rank=0
    )
    module.log_training = lambda loss, terms, size: None
    batch = lesion_batch()
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        batch["mask"].sum().item()
    with NoWaiting():
        loss = module.training_step(batch, 0)
        loss.backward()
    assert loss.isfinite()


def test_all_terms_share_one_boundary_map(tiny_network, monkeypatch):
    made = []

    def counted(*arguments):
        made.append(1)
        return edge_closeness(*arguments)

    for name in ("boundary", "edge_focused"):
        monkeypatch.setattr(f"lightning_modules.losses.{name}.edge_closeness", counted)
    monkeypatch.setattr("lightning_modules.diffusion.edge_closeness", counted)
    teacher = frozen(copy.deepcopy(tiny_network), "noise")
    losses = {"boundary": {"weight": 1}, "efkd": EFKD_ISIC}
    module = make_module(tiny_network, teacher, losses)
    arguments = (lesion_batch(), torch.tensor([5, 9]), torch.randn(2, 1, 16, 16))
    module.diffusion_losses(*arguments)
    assert len(made) == 1
    make_module(tiny_network, teacher, {"l2": {"weight": 1}}).diffusion_losses(*arguments)
    assert len(made) == 1, "no term needs it"
