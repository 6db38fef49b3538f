"""What every diagnosis dataset shares: classes, their weights, and rotated views."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from datamodules.base import CachedDataModule
from datamodules.cache import Sample
from datamodules.files import FileSample
from datamodules.loading import CachedDataset, sample_seed
from datamodules.splits import stratified_grouped_split

# Not the base class: what is listed here can be chosen as a datamodule.
__all__: list[str] = []


class ClassificationDataset(CachedDataset):
    """Images with their class.

    Args:
        views: also give the image in four rotations.
        metadata: numbers that go with each image, by its id; `None` for images alone.
        settings: everything that `CachedDataset` takes.
    """

    def __init__(
        self,
        *args: Any,
        samples: Sequence[FileSample],
        views: bool = False,
        metadata: Mapping[str, Sequence[float]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, samples=samples, **settings)
        self.labels = np.array([sample.label for sample in samples], dtype=np.int64)
        self.views = views
        self.metadata = None
        if metadata is not None:
            self.metadata = np.array([metadata[key] for key in self.ids], dtype=np.float32)

    def content(self, image: np.ndarray, row: int, index: int, seed: int) -> dict[str, Tensor]:
        known = {"label": torch.tensor(self.labels[index])}
        if self.metadata is not None:
            known["metadata"] = torch.from_numpy(self.metadata[index].copy())
        if not self.views:
            return {"image": self._prepared(image, seed), **known}
        if (
            self.train
            and self.augmentation is not None
            and np.random.default_rng(seed).random() < 0.5
        ):
            image = image[:, ::-1]
        views = torch.stack(
            [self._prepared(np.rot90(image, turn), sample_seed(seed, turn, 0)) for turn in range(4)]
        )
        return {"image": views[0], "views": views, **known}

    def _prepared(self, image: np.ndarray, seed: int) -> Tensor:
        if self.augmentation is not None:
            image, _ = self.augmentation(np.ascontiguousarray(image), None, seed)
        return self.normalised(image)


class ClassificationDataModule(CachedDataModule):
    """Diagnosis data in the batch contract of the project.

    Batches are dicts of `image` float32 `(B, 3, S, S)`, `label` int64 `(B,)`, `id` (list of str),
    `size` int64 `(B, 2)`, and with `views` also `views` float32 `(B, 4, 3, S, S)`: the image turned
    by 0, 90, 180 and 270 degrees counter-clockwise, each augmented by itself; in training the image
    is first mirrored half of the time. `image` is then the first of them. Photographs are resized
    to `image_size` before they are turned; the SSD-KD repository turns before it resizes, so views
    of 90, 180 and 270 degrees can differ from its own by a grey level. Where a dataset gives them,
    `metadata` float32 `(B, M)` are `metadata_columns` of the patient and the lesion's place.

    Args:
        views: for the methods that learn from rotations.
        arguments, settings: everything that `CachedDataModule` takes.
    """

    # In the order of their labels.
    classes: tuple[str, ...]
    # Names of the numbers that batches can have in `metadata`, and of those that they have.
    available_metadata: tuple[str, ...] = ()
    metadata_columns: tuple[str, ...] = ()
    dataset_class: ClassVar = ClassificationDataset
    testable = True

    def check_testable(self) -> None:
        """Do nothing: every image has a class."""

    def __init__(self, *arguments: Any, views: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.mask_resize = "area"  # There are none, and no other cache is needed.
        self.views = views

    @property
    def class_weights(self) -> list[float]:
        """Training images for each one of a class, to three places; 0 for a class without."""
        labels = self.datasets["train"].labels
        counts = np.bincount(labels, minlength=len(self.classes))
        return [round(len(labels) / int(count), 3) if count else 0.0 for count in counts]

    def grouped_parts(self, samples: Sequence[Sample]) -> list[str]:
        groups = [sample.group for sample in samples]
        labels = [sample.label for sample in samples]
        return stratified_grouped_split(groups, labels, self.reference_split, self.split_seed)

    def dataset_settings(self) -> dict[str, Any]:
        return {"views": self.views}
