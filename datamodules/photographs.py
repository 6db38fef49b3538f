"""Photographs to predict on: any files, without masks or labels."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.text import printable, skip
from datamodules.base import prepare_process
from datamodules.files import (
    HIDDEN,
    IMAGE_SUFFIXES,
    SUPERPIXELS,
    UNREAD_SUFFIXES,
    unread_problem,
)
from datamodules.large import Photograph, read_photograph
from datamodules.loading import EpochSampler
from datamodules.problems import BadFileError
from datamodules.transforms import normalise

# Not listed for `datamodule=`: the predict task makes it from `input`.
__all__: list[str] = []

# What a prediction leaves behind in its folder, and how that begins.
TABLE = "predictions.csv"
TABLE_START = b"file,name,height,width,"


def find_photographs(source: str | Path, output: Path) -> tuple[list[Path], list[str]]:
    """Return the files that a path means, and a name for what becomes of each.

    A path means itself, the images of a folder and of those within, or what a pattern matches, in
    which `**` stands for any folders. A name is the file's path within the folder, or within the
    fixed part of the pattern, without suffix, such as `patient_1/IMG_0001`; with the suffix, where
    two files of a folder differ in nothing else. Hidden files, and folders that hold predictions,
    are passed over, but not what cannot be read: the decoder names that.

    Args:
        source: a file, a folder or a pattern.
        output: where predictions are written; it may lie in the folder.

    Raises:
        UserError: there are none, a folder cannot be read, or predictions would lie among the
            photographs.
    """
    path = Path(source)
    if path.is_dir():
        base, files = path, list(_walk(path))
        what = f"The folder {path} has no images"
    elif os.path.lexists(path):
        base, files = path.parent, [path]
        what = ""
    else:
        base, pattern = _fixed_part(path)
        found = {base / name for name in glob.glob(pattern, root_dir=base, recursive=True)}
        round_about = {folder for folder in {p.parent for p in found} if _goes_round(folder, base)}
        files = [
            p
            for p in found
            if p.parent not in round_about and not p.is_dir() and not _hidden(p.relative_to(base))
        ]
        what = f"input={source} is no file or folder and matches no file"
    results = {folder for folder in {p.parent for p in files} if _predicted(folder, base)}
    files = sorted(p for p in files if p.parent not in results)
    if not files:
        raise UserError(f"{what}; give a photograph, a folder of some, or a pattern in quotes.")
    names = output_names(files, base)
    folders = {file.parent.resolve() for file in files}
    written = {(output / name).parent.resolve() for name in names}
    if folders & {*written, output.resolve()}:
        raise UserError(f"output={output} holds photographs of the input; choose another folder.")
    return files, names


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the images of a folder and of those within, links included."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"The folder {error.filename} cannot be read ({error.strerror}); make it readable or "
            "move it out of the input."
        ) from error

    for name, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(name)
        folders[:] = [
            f
            for f in sorted(folders)
            if not f.startswith(HIDDEN) and not _goes_round(here / f, folder)
        ]
        for file in sorted(files):
            path = here / file
            if path.suffix.lower() in UNREAD_SUFFIXES and not file.startswith(HIDDEN):
                skip(unread_problem(path).message)
            if (
                not file.startswith(HIDDEN)
                and path.suffix.lower() in IMAGE_SUFFIXES
                and not path.stem.lower().endswith(SUPERPIXELS)
            ):
                yield path


def _hidden(path: Path) -> bool:
    """Tell whether a path leads to or through what systems hide; glob knows about dots itself."""
    return any(part.startswith(HIDDEN[1:]) for part in path.parts)


def _fixed_part(pattern: Path) -> tuple[Path, str]:
    """Divide a pattern into the folder that all its matches share, and the rest.

    A folder that is there is meant itself, whatever characters its name has.
    """
    base, *rest = [*reversed(pattern.parents), pattern]
    while len(rest) > 1 and rest[0].is_dir():
        base = rest.pop(0)
    return base, str(pattern.relative_to(base))


def _goes_round(folder: Path, base: Path) -> bool:
    """Tell whether a way from one folder down to another comes by the same one twice."""
    way = [step.resolve() for step in (folder, *folder.parents) if step.is_relative_to(base)]
    return len(set(way)) < len(way)


def _predicted(folder: Path, base: Path) -> bool:
    """Tell whether a folder below another, or one above it, holds what a prediction has written."""
    while folder != base and folder.is_relative_to(base):
        table = folder / TABLE
        if table.is_file():
            with table.open("rb") as file:
                if file.read(len(TABLE_START)) == TABLE_START:
                    return True
        folder = folder.parent
    return False


def output_names(files: Sequence[Path], base: Path) -> list[str]:
    """Return a name for what becomes of each file, relative to the folder that they share.

    Raises:
        UserError: two files would have one name.
    """
    inside = [path.relative_to(base) for path in files]
    stems = Counter(_key(path.with_suffix("")) for path in inside)
    names = [
        path.with_suffix("").as_posix()
        if stems[_key(path.with_suffix(""))] == 1
        else path.with_name(path.name.replace(".", "_")).as_posix()
        for path in inside
    ]
    counts = Counter(map(_key, names))
    twice = next((name for name in names if counts[_key(name)] > 1), None)
    if twice is not None:
        same = [f for f, name in zip(files, names, strict=True) if _key(name) == _key(twice)]
        raise UserError(
            f"{same[0]} and {same[1]} would both be written as {twice}; rename one of them."
        )
    return names


def _key(name: str | Path) -> str:
    """Return what names have in common that some file systems, or a table, take for one."""
    return printable(str(name)).lower()


class PhotographDataset(Dataset):
    """Decoded photographs, as a trained network wants them.

    A file that cannot be decoded becomes a black image with the reason under `error`.

    Args:
        files, names: the photographs and their names.
        image_size, normalization, antialias, letterbox: as the network was trained with.
        max_megapixels: as in `read_photograph`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        names: Sequence[str],
        image_size: int,
        normalization: str = "minmax",
        antialias: bool | str = True,
        letterbox: bool = False,
        max_megapixels: float = 200,
    ) -> None:
        self.files = list(files)
        self.names = list(names)
        self.image_size = image_size
        self.normalization = normalization
        self.antialias = antialias
        self.letterbox = letterbox
        self.max_megapixels = max_megapixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | str | Path]:
        path = self.files[key[1]]
        error = ""
        try:
            photo = read_photograph(path, self.image_size, self.max_megapixels)
        except (BadFileError, OSError, MemoryError) as bad:
            photo = Photograph(np.zeros((1, 1, 3), dtype=np.uint8), (1, 1))
            error = str(bad) or f"The image {path} needs more memory than there is."
        square = photo.squared(self.image_size, self.antialias, self.letterbox)
        remarks = []
        if photo.transparent:
            remarks.append("transparent, taken as on white")
        if photo.reduced:
            height, width = photo.image.shape[:2]
            remarks.append(f"decoded at {width}x{height} px")
        return {
            "image": normalise(square, self.normalization, train=False),
            # Noise depends on it; ids of published datasets are these too.
            "id": os.fsencode(path.stem).decode(errors="backslashreplace"),
            "size": torch.tensor(photo.size),
            "name": self.names[key[1]],
            "file": str(path),
            "error": error,
            "remark": "; ".join(remarks),
        }


class Photographs(L.LightningDataModule):
    """Batches of photographs: `image`, `id` and `size` of the batch contract, `name` for what is
    written of each, `file`, `remark`, and `error`, which says why a file could not be decoded.

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
            worker_init_fn=prepare_process,
        )
