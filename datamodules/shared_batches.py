"""A loader whose processes hand over their batches in memory that is used again and again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

__all__ = ["PREFETCH", "BatchLoader", "SharedBatches", "collate"]

# Batches that a loader process prepares ahead.
PREFETCH = 2


class Place(NamedTuple):
    """Where a loader process has put a batch, and what of its samples are no tensors."""

    worker: int
    slot: int
    count: int
    rest: dict[str, list[Any]]


class SharedBatches:
    """Shared memory in which loader processes collate, each in turn in slots of its own.

    PyTorch takes fresh shared memory for every batch, and mapping its pages costs as much as
    augmenting the images. Here a slot is used again when the training process has taken its batch
    out: by then a loader process is never asked for more than `PREFETCH` batches beyond it.

    Args:
        sample: the shapes and types that the tensors of every sample have.
        batch_size: samples a batch at most.
        num_workers: loader processes.
    """

    def __init__(self, sample: Mapping[str, Any], batch_size: int, num_workers: int) -> None:
        places = (num_workers, PREFETCH + 1, batch_size)
        self.memory = {
            key: torch.empty(*places, *value.shape, dtype=value.dtype).share_memory_()
            for key, value in sample.items()
            if isinstance(value, Tensor)
        }
        self.filled = 0

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Place:
        """Put samples into the next slot; called in a loader process."""
        worker = get_worker_info().id
        slot = self.filled % (PREFETCH + 1)
        self.filled += 1
        for key, memory in self.memory.items():
            place = memory[worker, slot, : len(samples)]
            values = [sample[key] for sample in samples]
            shapes = {tuple(value.shape) for value in values}
            if shapes != {tuple(place.shape[1:])}:
                raise ValueError(f"{key} has the shapes {shapes}, not {tuple(place.shape[1:])}")
            torch.stack(values, out=place)
        others = [key for key in samples[0] if key not in self.memory]
        return Place(worker, slot, len(samples), _listed(samples, others))

    def take(self, place: Place) -> dict[str, Any]:
        """Return the batch at a place, pinned where there is a GPU; called in training."""
        copied = Tensor.pin_memory if torch.cuda.is_available() else _copy
        batch = {
            key: copied(memory[place.worker, place.slot, : place.count])
            for key, memory in self.memory.items()
        }
        return {**batch, **place.rest}


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch: tensors stacked, everything else in lists."""
    tensors = [key for key, value in samples[0].items() if isinstance(value, Tensor)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in tensors}
    return batch | _listed(samples, [key for key in samples[0] if key not in tensors])


def _listed(samples: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, list[Any]]:
    return {key: [sample[key] for sample in samples] for key in keys}


def _copy(tensor: Tensor) -> Tensor:
    # PyTorch would copy with all its threads, which wait for more work busily, in the way of the
    # loader processes.
    return torch.from_numpy(tensor.numpy().copy())


class BatchLoader(DataLoader):
    """A DataLoader that takes the batches out when its `collate_fn` is a `SharedBatches`."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = super().__iter__()
        if isinstance(self.collate_fn, SharedBatches):
            return map(self.collate_fn.take, batches)
        return batches
