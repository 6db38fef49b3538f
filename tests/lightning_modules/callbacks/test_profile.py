"""The dearest operations of a few training steps, as a table and as a trace."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_modules import Segmentation
from lightning_modules.callbacks import EMA, Monitor, NonFinite, Profile
from networks import UNet

BATCH = {"image": torch.rand(2, 3, 16, 16), "mask": torch.ones(2, 1, 16, 16), "id": ["a", "b"]}


@pytest.fixture
def profiled(make_trainer, tmp_path):
    """Trains for some batches; returns the names of what the trace holds and the table."""

    def run(batches=6, **settings):
        profile = Profile(tmp_path, skip=2, steps=2)
        callbacks = [EMA(), profile, Monitor(), NonFinite()]
        trainer = make_trainer(callbacks=callbacks, max_epochs=1, log_every_n_steps=1, **settings)
        module = Segmentation(
            UNet(base_width=2), {"bce": {"weight": 1}}, {"name": "Adam", "lr": 1e-3}
        )
        trainer.fit(module, DataLoader([BATCH] * batches, batch_size=None))
        trace = json.loads((tmp_path / "profile/trace.json").read_text())
        names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
        return names, (tmp_path / "profile/operations.txt").read_text()

    return run


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 2), (2, 1)])
def test_the_asked_batches_are_profiled_with_their_steps(profiled, capsys, accumulate, steps):
    names, table = profiled(accumulate_grad_batches=accumulate)
    assert names.count("aten::binary_cross_entropy_with_logits") == 2
    assert sum("Optimizer.step" in name for name in names) == steps
    assert "aten::convolution_backward" in names
    rows = [line for line in table.splitlines() if "%" in line and "Self CPU %" not in line]
    assert len(rows) == 10
    assert table.splitlines()[-1] in capsys.readouterr().out, "it is printed too"


def test_a_short_run_leaves_nothing(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[Profile(tmp_path)], max_epochs=1)
    module = Segmentation(UNet(base_width=2), {"bce": {"weight": 1}}, {"name": "Adam", "lr": 1e-3})
    trainer.fit(module, DataLoader([BATCH] * 2, batch_size=None))
    assert not list(tmp_path.iterdir())
