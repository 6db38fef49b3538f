"""The moving average: the reference's numbers, and which weights are where."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from common.errors import UserError
from lightning_modules.callbacks import EMA
from lightning_modules.callbacks.ema import ema_decay
from lightning_modules.teacher import FrozenTeacher


def test_averages_match_the_reference(golden, manifest):
    values = golden("ema")
    for case in manifest["files"]["ema.npz"]["cases"]:
        key = case.pop("key")
        callback = EMA(**case)
        average = torch.zeros(1, 2)
        for step, online in enumerate(values[f"{key}_online"]):
            callback._average([average], [online], torch.tensor(step))
            torch.testing.assert_close(average, values[f"{key}_ema"][step], rtol=0, atol=3e-6)


def test_decay_of_the_published_warm_up():
    settings = {"beta": 0.9999, "update_after_step": 500, "update_every": 1, "inv_gamma": 1.0}
    assert ema_decay(500, **settings, power=0.9) == 0
    assert ema_decay(501, **settings, power=0.9) == 0, "the first average is a copy"
    assert ema_decay(512, **settings, power=0.9) == pytest.approx(0.9, abs=0.002)
    assert ema_decay(500 + 2154, **settings, power=0.9) == pytest.approx(0.999, abs=1e-5)
    assert ema_decay(10**9, **settings, power=0.9) == 0.9999


def test_updates_between_are_skipped():
    assert [
        ema_decay(s, 0.9, update_after_step=2, update_every=3, inv_gamma=1.0, power=1.0)
        for s in range(8)
    ] == [0, None, None, 0, None, None, 0.8, None]


@pytest.mark.parametrize(
    "wrong",
    [{"beta": 1.5}, {"update_after_step": -1}, {"update_every": 0}, {"inv_gamma": 0}, {"power": 0}],
)
def test_illegal_arguments_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        EMA(**wrong)


class Line(L.LightningModule):
    """Learns nothing but moves: every step adds 1 to its weight."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.network.weight)
        self.register_buffer("steps", torch.tensor(0))
        self.teacher = FrozenTeacher(torch.nn.Linear(50, 50))
        self.validated, self.tested = [], []

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return -self.network.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.network.weight.item())
        self.log("val/dice", self.network.weight.sum())

    def test_step(self, batch, batch_idx):
        self.tested.append(self.network.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=1.0)


def fit(make_trainer, tmp_path, steps, **settings):
    module = Line()
    loader = torch.utils.data.DataLoader(torch.zeros(2, 1), batch_size=1)
    one = torch.utils.data.DataLoader(torch.zeros(1, 1))
    checkpoint = ModelCheckpoint(
        tmp_path, "best", monitor="val/dice", mode="max", save_on_train_epoch_end=False
    )
    trainer = make_trainer(
        max_epochs=steps // 2, callbacks=[EMA(**settings), checkpoint], enable_checkpointing=True
    )
    trainer.fit(module, loader, one)
    return trainer, module, one, checkpoint.best_model_path


def expected_average(steps, **settings):
    average = 0.0
    for step in range(steps):
        decay = ema_decay(step, **settings)
        if decay is not None:
            average += (1 - decay) * (step + 1 - average)
    return average


SETTINGS = {
    "beta": 0.99,
    "update_after_step": 2,
    "update_every": 1,
    "inv_gamma": 1.0,
    "power": 0.9,
}


def test_average_is_validated_stored_and_tested(make_trainer, tmp_path):
    trainer, module, loader, best = fit(make_trainer, tmp_path, steps=8, **SETTINGS)
    expected = [expected_average(n, **SETTINGS) for n in (2, 4, 6, 8)]
    assert module.validated == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 8
    assert module.network.weight.item() == pytest.approx(expected[-1], rel=1e-5)

    checkpoint = torch.load(best, weights_only=True)
    stored = checkpoint["state_dict"]["network.weight"].item()
    assert stored == pytest.approx(expected[-1], rel=1e-5)
    assert checkpoint["current_model_state"]["network.weight"].item() == 8
    assert checkpoint["state_dict"]["steps"] == 8, "integer buffers are copied, not averaged"

    torch.nn.init.zeros_(module.network.weight)
    trainer.test(module, loader, ckpt_path=best, verbose=False, weights_only=True)
    assert module.tested == [pytest.approx(expected[-1], rel=1e-5)]
    trainer.validate(module, loader, verbose=False)
    assert module.validated[-1] == pytest.approx(expected[-1], rel=1e-5)


def test_a_run_shorter_than_the_start_keeps_the_online_weights(make_trainer, tmp_path):
    _, module, _, best = fit(
        make_trainer, tmp_path, steps=4, **{**SETTINGS, "update_after_step": 100}
    )
    assert module.validated == [2, 4]
    assert torch.load(best, weights_only=True)["state_dict"]["network.weight"].item() == 4


def test_teacher_is_neither_copied_nor_stored(make_trainer, tmp_path):
    _, module, _, best = fit(make_trainer, tmp_path, steps=2, **SETTINGS)
    assert copy.deepcopy(module).teacher is module.teacher
    checkpoint = torch.load(best, weights_only=True)
    assert set(checkpoint["state_dict"]) == {"network.weight", "steps"}
    assert set(checkpoint["current_model_state"]) == {"network.weight", "steps"}
    assert [p.shape for p in module.parameters()] == [(1, 1)]
