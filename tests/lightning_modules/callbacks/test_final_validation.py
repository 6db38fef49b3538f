"""Training never ends without a validation of its last step."""

import lightning as L
import pytest
import torch

from lightning_modules.callbacks import FinalValidation, LastCheckpoint


class Counting(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.validated_at = []

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.validated_at.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, [8, 12]),
        ({"max_epochs": 2, "check_val_every_n_epoch": 2}, [8]),
        ({"max_steps": 6, "check_val_every_n_epoch": 1}, [4, 6]),
        ({"max_epochs": 2, "check_val_every_n_epoch": 5}, [8]),
        ({"max_epochs": 1, "limit_val_batches": 0}, []),
    ],
)
def test_last_step_is_validated_once(make_trainer, limits, expected):
    module = Counting()
    trainer = make_trainer(callbacks=[FinalValidation()], **limits)
    data = torch.utils.data.DataLoader(torch.zeros(4, 1))
    trainer.fit(module, data, torch.utils.data.DataLoader(torch.zeros(1, 1)))
    assert module.validated_at == expected


def test_a_resumed_run_with_nothing_left_to_train_validates_all_images(make_trainer, tmp_path):
    data = torch.utils.data.DataLoader(torch.zeros(4, 1))
    images = torch.utils.data.DataLoader(torch.zeros(5, 1))

    def fit(saved=None, **limits):
        module = Counting()
        trainer = make_trainer(
            callbacks=[FinalValidation(), LastCheckpoint(tmp_path)],
            enable_checkpointing=True,
            **limits,
        )
        trainer.fit(module, data, images, ckpt_path=saved, weights_only=False)
        return module.validated_at

    # Within the second epoch, after the validation of the first.
    assert fit(max_steps=6) == [4] * 5 + [6] * 5
    assert fit(tmp_path / "checkpoints" / "last.ckpt", max_epochs=1) == [6] * 5
