"""A step that is not finite stops the run or leaves no trace; such predictions are reported."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from common.runs import read_results
from lightning_modules import DiffusionSegmentation, Segmentation
from lightning_modules.callbacks import EMA, Monitor, NonFinite
from networks import UNet
from tasks import fit as fit_task

ADAM = {"name": "Adam", "lr": 0.1}
BATCHES = [
    {
        "image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(index)),
        "mask": torch.ones(2, 1, 16, 16),
        "id": [f"{index}a", f"{index}b"],
    }
    for index in range(6)
]


class Poisoned(Segmentation):
    """Fails in the batches that it was told to, and notes its state after each batch.

    Args:
        bad: numbers of the batches.
        kind: whether the image, and with it everything, or only the gradient is undefined there.
    """

    def __init__(self, bad, kind="image"):
        super().__init__(UNet(base_width=2), {"bce": {"weight": 1}}, ADAM)
        self.bad = bad
        self.kind = kind
        self.states = []

    def training_step(self, batch, batch_idx):
        if batch_idx not in self.bad:
            return super().training_step(batch, batch_idx)
        if self.kind == "image":
            image = torch.full_like(batch["image"], torch.nan)
            return super().training_step({**batch, "image": image}, batch_idx)
        weight = next(self.network.parameters()).sum()
        return super().training_step(batch, batch_idx) + (0 * weight).sqrt()

    def on_train_batch_start(self, batch, batch_idx):
        self.states.append(self.snapshot())

    def snapshot(self):
        optimizer = self.trainer.optimizers[0].state_dict()["state"]
        return copy.deepcopy((self.state_dict(), optimizer))


@pytest.fixture
def fit(make_trainer):
    """Trains on all batches once, or on from a checkpoint; returns the trainer."""

    def run(module, *callbacks, max_epochs=1, saved=None, **settings):
        common = {"max_epochs": max_epochs, "log_every_n_steps": 1}
        trainer = make_trainer(callbacks=list(callbacks), **common, **settings)
        loader = DataLoader(BATCHES, batch_size=None)
        trainer.fit(module, loader, ckpt_path=saved, weights_only=True)
        return trainer

    return run


def assert_equal(one, two):
    for state, other in zip(one, two, strict=True):
        assert state.keys() == other.keys()
    weights, others = one[0], two[0]
    assert all(torch.equal(value, others[key]) for key, value in weights.items())
    for index, values in one[1].items():
        assert all(torch.equal(value, two[1][index][key]) for key, value in values.items())


def is_finite(module):
    return all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("kind", ["image", "gradient"])
def test_a_bad_step_stops_the_run_before_the_weights_change(fit, kind):
    module = Poisoned({2}, kind)
    what = "loss" if kind == "image" else "gradient"
    with pytest.raises(UserError) as error:
        fit(module, NonFinite())
    message = str(error.value)
    assert f"The {what} of optimizer step 2 is not finite, with the images 2a, 2b;" in message
    assert "callbacks.non_finite.action=skip" in message
    weights, before = dict(module.named_parameters()), module.states[-1][0]
    assert len(module.states) == 3
    assert all(torch.equal(value, before[key]) for key, value in weights.items())


def test_of_accumulated_batches_the_bad_ones_are_named(fit):
    with pytest.raises(UserError, match="loss of optimizer step 1 .* the images 4a, 4b;"):
        fit(Poisoned({4}), NonFinite(), accumulate_grad_batches=3)


def test_of_accumulated_batches_with_a_bad_gradient_all_are_named(fit):
    with pytest.raises(UserError, match="gradient of optimizer step 0 .* images 0a, 0b, 1a, 1b;"):
        fit(Poisoned({1}, "gradient"), NonFinite(), accumulate_grad_batches=2)


@pytest.mark.parametrize("kind", ["image", "gradient"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_is_left_out_leaves_no_trace(fit, capsys, kind, clip):
    module, average = Poisoned({2, 3}, kind), EMA(update_after_step=0)
    non_finite = NonFinite("skip")
    fit(module, average, non_finite, gradient_clip_val=clip)
    assert non_finite.skipped == 2
    assert_equal(module.states[2], module.states[3])
    assert_equal(module.states[3], module.states[4])
    moved = [
        not torch.equal(value, module.states[5][0][key])
        for key, value in module.states[4][0].items()
    ]
    assert any(moved), "later steps go on"
    assert is_finite(module)
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("2 optimizer steps were left out")
    assert text.endswith("the last one had the images 3a, 3b.")


def test_a_bad_batch_takes_the_whole_accumulated_step_with_it(fit):
    module = Poisoned({1})
    fit(module, NonFinite("skip"), accumulate_grad_batches=2)
    assert_equal(module.states[0], module.states[2])
    before, after = (module.states[index][0] for index in (2, 4))
    assert not all(torch.equal(value, after[key]) for key, value in before.items())


def test_it_is_counted_in_the_log(fit):
    trainer = fit(Poisoned({0, 3}), NonFinite("skip"))
    assert trainer.logged_metrics["train/skipped"] == 2


def test_the_monitor_before_it_sees_the_gradient(fit):
    trainer = fit(Poisoned({5}), Monitor(), NonFinite("skip"))
    assert trainer.logged_metrics["train/grad_norm"].isnan()


def test_a_run_without_bad_steps_is_as_without_it(fit, capsys):
    outcomes = []
    for callbacks in ([], [NonFinite()], [NonFinite("skip")]):
        torch.manual_seed(0)
        module = Poisoned(())
        fit(module, *callbacks)
        outcomes.append(module.states[-1])
    assert_equal(outcomes[0], outcomes[1])
    assert_equal(outcomes[0], outcomes[2])
    assert not capsys.readouterr().out


def test_a_resumed_run_goes_on_counting(fit, tmp_path):
    path, again = tmp_path / "half.ckpt", NonFinite("skip")
    fit(Poisoned({1}), NonFinite("skip")).save_checkpoint(path)
    fit(Poisoned({2, 4}), again, max_epochs=2, saved=path)
    assert again.skipped == 3


class Uneven(Poisoned):
    """The same, in the second of two processes only."""

    def on_train_batch_start(self, batch, batch_idx):
        """Do nothing: what was noted would have to come back from the other process."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 0:
            return Segmentation.training_step(self, batch, batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
def test_two_processes_decide_alike(fit, capfd):
    two = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    with pytest.raises(Exception, match="loss of optimizer step 2 .* the images 2a, 2b;"):
        fit(Uneven({2}), NonFinite(), **two)
    fit(Uneven({2, 3}), NonFinite("skip"), **two)
    assert capfd.readouterr().out.startswith("2 optimizer steps were left out")


def test_the_run_goes_on_from_the_last_good_checkpoint(make_config, tmp_path, monkeypatch):
    overrides = (
        *("experiment=demo_teacher", "debug=fast", "datamodule.num_samples=20"),
        *("datamodule.image_size=16", "trainer.max_epochs=3", "trainer.limit_train_batches=3"),
        f"hydra.runtime.output_dir={tmp_path}/run",
    )
    original = DiffusionSegmentation.training_step

    def step(module, batch, batch_idx):
        return original(module, batch, batch_idx) * (torch.nan if module.global_step == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionSegmentation, "training_step", step)
        with pytest.raises(UserError, match="The loss of optimizer step 4 is not finite"):
            fit_task.run(make_config(*overrides))
    results = read_results(tmp_path / "run")
    assert (results["status"], results["reason"][:9]) == ("failed", "UserError")
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    fit_task.run(make_config(*overrides, f"resume={tmp_path}/run"))
    assert read_results(tmp_path / "run")["status"] == "finished"


class Diverging(Segmentation):
    """Predicts nothing finite for the images that it was told to."""

    def __init__(self, bad):
        super().__init__(UNet(base_width=2), {"bce": {"weight": 1}}, ADAM)
        self.bad = bad

    def diverged(self, result, batch):
        for index, sample in enumerate(batch["id"]):
            if sample in self.bad:
                result["probability"][index, 0, 0, 0] = torch.nan
        return result

    def validation_step(self, batch, batch_idx):
        return self.diverged(super().validation_step(batch, batch_idx), batch)

    def test_step(self, batch, batch_idx):
        return self.diverged(super().test_step(batch, batch_idx), batch)


@pytest.mark.parametrize("part", ["val", "test"])
def test_images_without_a_finite_prediction_are_counted_and_named(make_trainer, capsys, part):
    non_finite = NonFinite()
    trainer = make_trainer(callbacks=[non_finite])
    loader = DataLoader(BATCHES, batch_size=None)
    score = trainer.validate if part == "val" else trainer.test
    module = Diverging({"1b", "4a"})
    (scores,) = score(module, loader, verbose=False)
    assert scores[f"{part}/not_finite"] == 2
    text = " ".join(capsys.readouterr().out.split())
    assert f"{part}: what the network predicts is not finite for 2 of 12 images (1b, 4a)" in text
    assert "sampler.clip_x0=true" in text
    module.bad = {sample for batch in BATCHES for sample in batch["id"]}
    score(module, loader, verbose=False)
    assert "for 12 of 12 images (0a, 0b, 1a, 1b, 2a, ...)" in capsys.readouterr().out
    module.bad = ()
    (scores,) = score(module, loader, verbose=False)
    assert f"{part}/not_finite" not in scores, "of this validation, not of earlier ones"
    assert not capsys.readouterr().out


def test_images_whose_mask_is_not_sampled_are_not_counted(make_trainer, capsys):
    class Sampled(Diverging):
        """Samples a mask of the first image of each batch, and none of the last batch."""

        def validation_step(self, batch, batch_idx):
            result = super().validation_step(batch, batch_idx)
            return {} if batch_idx == 5 else {"probability": result["probability"][:1]}

    trainer = make_trainer(callbacks=[NonFinite()])
    module = Sampled({"0a", "1b", "5a"})
    (scores,) = trainer.validate(module, DataLoader(BATCHES, batch_size=None), verbose=False)
    assert scores["val/not_finite"] == 1
    assert "for 1 of 5 images (0a)" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_report_such_images_once(make_trainer, capfd):
    class Halves(Diverging):
        """Diverges in the second of two processes only."""

        def diverged(self, result, batch):
            return super().diverged(result, batch) if self.global_rank else result

    two = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    trainer = make_trainer(callbacks=[NonFinite()], **two)
    trainer.test(Halves({"3a"}), DataLoader(BATCHES, batch_size=None), verbose=False)
    assert trainer.callback_metrics["test/not_finite"] == 1
    assert capfd.readouterr().out.count("not finite for 1 of 24 images (3a)") == 1


def test_scaled_gradients_are_left_to_the_scaler():
    class Scaled:
        precision, world_size, global_step, is_global_zero = "16-mixed", 1, 0, True

    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.full((1,), torch.inf)
    optimizer, non_finite = torch.optim.SGD([parameter]), NonFinite()
    module = torch.nn.Linear(1, 1)
    non_finite.on_train_batch_start(Scaled, module, {"id": ["a"]}, 0)
    non_finite.on_before_backward(Scaled, module, torch.ones(()))
    non_finite.on_before_optimizer_step(Scaled, module, optimizer)
    assert parameter.grad is not None
    non_finite.on_train_batch_start(Scaled, module, {"id": ["a"]}, 1)
    non_finite.on_before_backward(Scaled, module, torch.tensor(torch.nan))
    with pytest.raises(UserError, match="The loss of optimizer step 0 .* images a;"):
        non_finite.on_before_optimizer_step(Scaled, module, optimizer)


def test_an_unknown_action_is_refused():
    with pytest.raises(UserError, match="callbacks.non_finite.action=ignore .* of stop, skip"):
        NonFinite("ignore")
