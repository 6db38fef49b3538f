"""Training ends when the loss has not fallen for long enough, at the same place when resumed."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_modules import Segmentation
from lightning_modules.callbacks import EarlyStop, FinalValidation, LastCheckpoint
from networks import UNet


class Stuck(Segmentation):
    """Has the same validation loss from the third validation on."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("val/loss", torch.tensor(max(1.0, 5.0 - self.current_epoch)))


@pytest.fixture
def fit(make_trainer, tmp_path):
    """Trains until it ends; returns the epochs done."""
    mask = torch.ones(2, 1, 16, 16)
    batch = {"image": torch.rand(2, 3, 16, 16), "mask": mask, "id": ["a", "b"]}
    loader = DataLoader([batch], batch_size=None)

    def run(max_epochs, saved=None, patience=3, **settings):
        callbacks = [FinalValidation(), EarlyStop(patience=patience), LastCheckpoint(tmp_path)]
        trainer = make_trainer(
            max_epochs=max_epochs, callbacks=callbacks, enable_checkpointing=True, **settings
        )
        module = Stuck(UNet(base_width=2), {"bce": {"weight": 1}}, {"name": "SGD", "lr": 0.0})
        trainer.fit(module, loader, loader, ckpt_path=saved, weights_only=False)
        return trainer.current_epoch

    return run


def test_training_ends_after_so_many_validations_without_a_lower_loss(fit):
    # 5, 4, 3, 2, 1, and three more of 1.
    assert fit(50) == 8


@pytest.mark.parametrize("first", [2, 6, 7])
def test_a_resumed_run_ends_at_the_same_epoch(fit, tmp_path, first):
    assert fit(first) == first
    assert fit(50, saved=tmp_path / "checkpoints" / "last.ckpt") == 8


def test_the_validation_after_training_does_not_count(fit, tmp_path):
    every_other = {"check_val_every_n_epoch": 2, "patience": 2}
    assert fit(50, **every_other) == 10
    assert fit(7, **every_other) == 7
    assert fit(50, saved=tmp_path / "checkpoints" / "last.ckpt", **every_other) == 10
