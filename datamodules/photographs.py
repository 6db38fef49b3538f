"""Photographs to predict on: any files, without masks or labels."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from datamodules.decoding import read_image
from datamodules.files import IMAGE_SUFFIXES, SUPERPIXELS, visible_files
from datamodules.loading import EpochSampler
from datamodules.problems import BadFileError
from datamodules.transforms import normalise, resize_image

# Not listed for `datamodule=`: the predict task makes it from `input`.
__all__: list[str] = []

# Taken from a folder; a file that is named outright may be called anything.
SUFFIXES = (*IMAGE_SUFFIXES, ".webp", ".gif", ".jfif", ".jp2", ".ppm")


def find_photographs(source: str | Path) -> list[Path]:
    """Return the files that a path means: itself, the images of a folder, or what a glob matches.

    Raises:
        UserError: there are none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [p for p in visible_files(path) if p.suffix.lower() in SUFFIXES and p.is_file()]
        files = [p for p in files if not p.stem.lower().endswith(SUPERPIXELS)]
        what = f"The folder {path} has no images"
    else:
        files = sorted(Path(name) for name in glob.glob(str(source), recursive=True))
        files = [p for p in files if p.is_file()]
        what = f"input={source} is no file or folder and matches no file"
    if not files:
        raise UserError(f"{what}; give a photograph, a folder of some, or a pattern in quotes.")
    return files


def output_names(files: Sequence[Path]) -> list[str]:
    """Return a name for what becomes of each file: its stem, with the suffix where two share one.

    Raises:
        UserError: two files have the same name, in different folders.
    """
    stems = Counter(path.stem.lower() for path in files)
    names = [p.stem if stems[p.stem.lower()] == 1 else p.name.replace(".", "_") for p in files]
    twice = [name for name, count in Counter(map(str.lower, names)).items() if count > 1]
    if twice:
        raise UserError(
            f"input has two files that would both be written as {twice[0]}; predict their folders "
            "one by one."
        )
    return names


class PhotographDataset(Dataset):
    """Decoded photographs, as a trained network wants them.

    A file that cannot be decoded becomes a black image with the reason under `error`.

    Args:
        files, names: the photographs and their names.
        image_size, normalization, antialias, letterbox: as the network was trained with.
    """

    def __init__(
        self,
        files: Sequence[Path],
        names: Sequence[str],
        image_size: int,
        normalization: str = "minmax",
        antialias: bool | str = True,
        letterbox: bool = False,
    ) -> None:
        self.files = list(files)
        self.names = list(names)
        self.image_size = image_size
        self.normalization = normalization
        self.antialias = antialias
        self.letterbox = letterbox

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | str | Path]:
        path = self.files[key[1]]
        error = ""
        try:
            image = read_image(path)
        except BadFileError as bad:
            image, error = np.zeros((1, 1, 3), dtype=np.uint8), str(bad)
        square = resize_image(image, self.image_size, self.antialias, self.letterbox)
        return {
            "image": normalise(square, self.normalization, train=False),
            # The noise of a photograph is the same in a test and here, whatever its folder.
            "id": path.stem,
            "size": torch.tensor(image.shape[:2]),
            "name": self.names[key[1]],
            "file": str(path),
            "error": error,
        }


class Photographs(L.LightningDataModule):
    """Batches of photographs: `image`, `id` and `size` of the batch contract, `name` for what is
    written of each, `file`, and `error`, which says why a file could not be decoded.

    Args:
        files, names: the photographs and their names.
        batch_size: of each process.
        num_workers: loader processes.
        settings: what `PhotographDataset` takes beyond that.
    """

    def __init__(
        self,
        files: Sequence[Path],
        names: Sequence[str],
        batch_size: int = 1,
        num_workers: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.dataset = PhotographDataset(files, names, **settings)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def predict_dataloader(self) -> DataLoader:
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(len(self.dataset), rank=rank, world_size=world_size),
            num_workers=self.num_workers,
        )
