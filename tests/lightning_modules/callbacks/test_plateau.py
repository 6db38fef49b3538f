"""The learning rate falls after scheduled validations without progress."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from common.errors import UserError
from lightning_modules.callbacks import EarlyStop, FinalValidation, Plateau


class Scripted(L.LightningModule):
    """Reports the validation losses that it was told to."""

    def __init__(self, losses, lr=1.0):
        super().__init__()
        self.lr = lr
        self.layer = torch.nn.Linear(1, 1)
        self.losses = iter(losses)
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", next(self.losses))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(make_trainer, losses, plateau, **settings):
    module = Scripted(losses)
    one = torch.utils.data.DataLoader(torch.zeros(1, 1))
    trainer = make_trainer(callbacks=[FinalValidation(), plateau], **settings)
    trainer.fit(module, one, one)
    return module, trainer


def test_the_rate_is_halved_after_patience_validations_without_progress(make_trainer):
    losses = [1.0, 0.9, 0.95, 0.91, 0.92, 0.8, 0.81, 0.82, 0.83]
    module, trainer = fit(make_trainer, losses, Plateau(patience=2), max_epochs=9)
    assert module.rates == [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_the_extra_validation_after_training_does_not_count(make_trainer):
    plateau = Plateau(patience=0)
    _, trainer = fit(
        make_trainer, [1.0, 2.0, 3.0], plateau, max_epochs=5, check_val_every_n_epoch=2
    )
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5, "two on schedule, one extra"


def test_no_rate_below_the_least(make_trainer):
    plateau = Plateau(factor=0.1, patience=0, min_lr=0.05)
    module, _ = fit(make_trainer, [1.0] * 5, plateau, max_epochs=5)
    assert module.rates == pytest.approx([1, 1, 0.1, 0.05, 0.05])


@pytest.mark.parametrize("wrong", [{"factor": 1}, {"factor": 0}, {"patience": -1}, {"min_lr": -1}])
def test_illegal_arguments_are_named(wrong):
    with pytest.raises(UserError, match=f"callbacks.plateau.{next(iter(wrong))}"):
        Plateau(**wrong)


# Published: factor 0.1 and 10 epochs of patience in all; these differ.
SCHEDULES = {
    "deeplab": {"stops": None},
    "dkd": {"min_lr": 1e-6, "late": True, "stops": 15},
    "ssdkd": {"min_lr": 1e-6, "stops": 15},
}


class Rates(L.Callback):
    """Notes the rate that each epoch leaves."""

    def __init__(self):
        self.rates = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def replay(make_trainer, losses, folder, stops, **settings):
    """Train on given validation losses; return what the callbacks did, in epochs from 1."""
    noted, best = Rates(), ModelCheckpoint(folder, "{epoch}", monitor="val/loss", mode="min")
    stop = EarlyStop(patience=stops or len(losses) + 1)
    plateau = Plateau(factor=0.1, patience=10, **settings)
    module = Scripted(losses, lr=1e-3)
    one = torch.utils.data.DataLoader(torch.zeros(1, 1))
    trainer = make_trainer(
        callbacks=[plateau, stop, noted, best], max_epochs=len(losses), enable_checkpointing=True
    )
    trainer.fit(module, one, one)
    best_epoch = 1 + int(Path(best.best_model_path).stem.removeprefix("epoch="))
    return noted.rates, best_epoch, stop.stopped_epoch + 1 if stop.stopped_epoch else -1


@pytest.mark.parametrize("system", SCHEDULES)
def test_rates_best_and_last_epoch_are_the_references(golden_cases, make_trainer, tmp_path, system):
    cases = golden_cases("schedules", f"plateau_{system}")
    assert len(cases) == 2
    for case in cases:
        losses = case.inputs["val_loss"].tolist()
        rates, best, stopped = replay(
            make_trainer, losses, tmp_path / case.name, **SCHEDULES[system]
        )
        assert best == case.outputs["best_epoch"]
        assert losses[best - 1] == case.outputs["best"] == min(losses)
        assert stopped == case.outputs["stop_epoch"]
        expected = case.outputs["lr_after_epoch"].tolist()
        assert rates == pytest.approx(expected, rel=1e-9)


def test_a_late_schedule_resumes_with_the_best_loss_it_has_seen(make_trainer):
    plateau = Plateau(factor=0.1, patience=0, late=True)
    module, _ = fit(make_trainer, [3.0, 2.0, 1.0], plateau, max_epochs=3)
    assert module.rates == [1, 1, 1], "1000, 3 and 2 fall"
    again = Plateau(factor=0.1, patience=0, late=True)
    again.load_state_dict(plateau.state_dict())
    module, _ = fit(make_trainer, [2.5, 0.5, 0.4], again, max_epochs=3)
    assert module.rates == pytest.approx([1, 1, 0.1]), "1 is a fall, then it is the best twice"
