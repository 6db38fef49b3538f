"""Datasets over a sample cache, and samplers whose samples depend on no worker or process."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from datamodules.augmentations import Augmentation
from datamodules.cache import Sample, SampleCache
from datamodules.transforms import normalise, stretch_to_uint8

__all__ = ["CachedDataset", "EpochSampler", "sample_seed"]


class CachedDataset(Dataset, ABC):
    """Samples of one part of a split, as the batch contract wants them.

    Items are asked for by `(epoch, index)`, as `EpochSampler` yields them, so that augmentation is
    seeded by `(seed, epoch, index)` and by nothing else.

    Args:
        cache: the decoded samples.
        rows: which rows of the cache belong to this part.
        samples: what each of them is.
        normalization: as in `transforms.normalise`.
        augmentation: applied to image and mask, or none.
        seed: of the augmentation.
        train: whether this is the training part.
    """

    def __init__(
        self,
        cache: SampleCache,
        rows: Sequence[int],
        samples: Sequence[Sample],
        normalization: str,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        train: bool = False,
    ) -> None:
        self.cache = cache
        self.indices = np.asarray(rows)
        self.ids = [sample.id for sample in samples]
        self.normalization = normalization
        self.augmentation = augmentation
        self.seed = seed
        self.train = train

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | str]:
        epoch, index = key
        row = self.indices[index]
        image = np.array(self.cache.images[row])
        if self.train and self.normalization == "reference":
            image = stretch_to_uint8(image)
        return {
            **self.content(image, row, index, sample_seed(self.seed, epoch, index)),
            "id": self.ids[index],
            "size": torch.from_numpy(self.cache.sizes[row]),
        }

    def plain(self, index: int) -> dict[str, Tensor | str]:
        """Return an item as it is without augmentation."""
        bare = copy.copy(self)
        bare.augmentation = None
        return bare[0, index]

    @abstractmethod
    def content(self, image: np.ndarray, row: int, index: int, seed: int) -> dict[str, Tensor]:
        """Return what a kind of task makes of an image, by the keys of a batch.

        Args:
            image: RGB uint8, before augmentation.
            row, index: its place in the cache and in this part.
            seed: of all that is random.
        """

    def normalised(self, image: np.ndarray) -> Tensor:
        """Return the network's input, float32 `(3, H, W)`."""
        return normalise(image, self.normalization, self.train)


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)`, dealt out to the processes of a distributed run.

    Args:
        length: size of the dataset.
        seed: of the order.
        shuffle: a new order every epoch; otherwise always the same.
        permuted: where not shuffling, a fixed random order in place of the dataset's own.
        pad: give every process equally many by repeating a few, which training needs and
            evaluation must not have.
        batch_size: where padding, one more is repeated if the last batch of this size would
            otherwise be a single sample, of whose 1 x 1 maps BatchNorm can take no statistics.
        rank, world_size: this process, and how many there are.
        start: leave out that many of this process's samples in the first epoch that is iterated,
            for a run that goes on in the middle of one; the length stays that of a whole epoch.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        shuffle: bool = False,
        permuted: bool = False,
        pad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        batch_size: int = 1,
    ) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.permuted = permuted
        self.pad = pad
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each training epoch."""
        self.epoch = epoch

    def _order(self) -> np.ndarray:
        epoch = self.epoch if self.shuffle else 0
        if self.shuffle or self.permuted:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        else:
            order = np.arange(self.length)
        if self.pad:
            each = -(-self.length // self.world_size)
            if self.batch_size > 1 and each % self.batch_size == 1:
                each += 1
            order = np.resize(order, each * self.world_size)
        return order[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch if self.shuffle else 0
        order = self._order()[self.start :]
        self.start = 0
        return iter([(epoch, int(index)) for index in order])

    def __len__(self) -> int:
        return len(self._order())


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return a 31-bit seed that depends on all three numbers."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0] >> 1)
