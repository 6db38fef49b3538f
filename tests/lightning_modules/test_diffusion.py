"""The diffusion method: combined losses, noise, sampling, and what it must not disturb."""

import copy
import math

import pytest
import torch

from common.errors import UserError
from datamodules import edge_distance
from lightning_modules import DiffusionSegmentation
from lightning_modules.processes import DDIM, DDPM, DPMSolver, NoiseSchedule, min_snr_weight
from networks import CompactDermoSegDiff

OPTIMIZER = {"name": "Adam", "lr": 1e-3}
VALIDATION = {"num_images": 3, "ensemble": 1, "num_timesteps": 4}


def make_module(network, sampler=None, losses=None, **settings):
    return DiffusionSegmentation(
        network,
        NoiseSchedule(250, 4e-4, 0.08),
        sampler or DDIM(2, ensemble=2),
        losses or {"l2": {"weight": 1}},
        OPTIMIZER,
        VALIDATION,
        **settings,
    )


def make_batch(count, size=16, first=0):
    generator = torch.Generator().manual_seed(first)
    mask = torch.zeros(count, 1, size, size)
    mask[:, :, 4:12, 3:11] = 1
    return {
        "image": torch.rand(count, 3, size, size, generator=generator),
        "mask": mask,
        "edge_distance": torch.stack([edge_distance(m) for m in mask]),
        "id": [f"sample_{first + i}" for i in range(count)],
        "size": torch.full((count, 2), size),
    }


class Batches(torch.utils.data.Dataset):
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def loader(batches):
    return torch.utils.data.DataLoader(
        Batches(batches), batch_size=None, generator=torch.Generator()
    )


TEACHER_CASES = {
    "lite_isic": {"l2": 1.0, "boundary": 0.25},
    "lite_ham": {"l2": 1.0, "boundary": 0.2},
    "misspelt_key": {"l2": 0.5, "boundary": 0.25},
    "both_keys_coefficient_wins": {"l2": 0.5, "boundary": 0.25},
    "no_coefficient_defaults_to_1": {"l2": 1.0, "boundary": 1.0},
}


@pytest.mark.parametrize("case", TEACHER_CASES)
def test_combined_losses_match_the_reference(golden, golden_json, golden_network, case):
    network, _ = golden_network("dsd_2level")
    stored = golden_json("p_losses")["teacher_only"][case]
    values = golden("p_losses")
    losses = {name: {"weight": weight} for name, weight in TEACHER_CASES[case].items()}
    losses["boundary"]["gamma"] = 0.2
    module = make_module(network, losses=losses)
    mask = (values["x"] + 1) / 2
    batch = {
        "image": values["g"],
        "mask": mask,
        "edge_distance": torch.stack([edge_distance(m) for m in mask]),
    }
    total, terms = module.diffusion_losses(batch, values["t"], values["noise"])
    assert total.item() == pytest.approx(stored["total"], rel=2e-6)
    assert terms["l2"].item() == pytest.approx(stored["parts"]["l2"], rel=2e-6)
    assert terms["boundary"].item() == pytest.approx(stored["parts"]["boundary"], rel=2e-6)


@pytest.mark.parametrize("sampler", [DDIM(1), DDPM(1), DPMSolver(1)])
@pytest.mark.parametrize("objective", ["x0", "v"])
def test_one_step_is_fine_where_the_mask_or_velocity_is_predicted(tiny_network, sampler, objective):
    module = make_module(tiny_network, sampler, objective=objective)
    assert module.predict(make_batch(2))["probability"].isfinite().all()


@pytest.mark.parametrize("objective", ["noise", "x0", "v"])
def test_min_snr_weighs_the_pixelwise_terms_by_time(tiny_network, objective):
    batch, t, noise = make_batch(2), torch.tensor([3, 200]), torch.randn(2, 1, 16, 16)
    plain = make_module(tiny_network, objective=objective)
    weighed = make_module(tiny_network, objective=objective, min_snr_gamma=5.0)
    weights = min_snr_weight(plain.schedule, objective, t, 5.0)
    each = []
    for index in range(2):
        part = {key: value[index : index + 1] for key, value in batch.items()}
        each.append(plain.diffusion_losses(part, t[[index]], noise[[index]])[1]["l2"])
    _, terms = weighed.diffusion_losses(batch, t, noise)
    torch.testing.assert_close(terms["l2"], (torch.stack(each) * weights).mean())


def test_a_single_term_keeps_its_weight(golden, golden_json, golden_network):
    # The reference ignores the coefficient of a single term; here it counts.
    network, _ = golden_network("dsd_2level")
    stored = golden_json("p_losses")["teacher_only"]["single_loss_coefficient_ignored"]
    values = golden("p_losses")
    module = make_module(network, losses={"l2": {"weight": 0.1}})
    batch = {"image": values["g"], "mask": (values["x"] + 1) / 2, "edge_distance": values["x"]}
    total, terms = module.diffusion_losses(batch, values["t"], values["noise"])
    assert terms["l2"].item() == pytest.approx(stored["total"], rel=2e-6)
    assert total.item() == pytest.approx(0.1 * stored["total"], rel=2e-6)


def test_training_times_respect_the_lower_bound(tiny_network, make_trainer, monkeypatch):
    for t_min in (0, 1):
        module = make_module(copy.deepcopy(tiny_network), t_min=t_min)
        module.schedule = NoiseSchedule(4, 0.1, 0.2)
        seen = []
        original = module.diffusion_losses

        def spy(batch, t, noise, seen=seen, original=original):
            seen.extend(t.tolist())
            return original(batch, t, noise)

        monkeypatch.setattr(module, "diffusion_losses", spy)
        trainer = make_trainer(max_epochs=1, limit_val_batches=0)
        trainer.fit(module, loader([make_batch(8, first=i) for i in range(4)]))
        assert set(seen) == set(range(t_min, 4))


def test_training_repeats_exactly_and_depends_on_the_seed(tiny_network, make_trainer):
    def train(seed):
        torch.manual_seed(torch.seed() % 1000)  # The global generator must not matter.
        module = make_module(copy.deepcopy(tiny_network), seed=seed)
        trainer = make_trainer(max_epochs=1, limit_val_batches=0)
        trainer.fit(module, loader([make_batch(2, first=i) for i in range(3)]))
        return torch.cat([p.detach().flatten() for p in module.network.parameters()])

    first = train(seed=0)
    assert torch.equal(first, train(seed=0))
    assert not torch.equal(first, train(seed=1))


def test_validation_repeats_exactly_and_disturbs_nothing(tiny_network, make_trainer):
    module = make_module(tiny_network)
    trainer = make_trainer()
    batches = [make_batch(2), make_batch(2, first=2)]
    state = torch.get_rng_state()
    first = trainer.validate(module, loader(batches), verbose=False)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.validate(module, loader(batches), verbose=False)[0] == first
    assert first.keys() == {"val/loss", "val/loss/l2", "val/dice", "val/iou"}
    assert math.isfinite(first["val/loss"])


def test_validation_does_not_depend_on_the_batch_size(tiny_network, make_trainer):
    module = make_module(tiny_network)
    trainer = make_trainer()
    whole = make_batch(6)
    parts = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2, 4)]
    one = trainer.validate(module, loader([whole]), verbose=False)[0]
    three = trainer.validate(module, loader(parts), verbose=False)[0]
    assert one == pytest.approx(three, rel=1e-5)


def test_masks_are_sampled_for_the_subset_only(tiny_network, make_trainer):
    module = make_module(tiny_network)
    make_trainer().validate(
        module,
        loader([make_batch(2), make_batch(2, first=2), make_batch(2, first=4)]),
        verbose=False,
    )
    sampled = []
    module.predict = lambda batch, ensemble: (
        sampled.extend(batch["id"]) or {"probability": torch.zeros_like(batch["mask"])}
    )
    make_trainer().validate(
        module,
        loader([make_batch(2), make_batch(2, first=2), make_batch(2, first=4)]),
        verbose=False,
    )
    assert sampled == ["sample_0", "sample_1", "sample_2"]


def test_announced_network_calls_are_the_calls_made(tiny_network, make_trainer):
    module = make_module(tiny_network, sampler=DDIM(3, ensemble=2))
    calls = []
    tiny_network.register_forward_hook(lambda m, inputs, out: calls.append(len(out)))
    batches = [make_batch(2), make_batch(3, first=2)]
    validation, test = module.network_calls(num_val=5, num_test=5)
    trainer = make_trainer()
    trainer.validate(module, loader(batches), verbose=False)
    assert sum(calls) == validation == 5 + 3 * 3
    calls.clear()
    trainer.test(module, loader(batches), verbose=False)
    assert sum(calls) == test == 5 + 5 * 6


@pytest.mark.parametrize("sampler", [DDIM(3, ensemble=2), DDPM(3, ensemble=2)])
def test_prediction_belongs_to_the_sample(tiny_network, sampler):
    module = make_module(tiny_network.eval(), sampler=sampler)
    batch = make_batch(4)
    together = module.predict(batch)
    order = [2, 0, 3]
    shuffled = {"image": batch["image"][order], "id": [batch["id"][i] for i in order]}
    apart = module.predict(shuffled)
    for key in ("probability", "uncertainty"):
        torch.testing.assert_close(apart[key], together[key][order], rtol=1e-4, atol=1e-5)


def test_ensemble_is_the_mean_of_its_members(tiny_network, monkeypatch):
    module = make_module(tiny_network)
    members = iter([torch.full((2, 1, 8, 8), value) for value in (0.9, -0.3, 0.3)])
    monkeypatch.setattr(module.sampler, "sample", lambda *arguments: next(members))
    result = module.predict(make_batch(2, size=8), ensemble=3)
    torch.testing.assert_close(result["probability"], torch.full((2, 1, 8, 8), 0.65))
    deviation = torch.tensor([0.9, -0.3, 0.3]).std(unbiased=False).item() / 2
    torch.testing.assert_close(result["uncertainty"], torch.full((2, 1, 8, 8), deviation))


def test_one_member_has_no_uncertainty_and_probabilities_are_in_range(tiny_network):
    result = make_module(tiny_network, objective="x0").predict(make_batch(2), ensemble=1)
    assert result.keys() == {"probability"}
    assert result["probability"].min() >= 0
    assert result["probability"].max() <= 1


def test_perfect_network_gets_a_perfect_test(make_trainer):
    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, image, t):
            return image[:, :1] * 2 - 1

    losses = {"l2": {"weight": 1}, "boundary": {"weight": 0.25}}
    module = make_module(Oracle(), sampler=DDIM(1), losses=losses, objective="x0")
    batch = make_batch(3)
    batch["image"] = batch["mask"].expand(-1, 3, -1, -1)
    scores = make_trainer().test(module, loader([batch]), verbose=False)[0]
    found = {key: scores.pop(key) for key in list(scores) if key.startswith("test/loss")}
    assert found == {"test/loss": 0, "test/loss/l2": 0, "test/loss/boundary": 0}
    faults = ("hd95", "hd95_relative", "assd", "assd_relative", "calibration_error")
    neutral = ("uncertainty_correlation", "doubt_correlation")
    assert all(scores.pop(f"test/{key}") == 0 for key in (*faults, *neutral))
    assert all(value == 1 for value in scores.values())
    assert scores.keys() == {
        "test/boundary_f1",
        "test/referral_dice",
        "test/dice",
        "test/iou",
        "test/threshold_jaccard",
        "test/pooled_f1",
        "test/pooled_iou",
        "test/pooled_accuracy",
        "test/pooled_precision",
        "test/pooled_sensitivity",
        "test/pooled_specificity",
    }


@pytest.mark.parametrize("objective", ["noise", "x0", "v"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_empty_and_full_masks_give_finite_losses(tiny_network, objective, value):
    losses = {name: {"weight": 1} for name in DiffusionSegmentation.loss_functions}
    module = make_module(tiny_network, losses=losses, objective=objective)
    batch = make_batch(2)
    batch["mask"] = torch.full_like(batch["mask"], value)
    batch["edge_distance"] = torch.zeros_like(batch["mask"])
    total, _ = module.diffusion_losses(
        batch, torch.tensor([1, 249]), torch.randn(batch["mask"].shape)
    )
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in tiny_network.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "eps"}, "objective=eps"),
        ({"t_min": 250}, "t_min=250"),
        ({"sampler": DDIM(300)}, "num_steps=300"),
        ({"sampler": DDIM(1)}, "num_steps=1 needs .*objective=x0 or v.*error multiplied by 175"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma=0"),
        ({"losses": {"efkd": {"weight": 1}}}, "losses.efkd is not a loss term here"),
    ],
)
def test_mistakes_are_named_at_once(tiny_network, settings, message):
    with pytest.raises(UserError, match=message):
        make_module(tiny_network, **settings)


@pytest.mark.parametrize("key", VALIDATION)
def test_validation_numbers_are_checked(tiny_network, monkeypatch, key):
    monkeypatch.setitem(VALIDATION, key, 0)
    with pytest.raises(UserError, match=rf"validation.{key}=0"):
        make_module(tiny_network)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "Adamax", "lr": 1e-3}, "optimizer.name=Adamax .* Adam, AdamW, SGD"),
        ({"name": "Adam", "learning_rate": 1e-3}, "refused by Adam"),
        ({"name": "Adam", "lr": -1.0}, "refused by Adam"),
    ],
)
def test_optimizer_mistakes_are_named(tiny_network, optimizer, message):
    module = make_module(tiny_network)
    module.optimizer_settings = optimizer
    with pytest.raises(UserError, match=message):
        module.configure_optimizers()


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 6), (0.5, 60, 140), (1.0, 200, 200)])
def test_a_share_of_the_samples_is_trained_at_pure_noise(
    tiny_network, make_trainer, share, least, most
):
    seen = []
    module = make_module(tiny_network, pure_noise_share=share)

    def note(batch, t, noise, losses=None):
        seen.append(t)
        return module.network.head.bias.sum(), {}

    module.diffusion_losses = note
    trainer = make_trainer(max_steps=20, limit_val_batches=0)
    trainer.fit(module, loader([make_batch(10)] * 20))
    times = torch.cat(seen)
    assert times.shape == (200,)
    assert least <= (times == 249).sum() <= most
    other = times[times != 249]
    assert not len(other) or (other.min() >= 1 and len(other.unique()) > len(other) / 3)


def test_illegal_shares_are_named(tiny_network):
    with pytest.raises(UserError, match=r"pure_noise_share=1.5 must lie in \[0, 1\]"):
        make_module(tiny_network, pure_noise_share=1.5)


@pytest.mark.parametrize("at_once", [1, 3])
def test_guidance_is_computed_once_for_all_steps_and_members(at_once):
    torch.manual_seed(0)
    network = CompactDermoSegDiff([8, 8], [4, 4], [1, 1], [1, 1], 2, 4, 1, 8)
    module = make_module(network, DDIM(2, ensemble=3, members_at_once=at_once), objective="x0")
    batch = make_batch(2)
    guided, denoised = [], []
    network.guidance.register_forward_hook(lambda *_: guided.append(1))
    network.denoiser.register_forward_hook(lambda m, x, y: denoised.append(len(x[0])))
    result = module.predict(batch)
    assert len(guided) == 1
    assert denoised == [2 * at_once] * (6 // at_once)

    class Whole(torch.nn.Module):
        """The same network, of which only the whole can be called."""

        def forward(self, x, g, time):
            return network(x, g, time)

    module.network = Whole()
    expected = module.predict(batch)
    for name, values in expected.items():
        torch.testing.assert_close(result[name], values, rtol=1e-4, atol=1e-5)
