"""What the global generators draw goes on where the checkpoint was written."""

import random

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules.callbacks import RandomState


class Drawing(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.draws = []

    def training_step(self, batch, batch_idx):
        self.draws.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def draw(make_trainer, folder, epochs, start=None):
    L.seed_everything(3, verbose=False)
    module = Drawing()
    checkpoint = ModelCheckpoint(folder, "last", enable_version_counter=False)
    callbacks = [RandomState(), checkpoint]
    trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
    loader = torch.utils.data.DataLoader(torch.zeros(2, 1), generator=torch.Generator())
    trainer.fit(module, loader, ckpt_path=start, weights_only=True)
    return module.draws


def test_draws_go_on(make_trainer, tmp_path):
    straight = draw(make_trainer, tmp_path / "straight", 3)
    first = draw(make_trainer, tmp_path / "stopped", 1)
    rest = draw(make_trainer, tmp_path / "stopped", 3, tmp_path / "stopped" / "last.ckpt")
    assert len(set(straight)) == 6
    assert first + rest == straight


def test_the_state_is_plain(make_trainer, tmp_path):
    draw(make_trainer, tmp_path, 1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = checkpoint["random_state"]
    assert state.keys() == {"python", "numpy", "torch", "cuda"}
