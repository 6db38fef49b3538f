"""Of two equally good validations the first counts, or the later one as in the D-KD repository."""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from lightning_modules.callbacks import BestCheckpoint, EarlyStop

PATIENCE = 3
LOSSES = (3, 1, 2, 1, 2, 2, 1, 2, 2, 2, 1, 2, 2, 2)


class Scripted(L.LightningModule):
    """Logs given validation scores."""

    def __init__(self, scores):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.scores = iter(scores)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/score", float(next(self.scores)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def expect(losses, ties):
    """Return the best and the last epoch, from 0, in a loop like the reference's."""
    best, best_epoch, stale = float("inf"), None, 0
    for epoch, loss in enumerate(losses):
        if loss < best or (ties == "later" and loss == best):
            best, best_epoch, stale = loss, epoch, 0
        else:
            stale += 1
        if stale == PATIENCE:
            break
    return best_epoch, epoch


@pytest.mark.parametrize(
    ("ties", "losses", "expected"),
    [
        ("first", LOSSES, (1, 4)),
        ("later", LOSSES, (6, 9)),
        ("first", (1, 1, 1, 1, 1), (0, 3)),
        ("later", (1, 1, 1, 1, 1), (4, 4)),
        ("later", (4, 3, 2, 2, 1), (4, 4)),
    ],
)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_ties_choose_checkpoint_and_end(make_trainer, tmp_path, ties, losses, expected, mode):
    assert expect(losses, ties) == expected
    sign = 1 if mode == "min" else -1
    monitored = {"monitor": "val/score", "mode": mode, "ties": ties}
    best = BestCheckpoint(dirpath=tmp_path, filename="{epoch}", **monitored)
    stop = EarlyStop(patience=PATIENCE, **monitored)
    trainer = make_trainer(
        callbacks=[stop, best], max_epochs=len(losses), enable_checkpointing=True
    )
    loader = DataLoader(torch.zeros(1, 1))
    trainer.fit(Scripted([sign * loss for loss in losses]), loader, loader)
    assert Path(best.best_model_path).name == f"epoch={expected[0]}.ckpt"
    assert best.best_model_score == sign * min(losses)
    assert trainer.current_epoch - 1 == expected[1]
    assert [path.name for path in tmp_path.iterdir()] == [f"epoch={expected[0]}.ckpt"]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_still_end_training(make_trainer, score):
    stop = EarlyStop("val/score", ties="later")
    trainer = make_trainer(callbacks=[stop], max_epochs=3)
    loader = DataLoader(torch.zeros(1, 1))
    trainer.fit(Scripted([score] * 3), loader, loader)
    assert trainer.current_epoch == 1


@pytest.mark.parametrize(
    ("build", "key"), [(BestCheckpoint, "best"), (EarlyStop, "early_stopping")]
)
def test_unknown_ties_are_refused(build, key):
    with pytest.raises(UserError, match=f"callbacks.{key}.ties=last .*first, later"):
        build(ties="last")
