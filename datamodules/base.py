"""What every dataset shares: split, cache, loaders."""

import signal
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from common.errors import WARNINGS, UserError, check_choice
from datamodules.augmentations import Augmentation
from datamodules.cache import Sample, SampleCache, open_cache
from datamodules.decoding import EXIF
from datamodules.downloads import Download
from datamodules.edges import EDGES
from datamodules.files import Listing
from datamodules.identity import photograph_digest
from datamodules.loading import CachedDataset, EpochSampler
from datamodules.shared_batches import PREFETCH, BatchLoader, SharedBatches, collate
from datamodules.splits import (
    PARTS,
    fold_split,
    grouped_split,
    official_split,
    proportional_split,
    read_split,
    refuse_leaks,
    split_sha,
    spread,
)
from datamodules.transforms import ANTIALIAS, MASK_RESIZE, NORMALIZATIONS

# Not the base class: what is listed here can be chosen as a datamodule.
__all__: list[str] = []

SECONDS_AFTER_SIGTERM = 15
# The split of every dataset that only tests.
ALL = "all"


class CachedDataModule(L.LightningDataModule):
    """Images that are decoded once, divided into train, val and test.

    A kind of task, such as segmentation, is a subclass that says what a sample is; a dataset is a
    subclass of that, which says where its files are and how the references divide them.

    Args:
        cache: folder for decoded samples.
        image_size: side of the squared images in pixels.
        batch_size: samples a process and step.
        root: folder of this dataset; data that is made up has none.
        num_workers: loader processes; 0 loads in the training process.
        split: `reference` deals the samples out in sorted order in the reference's proportions,
            `random` in an order drawn from `split_seed`; `official` takes the publisher's folders,
            `lesion_grouped` keeps images of a lesion together. A dataset offers some of these.
            With `all`, every image is in the test part and none is left to train on.
        split_file: a CSV with the columns `id` and `split` in place of `split`.
        split_seed: of splits that are random, apart from `seed`, so that runs of other seeds, such
            as a student's teacher, have the same test images.
        allow_leak: accept a split that has images of one lesion in two parts, as some papers have.
        seed: of shuffling and augmentation.
        augmentation: `{transforms: [...], p: ...}` as in `augmentations.Augmentation`.
        normalization: `minmax`, `reference` or `imagenet`, see `transforms.normalise`.
        antialias: whether shrinking an image low-passes it; the references' torchvision did not.
            `pillow` has Pillow do it.
        letterbox: keep an image's proportions in the square; otherwise it is squashed.
        mask_resize: how masks are shrunk, where there are masks: `area`, `soft`, `published` or
            `pillow`, see `transforms.resize_mask`.
        edges: where `edge_distance` is measured from: `border`, see `edges.border_distance`, or
            `canny` as published, see `edges.edge_distance`.
        exif: `apply` turns images and masks upright by their EXIF orientation, `ignore` keeps the
            stored pixels; null applies it and refuses images whose masks may not follow it.
        mask_threshold: in (0, 1); reads masks with grey edges, see `decoding.read_mask`. Null
            refuses them.
        limit_test: test on that many evenly spaced samples only.
        overfit: train, validate and test on that many evenly spaced training samples, never
            augmented: a method that works drives the loss on them to nothing.
        folds: divide all labelled images into that many folds for a cross-validation, whatever
            `split` is; groups stay together and classes are in the same proportions.
        fold: the fold that is tested, from 0; validation is drawn from the others.

    Raises:
        UserError: an argument is outside its range, or the data is missing or broken.
    """

    name: str
    # Sizes of train, val and test in the reference; other numbers of images in these proportions.
    reference_split: tuple[int, int, int]
    splits: tuple[str, ...] = ("reference", "random")
    # Where the images come from, for messages.
    source: str = ""
    # What the publisher hands out without a login.
    downloads: tuple[Download, ...] = ()
    # Where a sample's group is written, for messages.
    group_source: str = ""
    dataset_class: ClassVar[type[CachedDataset]]

    def __init__(
        self,
        cache: str | Path,
        image_size: int,
        batch_size: int,
        root: str | Path | None = None,
        num_workers: int = 0,
        split: str | None = None,
        split_file: str | Path | None = None,
        split_seed: int = 0,
        allow_leak: bool = False,
        seed: int = 0,
        augmentation: Mapping[str, Any] | None = None,
        normalization: str = "minmax",
        antialias: bool | str = True,
        letterbox: bool = False,
        mask_resize: str = "area",
        edges: str = "border",
        exif: str | None = None,
        mask_threshold: float | None = None,
        limit_test: int | None = None,
        overfit: int | None = None,
        folds: int | None = None,
        fold: int | None = None,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("split_seed", split_seed, 0),
            ("limit_test", 1 if limit_test is None else limit_test, 1),
            ("overfit", 1 if overfit is None else overfit, 1),
            ("folds", 2 if folds is None else folds, 2),
            ("fold", 0 if fold is None else fold, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(
                    f"datamodule.{key}={value} must be a whole number, at least {least}."
                )
        if (folds is None) != (fold is None) or (folds or 1) <= (fold or 0):
            raise UserError(
                f"datamodule.folds={folds} and datamodule.fold={fold} do not fit: fold must be one "
                "of 0 to folds - 1. cross_validation=<number of folds> on the command line runs "
                "all of them."
            )
        if folds is not None and split == ALL:
            raise UserError(
                f"datamodule.split={ALL} tests every image, and a cross-validation of {folds} "
                "folds divides them; leave one of them out."
            )
        if folds is not None and split_file is not None:
            raise UserError(
                f"datamodule.split_file={split_file} and a cross-validation of {folds} folds both "
                "divide the images; leave one of them out."
            )
        split = split or self.splits[0]
        check_choice("datamodule.split", split, (*self.splits, ALL))
        check_choice("datamodule.normalization", normalization, NORMALIZATIONS)
        check_choice("datamodule.antialias", antialias, ANTIALIAS)
        check_choice("datamodule.exif", exif, (None, *EXIF))
        if mask_threshold is not None and not (
            isinstance(mask_threshold, float) and 0 < mask_threshold < 1
        ):
            raise UserError(
                f"datamodule.mask_threshold={mask_threshold} must lie between 0 and 1, as a share "
                "of the largest value, or be null."
            )
        check_choice("datamodule.mask_resize", mask_resize, MASK_RESIZE)
        check_choice("datamodule.edges", edges, EDGES)
        if letterbox and mask_resize in ("published", "pillow"):
            raise UserError(
                f"datamodule.mask_resize={mask_resize} squashes masks as the references do, and "
                "datamodule.letterbox=true keeps the proportions; set datamodule.mask_resize=area "
                "or soft, or leave the letterbox out."
            )
        self.root = Path(root or ".")
        self.cache_root = Path(cache)
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.split = split
        self.split_file = split_file
        self.split_seed = split_seed
        self.allow_leak = allow_leak
        self.seed = seed
        transforms = (augmentation or {}).get("transforms") or []
        self.augmentation = Augmentation(**augmentation) if transforms else None
        if self.augmentation is not None:
            self.augmentation.check(image_size)
        self.normalization = normalization
        self.antialias = antialias
        self.letterbox = letterbox
        self.mask_resize = mask_resize
        self.edges = edges
        self.exif = exif
        self.mask_threshold = mask_threshold
        self.limit_test = limit_test
        self.overfit = overfit
        self.folds = folds
        self.fold = fold
        self.datasets: dict[str, CachedDataset] = {}

    @property
    def hint(self) -> str:
        """What to do when the data is not there."""
        return (
            f"get it from {self.source} and set paths.data to the folder that holds "
            f"{self.root.name}/."
        )

    @abstractmethod
    def list_files(self) -> Listing:
        """Return every sample of the dataset and what is wrong with its files.

        Raises:
            UserError: the folders are missing.
        """

    def read_listing(self) -> Listing:
        """Return `list_files` with the settings of decoding and the problems that headers show."""
        listing = self.list_files()
        listing.configure_decoding(self.exif, self.mask_threshold)
        return listing

    def find_samples(self) -> list[Sample]:
        """Return every sample of the dataset, sorted by id; with `folds` those with labels.

        Raises:
            UserError: the data is missing or incomplete.
        """
        listing = self.read_listing()
        listing.refuse_problems()
        samples = [s for s in listing.samples if self.folds is None or _has_truth(s)]
        return sorted(samples, key=lambda sample: sample.id)

    def divide(self, samples: Sequence[Sample]) -> list[str]:
        """Return the part of each sample, by the split asked for.

        Args:
            samples: all of them, sorted by id.

        Raises:
            UserError: a part would be empty, images of a lesion would be in two parts, or the
                split needs something that is not there.
        """
        ids = [sample.id for sample in samples]
        groups = [sample.group for sample in samples]
        if self.folds is not None and self.fold is not None:
            labels = [getattr(sample, "label", None) for sample in samples]
            cut = (self.folds, self.fold, self.reference_split, self.split_seed)
            return fold_split(ids, groups, labels, *cut)
        if self.split_file is not None:
            parts = read_split(Path(self.split_file), ids)
        elif self.split == ALL:
            parts = ["test"] * len(ids)
        elif self.split == "official":
            given = [sample.part for sample in samples]
            parts = official_split(given, groups, self.reference_split, self.split_seed)
        elif self.split == "lesion_grouped":
            self._require_groups(ids, groups)
            parts = self.grouped_parts(samples)
        elif self.split == "random":
            order = np.random.default_rng(self.split_seed).permutation(len(ids)).tolist()
            parts = proportional_split(len(ids), self.reference_split, order)
        else:
            parts = self.reference_parts(samples)
        if not self.allow_leak:
            refuse_leaks(ids, groups, parts)
        return parts

    def reference_parts(self, samples: Sequence[Sample]) -> list[str]:
        """Return the part of each sample as the reference divides them."""
        return proportional_split(len(samples), self.reference_split, range(len(samples)))

    def grouped_parts(self, samples: Sequence[Sample]) -> list[str]:
        """Return the part of each sample, all samples of a group in one."""
        groups = [sample.group for sample in samples]
        return grouped_split(groups, self.reference_split, self.split_seed)

    def _require_groups(self, ids: Sequence[str], groups: Sequence[str | None]) -> None:
        unknown = [key for key, group in zip(ids, groups, strict=True) if group is None]
        if unknown:
            raise UserError(
                f"datamodule.split=lesion_grouped needs the lesion of every image, which "
                f"{len(unknown)} of {len(ids)} have not, first {unknown[0]}; {self.group_source}"
            )

    def prepare_data(self) -> None:
        """Decode the data into the cache; of several processes one does, the others wait."""
        # The Trainer asks again before it tests: a data folder that has gone must not end a run.
        if not self.datasets:
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Open the cache and divide the samples; runs in every process."""
        if self.datasets:
            return
        samples, self.parts, self.cache = self._load()
        self.digests = dict(zip(self.parts, self.cache.digests.tolist(), strict=True))
        self.split_sha = split_sha(
            list(self.parts), list(self.parts.values()), self.mask_fingerprint
        )
        rows = {p: np.flatnonzero([part == p for part in self.parts.values()]) for p in PARTS}
        if self.overfit is None:
            rows["test"] = rows["test"][spread(len(rows["test"]), self.limit_test)]
            self.datasets = {p: self._dataset(samples, rows[p], p == "train") for p in PARTS}
        else:
            chosen = rows["train"][spread(len(rows["train"]), self.overfit)]
            self.datasets = dict.fromkeys(PARTS, self._dataset(samples, chosen, train=True))

    def find_parts(self) -> dict[str, str]:
        """Return the part of each sample by id, as `setup` will have it, without decoding any.

        Raises:
            UserError: the data is missing or incomplete, or cannot be divided so.
        """
        return self._divided(self.find_samples())

    def find_some_digests(self, count: int = 8) -> list[str]:
        """Return `photograph_digest` of a few training images, evenly spaced.

        Raises:
            UserError: the data is missing or incomplete, or an image cannot be decoded.
        """
        samples = self.find_samples()
        parts = self._divided(samples)
        train = [sample for sample in samples if parts[sample.id] == "train"]
        return [photograph_digest(train[row].load()[0]) for row in spread(len(train), count)]

    def _divided(self, samples: Sequence[Sample]) -> dict[str, str]:
        return dict(zip([s.id for s in samples], self.divide(samples), strict=True))

    def _load(self) -> tuple[list[Sample], dict[str, str], SampleCache]:
        samples = self.find_samples()
        # Before the caching, which takes long: a split that is not possible is known now.
        parts = self._divided(samples)
        square = (self.image_size, self.antialias, self.letterbox, self.mask_resize)
        cache = open_cache(samples, self.cache_root, self.name, *square)
        return samples, parts, cache

    def _dataset(self, samples: Sequence[Sample], rows: np.ndarray, train: bool) -> CachedDataset:
        return self.dataset_class(
            self.cache,
            rows,
            samples=[samples[row] for row in rows],
            normalization=self.normalization,
            augmentation=self.augmentation if train and self.overfit is None else None,
            seed=self.seed,
            train=train,
            **self.dataset_settings(),
        )

    @property
    def mask_fingerprint(self) -> str:
        """How the true masks are made, for `split_sha`; empty without masks."""
        return ""

    def dataset_settings(self) -> dict[str, Any]:
        """Return what `dataset_class` takes beyond what every dataset does."""
        return {}

    def train_dataloader(self) -> DataLoader:
        order = {"seed": self.seed, "shuffle": True, "pad": True, "batch_size": self.batch_size}
        loader = self._loader("train", **order)
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

    def predict_dataloader(self) -> DataLoader:
        return self._loader("test")

    def check_trainable(self) -> None:
        """Refuse a split that leaves nothing to train on.

        Raises:
            UserError: `split` is `all`.
        """
        if self.split == ALL and self.split_file is None:
            raise UserError(
                f"datamodule.split={ALL} leaves no image to train on, it is for task=test; choose "
                f"one of {', '.join(self.splits)}."
            )

    def check_processes(self, count: int, parts: Sequence[str] = ("val", "test")) -> None:
        """Refuse a part with fewer images than processes, of which one would wait for ever.

        Training repeats images instead.

        Args:
            count: of processes.
            parts: that are evaluated.

        Raises:
            UserError: one of the parts has too few images.
        """
        for part in parts:
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
        processes: dict[str, Any] = {"collate_fn": collate}
        if self.num_workers > 0:
            _limit_threads()
            processes = {
                "collate_fn": SharedBatches(dataset.plain(0), self.batch_size, self.num_workers),
                "prefetch_factor": PREFETCH,
                "persistent_workers": True,
                "worker_init_fn": prepare_process,
            }
        return BatchLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            # Batches from loader processes are pinned when they are taken out.
            pin_memory=torch.cuda.is_available() and self.num_workers == 0,
            # Starting to load must not draw from the generator that training may use.
            generator=torch.Generator().manual_seed(self.seed),
            **processes,
        )


def _has_truth(sample: Sample) -> bool:
    """Tell whether a sample has a mask or a class."""
    return getattr(sample, "label", None) is not None or getattr(sample, "labelled", True)


def prepare_process(worker: int) -> None:
    """Set up a loader process.

    It stays alive for a while when a signal reaches every process of a run, as from a terminal or
    from SLURM: the run ends after the step under way, for which it may need the batch that is being
    loaded.
    """
    _limit_threads()
    for signum in (signal.SIGINT, *WARNINGS):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(*_: Any) -> None:
    # Where the training process has ended, handing over a batch fails in a thread, which then
    # prints a traceback of no use to anyone.
    sys.excepthook = lambda *_: None
    signal.alarm(SECONDS_AFTER_SIGTERM)


def _limit_threads() -> None:
    """Make OpenCV use one thread, as PyTorch does in loader processes.

    Where these are forks, they must not inherit threads that did not come along.
    """
    cv2.setNumThreads(1)
