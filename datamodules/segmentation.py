"""What every lesion segmentation dataset shares: masks and their edges."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from datamodules.base import CachedDataModule
from datamodules.edges import EDGES
from datamodules.files import FileSample, Listing, pair_files
from datamodules.loading import CachedDataset

# Not the base class: what is listed here can be chosen as a datamodule.
__all__: list[str] = []


class SegmentationDataset(CachedDataset):
    """Images with their masks, or without where a part has none.

    Args:
        edges: as in `SegmentationDataModule`.
        args, samples, settings: everything that `CachedDataset` takes.

    Attributes:
        native: also give each mask at its own size, as `native_mask`, uint8 `(H, W)` of {0, 1}.
        teacher_maps: a teacher's probabilities for each sample in order, uint8 `(N, S, S)` from 0
            to 255. Where set, they are given as `teacher_probability`, float32 `(1, S, S)` in
            [0, 1], augmented with the image.
    """

    def __init__(
        self, *args: Any, samples: Sequence[FileSample], edges: str = "border", **settings: Any
    ) -> None:
        super().__init__(*args, samples=samples, **settings)
        self.edge_distance = EDGES[edges]
        self.samples = samples
        self.labelled = all(sample.labelled for sample in samples)
        self.native = False
        self.teacher_maps: np.ndarray | None = None

    def content(self, image: np.ndarray, row: int, index: int, seed: int) -> dict[str, Tensor]:
        if not self.labelled:
            return {"image": self.normalised(image)}
        maps = np.array(self.cache.masks[row])
        if self.teacher_maps is not None:
            maps = np.stack((maps, self.teacher_maps[index]), axis=-1)
        if self.augmentation is not None:
            image, maps = self.augmentation(image, maps, seed)
        channels = np.ascontiguousarray(np.atleast_3d(maps).transpose(2, 0, 1))
        mask, taught = torch.from_numpy(channels).float().tensor_split([1])
        if self.cache.soft:
            mask = mask / 255
        # An array and no tensor: the masks of a batch have different sizes.
        native = {"native_mask": self.samples[index].load()[1]} if self.native else {}
        return {
            "image": self.normalised(image),
            "mask": mask,
            "edge_distance": self.edge_distance(mask),
            **({"teacher_probability": taught / 255} if len(taught) else {}),
            **native,
        }


class SegmentationDataModule(CachedDataModule):
    """Lesion segmentation data in the batch contract of the project.

    Batches are dicts of `image` float32 `(B, 3, S, S)`, `mask` float32 `(B, 1, S, S)` of {0, 1},
    or with `mask_resize=soft` in [0, 1], `edge_distance` float32 `(B, 1, S, S)` in pixels, `id`
    (list of str) and `size` int64 `(B, 2)`, height and width of the originals. A test part that is
    published without masks has neither `mask` nor `edge_distance`: it can be predicted, not tested.
    """

    dataset_class: ClassVar = SegmentationDataset

    @property
    def mask_fingerprint(self) -> str:
        # Splits of runs from before there was a choice have no such part.
        settings = [] if self.mask_resize == "published" else [self.mask_resize]
        if self.mask_threshold is not None:
            settings.append(f"threshold {self.mask_threshold}")
        return " ".join(settings)

    def dataset_settings(self) -> dict[str, Any]:
        return {**super().dataset_settings(), "edges": self.edges}

    def list_published(
        self, folders: Sequence[tuple[str, str, str]], mask_suffix: str = "_segmentation"
    ) -> Listing:
        """Return the pairs of a challenge's folders.

        Args:
            folders: part, folder of images and folder of masks, of which all but the first may be
                missing.
            mask_suffix: as in `pair_files`.
        """
        listing = Listing()
        for part, images, masks in folders:
            folder = self.root / images
            if folder.is_dir() or not listing.samples:
                listing += pair_files([folder], self.root / masks, mask_suffix, self.hint, part)
        return listing

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self._refuse_blank_masks()

    def _refuse_blank_masks(self) -> None:
        """Refuse masks that are all empty or all full, in the whole set or in its training part.

        Raises:
            UserError: they are.
        """
        if not any(dataset.labelled for dataset in self.datasets.values()):
            return
        rows = range(len(self.parts))
        train = [
            row for row, part in zip(rows, self.parts.values(), strict=True) if part == "train"
        ]
        for what, chosen in (("dataset", rows), ("train part", train)):
            # The first mask with a lesion, and the first with skin, end the search.
            if chosen and not any(self.cache.masks[row].any() for row in chosen):
                raise UserError(
                    f"All {len(chosen)} masks of the {what} {self.name} in {self.root} are empty "
                    f"at {self.image_size} px; save 0 for skin and 255 for lesion as colours, not "
                    "in the alpha channel, or raise datamodule.image_size."
                )
            if len(chosen) > 1 and all(self.cache.masks[row].all() for row in chosen):
                raise UserError(
                    f"All {len(chosen)} masks of the {what} {self.name} in {self.root} are full; "
                    "save 0 for skin and 255 for lesion, or choose another "
                    "datamodule.mask_threshold."
                )

    def test_at_native_size(self) -> None:
        """Have the test batches carry `native_mask` too, a list of uint8 `(H, W)` of {0, 1}."""
        self.datasets["test"].native = True

    @property
    def testable(self) -> bool:
        """Whether the test part has masks."""
        return self.datasets["test"].labelled

    def check_testable(self) -> None:
        """Refuse a test without masks.

        Raises:
            UserError: the test part has none.
        """
        if not self.testable:
            raise UserError(
                f"The test part of {self.name} has no masks, so it can be predicted but not "
                "tested; choose another datamodule.split, which divides the images that have some."
            )
