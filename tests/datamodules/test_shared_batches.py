"""Batches come through shared memory as they were made, and stay so."""

import time

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.shared_batches import PREFETCH, BatchLoader, SharedBatches


class Numbers(Dataset):
    """Samples that carry their index everywhere; with `odd`, one that has another shape."""

    def __init__(self, length, odd=None):
        self.length = length
        self.odd = odd

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        shape = (3, 8, 8) if index != self.odd else (1, 8, 8)
        return {
            "image": torch.full(shape, float(index)),
            "id": f"sample{index}",
            "label": torch.tensor(index),
        }


def loader(dataset, num_workers=2, **settings):
    return BatchLoader(
        dataset,
        batch_size=4,
        num_workers=num_workers,
        collate_fn=SharedBatches(dataset[0], 4, num_workers),
        prefetch_factor=PREFETCH,
        **settings,
    )


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_are_those_of_a_plain_loader_and_are_never_overwritten(num_workers):
    dataset = Numbers(50)
    plain = list(BatchLoader(dataset, batch_size=4))
    shared = loader(dataset, num_workers, persistent_workers=True)
    # Two epochs, with time for the loader processes to run ahead as far as they can.
    for epoch in range(2):
        batches = []
        for batch in shared:
            batches.append(batch)
            time.sleep(0.01 * epoch)
        assert len(batches) == len(plain) == 13
        for got, expected in zip(batches, plain, strict=True):
            assert got.keys() == expected.keys()
            assert got["id"] == expected["id"]
            assert got["label"].dtype == torch.int64
            assert torch.equal(got["label"], expected["label"])
            assert torch.equal(got["image"], expected["image"])


def test_an_epoch_that_is_broken_off_leaves_nothing_in_the_next():
    shared = loader(Numbers(50), persistent_workers=True)
    for stop in (1, 3, 4):
        for seen, batch in enumerate(shared):
            assert batch["label"].tolist() == list(range(4 * seen, 4 * seen + 4))
            if seen == stop:
                break
    labels = [label for batch in shared for label in batch["label"].tolist()]
    assert labels == list(range(50))


def test_a_sample_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"image has the shapes .*\(1, 8, 8\).* not \(3, 8, 8\)"):
        list(loader(Numbers(20, odd=9)))
