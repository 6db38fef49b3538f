"""The rate falls at the given epochs, in a resumed run too."""

import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from lightning_modules import Segmentation
from lightning_modules.callbacks import Steps
from networks import UNet

SGD = {"name": "SGD", "lr": 0.5}


class Noted(Steps):
    """Notes the rate of each epoch."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.rates = []

    def on_train_batch_end(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.fixture
def fit(make_trainer):
    """Trains for some epochs of one batch; returns the rate of each epoch."""
    batch = {
        "image": torch.rand(2, 3, 16, 16),
        "mask": torch.ones(2, 1, 16, 16),
        "id": ["a", "b"],
    }

    def run(epochs, path=None, saved=None):
        noted = Noted([4, 2], 0.1)
        trainer = make_trainer(max_epochs=epochs, callbacks=[noted])
        module = Segmentation(UNet(base_width=2), {"bce": {"weight": 1}}, SGD)
        trainer.fit(module, DataLoader([batch], batch_size=None), ckpt_path=saved)
        if path:
            trainer.save_checkpoint(path)
        return noted.rates

    return run


def test_the_rate_falls_at_the_milestones(fit):
    assert fit(6) == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


def test_a_resumed_run_has_the_rate_of_its_epoch(fit, tmp_path):
    assert fit(3, tmp_path / "half.ckpt") == pytest.approx([0.5, 0.5, 0.05])
    assert fit(6, saved=tmp_path / "half.ckpt") == pytest.approx([0.05, 0.005, 0.005])


def test_arguments_are_checked():
    with pytest.raises(UserError, match=r"callbacks.steps.factor=1 must lie between 0 and 1"):
        Steps([1], factor=1)
    with pytest.raises(UserError, match=r"callbacks.steps.milestones=\[-1\] must be epochs"):
        Steps([-1])
