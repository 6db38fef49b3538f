"""What every lesion segmentation dataset shares: split, cache, loaders."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from datamodules.augmentations import Augmentation
from datamodules.cache import Sample, open_cache
from datamodules.loading import EpochSampler, SegmentationDataset
from datamodules.splits import PARTS, proportional_split, split_sha, spread
from datamodules.transforms import NORMALIZATIONS, read_image, read_mask

# Not the base class: what is listed here can be chosen as a datamodule.
__all__ = ["FileSample", "pair_files"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class FileSample:
    """An image file and its mask file."""

    id: str
    image: Path
    mask: Path

    def fingerprint(self) -> list[Any]:
        stats = [(path.name, path.stat()) for path in (self.image, self.mask)]
        return [value for name, s in stats for value in (name, s.st_size, s.st_mtime_ns)]

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        return read_image(self.image), read_mask(self.mask)


class SegmentationDataModule(L.LightningDataModule):
    """Lesion segmentation data in the batch contract of the project.

    A dataset is a subclass that says where its samples are and what the reference's split is.

    Batches are dicts of `image` float32 `(B, 3, S, S)`, `mask` float32 `(B, 1, S, S)` of {0, 1},
    `edge_distance` float32 `(B, 1, S, S)` in pixels (train and val), `id` (list of str) and `size`
    int64 `(B, 2)`, height and width of the originals.

    Args:
        cache: folder for decoded samples.
        image_size: side of the squared images in pixels.
        batch_size: samples a process and step.
        root: folder of this dataset; data that is made up has none.
        num_workers: loader processes; 0 loads in the training process.
        split: `reference` deals the samples out in sorted order in the reference's proportions,
            `random` in an order drawn from `seed`.
        seed: of shuffling, augmentation and the random split.
        augmentation: `{transforms: [...], p: ...}` as in `augmentations.Augmentation`.
        normalization: `minmax`, `reference` or `imagenet`, see `transforms.normalise`.
        antialias: whether shrinking an image low-passes it; the references' torchvision did not.
        limit_test: test on that many evenly spaced samples only.

    Raises:
        UserError: an argument is outside its range, or the data is missing or broken.
    """

    name: str
    reference_split: tuple[int, int, int]

    def __init__(
        self,
        cache: str | Path,
        image_size: int,
        batch_size: int,
        root: str | Path = ".",
        num_workers: int = 0,
        split: str = "reference",
        seed: int = 0,
        augmentation: Mapping[str, Any] | None = None,
        normalization: str = "minmax",
        antialias: bool = True,
        limit_test: int | None = None,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("limit_test", limit_test if limit_test is not None else 1, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(
                    f"datamodule.{key}={value} must be a whole number, at least {least}."
                )
        _check_choice("split", split, ("reference", "random"))
        _check_choice("normalization", normalization, NORMALIZATIONS)
        self.root = Path(root)
        self.cache_root = Path(cache)
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.split = split
        self.seed = seed
        transforms = (augmentation or {}).get("transforms") or []
        self.augmentation = Augmentation(**augmentation) if transforms else None
        self.normalization = normalization
        self.antialias = antialias
        self.limit_test = limit_test
        self.datasets: dict[str, SegmentationDataset] = {}

    @abstractmethod
    def find_samples(self) -> list[Sample]:
        """Return every sample of the dataset.

        Raises:
            UserError: the data is missing or incomplete.
        """

    def prepare_data(self) -> None:
        """Decode the data into the cache; runs in one process only."""
        # The Trainer asks again before it tests: a data folder that has gone must not end a run.
        if not self.datasets:
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Open the cache and divide the samples; runs in every process."""
        if self.datasets:
            return
        samples, self.cache = self._load()
        ids = [sample.id for sample in samples]
        order: Sequence[int] = range(len(samples))
        if self.split == "random":
            order = np.random.default_rng(self.seed).permutation(len(samples)).tolist()
        self.parts = dict(
            zip(ids, proportional_split(len(ids), self.reference_split, order), strict=True)
        )
        self.split_sha = split_sha(ids, list(self.parts.values()))
        self.datasets = {part: self._dataset(part, ids) for part in PARTS}

    def _load(self) -> tuple[list[Sample], Any]:
        samples = sorted(self.find_samples(), key=lambda sample: sample.id)
        cache = open_cache(samples, self.cache_root, self.name, self.image_size, self.antialias)
        return samples, cache

    def _dataset(self, part: str, ids: Sequence[str]) -> SegmentationDataset:
        rows = np.flatnonzero([self.parts[i] == part for i in ids])
        if part == "test":
            rows = rows[spread(len(rows), self.limit_test)]
        train = part == "train"
        return SegmentationDataset(
            self.cache,
            rows,
            [ids[row] for row in rows],
            self.normalization,
            augmentation=self.augmentation if train else None,
            seed=self.seed,
            train=train,
            with_edge_distance=part != "test",
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", seed=self.seed, shuffle=True, pad=True)

    def val_dataloader(self) -> DataLoader:
        # One random order for all runs: its beginning is the subset on which masks are sampled.
        return self._loader("val", permuted=True)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, part: str, **order: Any) -> DataLoader:
        dataset = self.datasets[part]
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        sampler = EpochSampler(len(dataset), rank=rank, world_size=world_size, **order)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # Starting to load must not draw from the generator that training may use.
            generator=torch.Generator().manual_seed(self.seed),
            persistent_workers=self.num_workers > 0,
        )


def pair_files(
    image_folder: Path, mask_folder: Path, mask_suffix: str, hint: str
) -> list[FileSample]:
    """Match the images of one folder with the masks of another by id.

    Args:
        image_folder: holds `<id>.<suffix>`.
        mask_folder: holds `<id><mask_suffix>`, such as `ISIC_0000000_segmentation.png`.
        mask_suffix: what follows the id in a mask's name.
        hint: what to do when a folder is missing, for the message.

    Raises:
        UserError: a folder is missing or has no images, or an image or a mask has no partner.
    """
    for folder in (image_folder, mask_folder):
        if not folder.is_dir():
            raise UserError(f"The folder {folder} does not exist; {hint}")
    images = {p.stem: p for p in image_folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES}
    masks = {
        p.name.removesuffix(mask_suffix): p
        for p in mask_folder.iterdir()
        if p.name.endswith(mask_suffix)
    }
    if not images:
        raise UserError(f"The folder {image_folder} has no images; {hint}")
    for what, alone, folder in (
        ("image", sorted(images.keys() - masks.keys()), mask_folder),
        ("mask", sorted(masks.keys() - images.keys()), image_folder),
    ):
        if alone:
            partner = f"{alone[0]}{mask_suffix}" if what == "image" else f"{alone[0]}.jpg"
            raise UserError(
                f"{len(alone)} {what}(s) without partner, first {alone[0]}: {folder / partner} is "
                f"missing; restore it or remove the {what}."
            )
    return [FileSample(key, images[key], masks[key]) for key in sorted(images)]


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(
            f"datamodule.{key}={value} does not exist; choose from {', '.join(choices)}."
        )
