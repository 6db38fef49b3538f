"""What every lesion segmentation dataset shares: split, cache, loaders."""

import signal
from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from datamodules.augmentations import Augmentation
from datamodules.cache import Sample, SampleCache, open_cache
from datamodules.loading import EpochSampler, SegmentationDataset
from datamodules.splits import PARTS, proportional_split, split_sha, spread
from datamodules.transforms import NORMALIZATIONS, read_image, read_mask

# Not the base class: what is listed here can be chosen as a datamodule.
__all__ = ["FileSample", "pair_files"]

SECONDS_AFTER_SIGTERM = 15
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
        image, mask = read_image(self.image), read_mask(self.mask)
        if mask.shape != image.shape[:2]:
            raise UserError(
                f"The image {self.image} has {image.shape[1]}x{image.shape[0]} pixels and its mask "
                f"{self.mask} has {mask.shape[1]}x{mask.shape[0]}; replace one, so that both are "
                "of one size."
            )
        return image, mask


class SegmentationDataModule(L.LightningDataModule):
    """Lesion segmentation data in the batch contract of the project.

    A dataset is a subclass that says where its samples are and what the reference's split is.

    Batches are dicts of `image` float32 `(B, 3, S, S)`, `mask` float32 `(B, 1, S, S)` of {0, 1},
    `edge_distance` float32 `(B, 1, S, S)` in pixels, `id` (list of str) and `size` int64
    `(B, 2)`, height and width of the originals.

    Args:
        cache: folder for decoded samples.
        image_size: side of the squared images in pixels.
        batch_size: samples a process and step.
        root: folder of this dataset; data that is made up has none.
        num_workers: loader processes; 0 loads in the training process.
        split: `reference` deals the samples out in sorted order in the reference's proportions,
            `random` in an order drawn from `split_seed`; a dataset may offer others.
        split_seed: of splits that are random, apart from `seed`, so that runs of other seeds, such
            as a student's teacher, have the same test images.
        seed: of shuffling and augmentation.
        augmentation: `{transforms: [...], p: ...}` as in `augmentations.Augmentation`.
        normalization: `minmax`, `reference` or `imagenet`, see `transforms.normalise`.
        antialias: whether shrinking an image low-passes it; the references' torchvision did not.
        limit_test: test on that many evenly spaced samples only.
        overfit: train, validate and test on that many evenly spaced training samples, never
            augmented: a method that works drives the loss on them to nothing.

    Raises:
        UserError: an argument is outside its range, or the data is missing or broken.
    """

    name: str
    reference_split: tuple[int, int, int]
    splits: tuple[str, ...] = ("reference", "random")

    def __init__(
        self,
        cache: str | Path,
        image_size: int,
        batch_size: int,
        root: str | Path = ".",
        num_workers: int = 0,
        split: str = "reference",
        split_seed: int = 0,
        seed: int = 0,
        augmentation: Mapping[str, Any] | None = None,
        normalization: str = "minmax",
        antialias: bool = True,
        limit_test: int | None = None,
        overfit: int | None = None,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("split_seed", split_seed, 0),
            ("limit_test", 1 if limit_test is None else limit_test, 1),
            ("overfit", 1 if overfit is None else overfit, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(
                    f"datamodule.{key}={value} must be a whole number, at least {least}."
                )
        _check_choice("split", split, self.splits)
        _check_choice("normalization", normalization, NORMALIZATIONS)
        self.root = Path(root)
        self.cache_root = Path(cache)
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.split = split
        self.split_seed = split_seed
        self.seed = seed
        transforms = (augmentation or {}).get("transforms") or []
        self.augmentation = Augmentation(**augmentation) if transforms else None
        self.normalization = normalization
        self.antialias = antialias
        self.limit_test = limit_test
        self.overfit = overfit
        self.datasets: dict[str, SegmentationDataset] = {}

    @abstractmethod
    def find_samples(self) -> list[Sample]:
        """Return every sample of the dataset.

        Raises:
            UserError: the data is missing or incomplete.
        """

    def divide(self, ids: Sequence[str]) -> list[str]:
        """Return the part of each sample, by the split asked for.

        Args:
            ids: of all samples, sorted.

        Raises:
            UserError: a part would be empty.
        """
        order: Sequence[int] = range(len(ids))
        if self.split == "random":
            order = np.random.default_rng(self.split_seed).permutation(len(ids)).tolist()
        return proportional_split(len(ids), self.reference_split, order)

    def prepare_data(self) -> None:
        """Decode the data into the cache; runs in one process only."""
        # The Trainer asks again before it tests: a data folder that has gone must not end a run.
        if not self.datasets:
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Open the cache and divide the samples; runs in every process."""
        if self.datasets:
            return
        self.parts, self.cache = self._load()
        self.split_sha = split_sha(list(self.parts), list(self.parts.values()))
        rows = {p: np.flatnonzero([part == p for part in self.parts.values()]) for p in PARTS}
        if self.overfit is None:
            rows["test"] = rows["test"][spread(len(rows["test"]), self.limit_test)]
            self.datasets = {part: self._dataset(rows[part], part == "train") for part in PARTS}
        else:
            chosen = rows["train"][spread(len(rows["train"]), self.overfit)]
            self.datasets = dict.fromkeys(PARTS, self._dataset(chosen, train=True))

    def _load(self) -> tuple[dict[str, str], SampleCache]:
        samples = sorted(self.find_samples(), key=lambda sample: sample.id)
        ids = [sample.id for sample in samples]
        # Before the caching, which takes long: a split that is not possible is known now.
        parts = dict(zip(ids, self.divide(ids), strict=True))
        cache = open_cache(samples, self.cache_root, self.name, self.image_size, self.antialias)
        return parts, cache

    def _dataset(self, rows: np.ndarray, train: bool) -> SegmentationDataset:
        ids = list(self.parts)
        augmented = train and self.overfit is None
        return SegmentationDataset(
            self.cache,
            rows,
            [ids[row] for row in rows],
            self.normalization,
            augmentation=self.augmentation if augmented else None,
            seed=self.seed,
            train=train,
        )

    def train_dataloader(self) -> DataLoader:
        loader = self._loader("train", seed=self.seed, shuffle=True, pad=True)
        if self.trainer is not None:
            # Loader processes start to read before the Trainer has told the sampler the epoch, and
            # a run that goes on within an epoch has seen its first batches.
            loop = self.trainer.fit_loop
            loader.sampler.set_epoch(loop.epoch_progress.current.processed)
            batches = loop.epoch_loop.batch_progress
            if loop.restarting and not batches.is_last_batch:
                loader.sampler.start = batches.current.ready * self.batch_size
        return loader

    def val_dataloader(self) -> DataLoader:
        # One random order for all runs: its beginning is the subset on which masks are sampled.
        return self._loader("val", permuted=True)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def check_processes(self, count: int) -> None:
        """Refuse a part with fewer images than processes, of which one would wait for ever.

        Training repeats images instead.

        Raises:
            UserError: validation or test has too few images.
        """
        for part in ("val", "test"):
            if len(self.datasets[part]) < count:
                raise UserError(
                    f"The {part} part has {len(self.datasets[part])} image(s) for {count} "
                    "processes, and one without images would keep the others waiting; use fewer "
                    "trainer.devices."
                )

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
            worker_init_fn=_outlive_signals,
        )


def _outlive_signals(worker: int) -> None:
    """Keep a loader process alive for a while when a signal reaches every process of a run.

    The run ends after the step under way, for which it may need the batch that is being loaded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))


def pair_files(
    image_folders: Sequence[Path], mask_folder: Path, mask_suffix: str, hint: str
) -> list[FileSample]:
    """Match the images of one or several folders with the masks of another by id.

    Args:
        image_folders: hold `<id>.<suffix>`; one of several may be missing.
        mask_folder: holds `<id><mask_suffix>`, such as `ISIC_0000000_segmentation.png`.
        mask_suffix: what follows the id in a mask's name.
        hint: what to do when a folder is missing, for the message.

    Raises:
        UserError: a folder is missing, there are no images, two images have one id, or an image or
            a mask has no partner.
    """
    present = [folder for folder in image_folders if folder.is_dir()]
    for folder in (*(present or image_folders[:1]), mask_folder):
        if not folder.is_dir():
            raise UserError(f"The folder {folder} does not exist; {hint}")
    images = _images_by_id(present)
    if not images:
        raise UserError(f"The folder {' or '.join(map(str, present))} has no images; {hint}")
    masks = {
        path.name.removesuffix(mask_suffix): path
        for path in _files(mask_folder)
        if path.name.endswith(mask_suffix)
    }
    _refuse_unpaired("image", images.keys() - masks.keys(), [mask_folder], mask_suffix)
    _refuse_unpaired("mask", masks.keys() - images.keys(), image_folders, ".jpg")
    return [FileSample(key, images[key], masks[key]) for key in sorted(images)]


def _files(folder: Path) -> list[Path]:
    # Hidden files are what other systems leave behind, such as `._ISIC_0000000.jpg`.
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _images_by_id(folders: Sequence[Path]) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for path in (path for folder in folders for path in _files(folder)):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            first = images.setdefault(path.stem, path)
            if first != path:
                raise UserError(
                    f"Two images have the id {path.stem}: {first} and {path}; remove one of them."
                )
    return images


def _refuse_unpaired(what: str, ids: Set[str], folders: Sequence[Path], suffix: str) -> None:
    if ids:
        first = min(ids)
        partners = " or ".join(str(folder / f"{first}{suffix}") for folder in folders)
        raise UserError(
            f"{len(ids)} {what}(s) without partner, first {first}: {partners} is missing; restore "
            f"it or remove the {what}."
        )


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(
            f"datamodule.{key}={value} does not exist; choose from {', '.join(choices)}."
        )
