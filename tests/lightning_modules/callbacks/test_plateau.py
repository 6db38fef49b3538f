"""The learning rate falls after scheduled validations without progress."""

import lightning as L
import pytest
import torch

from common.errors import UserError
from lightning_modules.callbacks import FinalValidation, MetricsFile, Plateau


class Scripted(L.LightningModule):
    """Reports the validation losses that it was told to."""

    def __init__(self, losses):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.losses = iter(losses)
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", next(self.losses))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(make_trainer, losses, plateau, folder=None, **settings):
    module = Scripted(losses)
    one = torch.utils.data.DataLoader(torch.zeros(1, 1))
    logger = MetricsFile(folder) if folder else False
    trainer = make_trainer(callbacks=[FinalValidation(), plateau], logger=logger, **settings)
    trainer.fit(module, one, one)
    return module, trainer


def test_the_rate_is_halved_after_patience_validations_without_progress(make_trainer, tmp_path):
    losses = [1.0, 0.9, 0.95, 0.91, 0.92, 0.8, 0.81, 0.82, 0.83]
    module, _ = fit(make_trainer, losses, Plateau(patience=2), tmp_path, max_epochs=9)
    assert module.rates == [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/lr")
    logged = [row.split(",")[column] for row in rows[1:] if row.split(",")[column]]
    assert [float(rate) for rate in logged] == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]


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
