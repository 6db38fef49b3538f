"""Which sample belongs to training, validation or test."""

import hashlib
from collections.abc import Sequence

import numpy as np

from common.errors import UserError

__all__ = ["PARTS", "grouped_split", "proportional_split", "split_sha", "spread"]

PARTS = ("train", "val", "test")


def proportional_split(count: int, reference: Sequence[int], order: Sequence[int]) -> list[str]:
    """Divide samples into consecutive parts in the proportions of a reference.

    Args:
        count: number of samples.
        reference: the reference's sizes of train, val and test, such as `(1815, 259, 520)`; with
            as many samples as they sum to, the parts have exactly these sizes, else the first two
            are rounded and the rest is test.
        order: the samples' indices in the order in which they are dealt out.

    Returns:
        The part of each sample, by its index.

    Raises:
        UserError: a part would be empty.
    """
    n_train, n_val = (round(count * part / sum(reference)) for part in reference[:2])
    parts = [""] * count
    for position, index in enumerate(order):
        parts[index] = PARTS[(position >= n_train) + (position >= n_train + n_val)]
    _refuse_empty_parts(parts, reference, f"{count} images")
    return parts


def grouped_split(groups: Sequence[str], reference: Sequence[int], seed: int) -> list[str]:
    """Divide samples in the proportions of a reference, every group wholly into one part.

    Groups are laid end to end in a random order, and each belongs to the part in which its middle
    falls: a border between two parts is off by at most half a group.

    Args:
        groups: the group of each sample.
        reference: as in `proportional_split`.
        seed: of the order of the groups; the order of the samples does not matter.

    Returns:
        The part of each sample, by its index.

    Raises:
        UserError: a part would be empty.
    """
    names, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    middles = np.empty(len(names))
    middles[order] = np.cumsum(sizes[order]) - sizes[order] / 2
    borders = np.cumsum(reference[:2]) * len(groups) / sum(reference)
    part_of_group = np.searchsorted(borders, middles, side="right")
    parts = [PARTS[part] for part in part_of_group[member]]
    _refuse_empty_parts(parts, reference, f"{len(groups)} images in {len(names)} group(s)")
    return parts


def _refuse_empty_parts(parts: Sequence[str], reference: Sequence[int], what: str) -> None:
    for part in PARTS:
        if part not in parts:
            raise UserError(
                f"{what} are too few to split into train, val and test in the proportions "
                f"{'/'.join(map(str, reference))}: {part} would be empty; add images."
            )


def split_sha(ids: Sequence[str], parts: Sequence[str]) -> str:
    """Return a digest of who is where, to tell whether two runs used the same split."""
    lines = "".join(f"{i},{p}\n" for i, p in sorted(zip(ids, parts, strict=True)))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def spread(count: int, limit: int | None) -> np.ndarray:
    """Return `limit` evenly spaced indices below `count`, or all of them.

    Files in sorted order are not exchangeable, so a limited test set must not be its beginning.
    """
    if limit is None or limit >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).round().astype(int)
