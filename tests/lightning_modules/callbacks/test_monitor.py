"""Rate, gradients, speed and memory are in the rows of the training loss."""

import csv

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_modules import Segmentation
from lightning_modules.callbacks import MetricsFile, Monitor
from networks import UNet

KEYS = {"train/lr", "train/grad_norm", "train/images_per_second", "system/memory_gb"}
BATCH = {"image": torch.rand(2, 3, 16, 16), "mask": torch.ones(2, 1, 16, 16), "id": ["a", "b"]}


class Clocked(Monitor):
    """Notes the norm of the gradients of each step, and lets the clock run as a test wants."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.norms = []

    def on_train_batch_start(self, *args):
        super().on_train_batch_start(*args)
        self.clock[0] += 0.5

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        squares = [p.grad.square().sum() for p in pl_module.network.parameters()]
        self.norms.append(float(sum(squares)) ** 0.5)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_validation_end(self, trainer, pl_module):
        self.clock[0] += 100


@pytest.fixture
def fit(make_trainer, tmp_path, monkeypatch):
    """Trains for six batches an epoch of half a second each; returns the rows and the norms."""
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def run(every, **settings):
        monitor = Clocked(clock)
        trainer = make_trainer(
            callbacks=[monitor],
            logger=MetricsFile(tmp_path),
            log_every_n_steps=every,
            **{"max_epochs": 1, **settings},
        )
        module = Segmentation(
            UNet(base_width=2), {"bce": {"weight": 1}}, {"name": "Adam", "lr": 1e-4}
        )
        loader = DataLoader([BATCH] * 6, batch_size=None)
        trainer.fit(module, loader, DataLoader([BATCH], batch_size=None))
        with (tmp_path / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["train/loss"]]
        return rows, monitor.norms

    return run


def test_every_row_has_them(fit):
    rows, norms = fit(1)
    assert len(rows) == 6
    assert rows[0].keys() >= KEYS
    assert {row["train/lr"] for row in rows} == {"0.0001"}
    assert [float(row["train/grad_norm"]) for row in rows] == pytest.approx(norms, rel=1e-5)
    assert all(0.05 < float(row["system/memory_gb"]) < 50 for row in rows)
    assert rows[0]["train/images_per_second"] == "", "nothing can be measured yet"
    assert {row["train/images_per_second"] for row in rows[1:]} == {"4.0"}


def test_only_steps_that_are_logged_have_them(fit):
    rows, norms = fit(3)
    assert [int(row["step"]) for row in rows] == [2, 5]
    found = [float(row["train/grad_norm"]) for row in rows]
    assert found == pytest.approx([norms[2], norms[5]], rel=1e-5)
    assert [row["train/images_per_second"] for row in rows] == ["4.0", "4.0"]


def test_the_norm_is_that_before_clipping(fit):
    rows, norms = fit(1, gradient_clip_val=1e-3)
    assert float(rows[1]["train/grad_norm"]) == pytest.approx(norms[1], rel=1e-5)
    assert norms[1] > 1e-2


def test_accumulated_batches_are_one_step(fit):
    rows, norms = fit(1, accumulate_grad_batches=2)
    assert len(rows) == len(norms) == 3
    assert [float(row["train/grad_norm"]) for row in rows] == pytest.approx(norms, rel=1e-5)
    assert [row["train/images_per_second"] for row in rows] == ["", "4.0", "4.0"]


def test_the_time_of_validations_does_not_count(fit):
    rows, _ = fit(4, max_epochs=2, val_check_interval=3)
    assert [int(row["step"]) for row in rows] == [3, 7, 11]
    assert {row["train/images_per_second"] for row in rows} == {"4.0"}
