"""Means over images, not over batches or processes."""

import torch

from lightning_modules.metrics import LossMeans


def test_batches_count_by_their_images():
    means = LossMeans(["loss", "l2"])
    means.update({"l2": torch.tensor(1.0), "loss": torch.tensor(2.0)}, 4)
    means.update({"l2": torch.tensor(6.0), "loss": torch.tensor(12.0)}, 1)
    assert means.compute() == {"loss": 4.0, "l2": 2.0}
    means.reset()
    assert means.compute() == {"loss": 0.0, "l2": 0.0}


def test_processes_count_by_their_images():
    parts = [LossMeans(["loss"]) for _ in range(2)]
    for part, (loss, images) in zip(parts, [(1.0, 6), (4.5, 5)], strict=True):
        part.update({"loss": torch.tensor(loss)}, images)
    parts[0].totals += parts[1].totals
    parts[0].images += parts[1].images
    torch.testing.assert_close(parts[0].compute()["loss"], torch.tensor((6 + 22.5) / 11))
    reductions = LossMeans(["loss"])._reductions
    assert {function.__name__ for function in reductions.values()} == {"dim_zero_sum"}
