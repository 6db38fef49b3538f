"""Which sample belongs to training, validation or test."""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_text_atomic
from datamodules.files import IMAGE_SUFFIXES
from datamodules.tables import read_table

__all__ = [
    "PARTS",
    "PART_NAMES",
    "fold_split",
    "grouped_split",
    "leaks",
    "official_split",
    "proportional_split",
    "read_parts",
    "read_split",
    "refuse_leaks",
    "split_sha",
    "spread",
    "stratified_grouped_split",
    "write_split",
]

PARTS = ("train", "val", "test")
# What a part may be called, in lower case.
PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_DIGEST = re.compile("[0-9a-f]{16}")


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
    parts = _deal_groups(groups, reference, seed)
    what = f"{len(groups)} images in {len(set(groups))} group(s)"
    _refuse_empty_parts(parts, reference, what)
    return parts


def stratified_grouped_split(
    groups: Sequence[str], labels: Sequence[int], reference: Sequence[int], seed: int
) -> list[str]:
    """Divide samples as `grouped_split` does, each class by itself.

    Every class is then in the parts in the proportions of the reference, to within half a group; of
    a class with as many groups as parts, each part has one.

    Args:
        groups, reference, seed: as in `grouped_split`.
        labels: the class of each sample; a group counts for that of its first.

    Raises:
        UserError: a part would be empty.
    """
    class_of: dict[str, int] = {}
    for group, label in zip(groups, labels, strict=True):
        class_of.setdefault(group, label)
    parts = [""] * len(groups)
    for label in sorted(set(class_of.values())):
        rows = [row for row, group in enumerate(groups) if class_of[group] == label]
        own = [groups[row] for row in rows]
        dealt = _fill_parts(own, _deal_groups(own, reference, seed), reference)
        for row, part in zip(rows, dealt, strict=True):
            parts[row] = part
    what = f"{len(groups)} images in {len(class_of)} group(s)"
    _refuse_empty_parts(parts, reference, what)
    return parts


def _fill_parts(groups: Sequence[str], parts: Sequence[str], reference: Sequence[int]) -> list[str]:
    """Give parts without a group the smallest of those in the part that has most of them."""
    part_of = dict(zip(groups, parts, strict=True))
    images = Counter(groups)
    wanted = [part for part, size in zip(PARTS, reference, strict=True) if size]
    if len(part_of) < len(wanted):
        return list(parts)
    for part in wanted:
        if part not in part_of.values():
            counts = Counter(part_of.values())
            most = max(PARTS, key=lambda other: counts[other])
            part_of[min((images[g], g) for g, p in part_of.items() if p == most)[1]] = part
    return [part_of[group] for group in groups]


def _deal_groups(groups: Sequence[str], sizes: Sequence[int], seed: int) -> list[str]:
    """Deal samples out to as many parts as there are sizes, in their proportions, by groups."""
    names, member, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    middles = np.empty(len(names))
    middles[order] = np.cumsum(counts[order]) - counts[order] / 2
    borders = np.cumsum(sizes[:-1]) * len(groups) / sum(sizes)
    part_of_group = np.searchsorted(borders, middles, side="right")
    return [PARTS[part] for part in part_of_group[member]]


def fold_split(
    ids: Sequence[str],
    groups: Sequence[str | None],
    labels: Sequence[int | None],
    folds: int,
    fold: int,
    reference: Sequence[int],
    seed: int,
) -> list[str]:
    """Divide samples for one fold of a cross-validation, every group wholly into one part.

    The folds have about as many samples as each other, and about as many of each class. One fold is
    tested, and of the others validation has the reference's proportion to training. With the same
    seed, every sample is tested in exactly one fold.

    Args:
        ids: of the samples; their order does not matter.
        groups: the group of each sample; None is a group of its own.
        labels: the class of each sample; None where unknown.
        folds: their number, at least 2.
        fold: the one to test, from 0.
        reference: sizes of train, val and test in the reference.
        seed: of the division.

    Returns:
        The part of each sample, by its index.

    Raises:
        UserError: there are too few groups for a test fold, validation and training.
    """
    keys = [("image", i) if g is None else ("group", g) for i, g in zip(ids, groups, strict=True)]
    numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
    group = np.array([numbers[key] for key in keys])
    classes = sorted(set(labels), key=str)
    label = np.array([classes.index(value) for value in labels])
    too_few = UserError(
        f"cross_validation={folds} needs more data: {len(ids)} images in {len(numbers)} groups "
        "(lesions or patients) are too few for a test fold, validation and training; choose fewer "
        "folds or add images."
    )
    if len(numbers) < folds:
        raise too_few
    fold_of = _deal_evenly(group, label, folds, seed)
    rest = np.flatnonzero(fold_of != fold)
    left = len(set(group[rest]))
    if left < 2:
        raise too_few
    shares = min(max(2, round(sum(reference[:2]) / reference[1])), left)
    share_of = _deal_evenly(group[rest], label[rest], shares, [seed, fold])
    # A class with few groups is needed in training first.
    known = [len(set(label[rest][share_of != share])) for share in range(shares)]
    parts = np.full(len(ids), "train", dtype=object)
    parts[fold_of == fold] = "test"
    parts[rest[share_of == int(np.argmax(known))]] = "val"
    return parts.tolist()


def _deal_evenly(
    groups: np.ndarray, labels: np.ndarray, parts: int, seed: int | Sequence[int]
) -> np.ndarray:
    """Return the part of each sample, int `(N,)` in [0, `parts`), all of a group in one.

    The largest groups are dealt first, in a random order among those of one size, each to the part
    that has least of its classes so far, and of these to the smallest.

    scikit-learn's StratifiedGroupKFold refuses classes with fewer samples than folds and takes
    seconds for the images of ISIC 2019.

    Args:
        groups: the group of each sample, int `(N,)`.
        labels: the class of each sample, int `(N,)`.
        parts: their number, at most that of the groups; then none is empty.
        seed: of the order.
    """
    names, member = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), labels.max() + 1))
    np.add.at(counts, (member, labels), 1)
    weights = 1 / np.maximum(counts.sum(0), 1) ** 2
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    dealt = np.zeros((parts, counts.shape[1]))
    part_of = np.empty(len(names), dtype=int)
    for group in order:
        # What the group adds to the sum of squares of the parts' shares of each class.
        cost = (dealt * counts[group] * weights).sum(1)
        part_of[group] = np.lexsort((dealt.sum(1), cost))[0]
        dealt[part_of[group]] += counts[group]
    return part_of[member]


def official_split(
    published: Sequence[str | None],
    groups: Sequence[str | None],
    reference: Sequence[int],
    seed: int,
) -> list[str]:
    """Divide samples as published; where nothing is published for validation, take it from train.

    Args:
        published: `train`, `val` or `test` for each sample.
        groups: the group of each sample; all images of one are taken together, None is a group of
            its own.
        reference: train to val in which the published training part is divided, then test.
        seed: of what is taken.

    Raises:
        UserError: a part is empty, or a sample has none.
    """
    parts = list(published)
    for part in ("train", "test"):
        if part not in parts:
            raise UserError(
                f"datamodule.split=official needs the published {part} part, of which no image is "
                "there; add its folder or choose another split, to test a checkpoint on all images "
                "datamodule.split=all."
            )
    if None in parts:
        raise UserError(
            f"datamodule.split=official needs the published part of every image, and "
            f"{parts.count(None)} have none; choose another split."
        )
    if "val" not in parts:
        train = [index for index, part in enumerate(parts) if part == "train"]
        names = [groups[index] or f"sample {index}" for index in train]
        for index, part in zip(train, _deal_groups(names, reference[:2], seed), strict=True):
            parts[index] = part
        _refuse_empty_parts(parts, reference, f"{len(train)} images to train")
    return parts


def read_split(path: Path, ids: Sequence[str]) -> list[str]:
    """Return the part of each sample from a CSV with the columns `id` and `split`.

    An id may have the suffix of its file, and parts are called as in `PART_NAMES`.

    Raises:
        UserError: the file cannot be read, an image is missing or unknown or has two rows, a part
            has another name, or one is empty.
    """
    rows = read_table(path, "id", ["split"], "give datamodule.split_file a CSV with both")
    known = set(ids)
    named: dict[str, str] = {}
    for key in rows:
        first = named.setdefault(_without_suffix(key, known), key)
        if first != key:
            raise UserError(f"{path} has rows of {first} and {key}, one image; remove one of them.")
    rows = {name: rows[key] for name, key in named.items()}
    for what, keys in (
        ("has no row for", [key for key in ids if key not in rows]),
        ("names images that are not there,", [key for key in rows if key not in known]),
    ):
        if keys:
            raise UserError(
                f"datamodule.split_file={path} {what} {len(keys)} image(s), first {keys[0]}; every "
                "image needs one row."
            )
    for key, row in rows.items():
        row["split"] = PART_NAMES.get(row["split"].casefold(), row["split"])
        if row["split"] not in PARTS:
            raise UserError(
                f"datamodule.split_file={path} has split={row['split']} for {key}; choose from "
                f"{', '.join(PARTS)}."
            )
    parts = [rows[key]["split"] for key in ids]
    for part in PARTS:
        if part not in parts:
            raise UserError(f"datamodule.split_file={path} has no image in {part}; give it some.")
    return parts


def _without_suffix(key: str, known: Set[str]) -> str:
    """Return an id of a table as the samples have it."""
    stem, dot, suffix = key.rpartition(".")
    is_file = key not in known and f"{dot}{suffix.lower()}" in IMAGE_SUFFIXES
    return stem if is_file and stem in known else key


def read_parts(path: Path) -> tuple[dict[str, str], dict[str, str] | None]:
    """Return the part of each image by id from the `splits.csv` of a run, and its digests.

    Returns:
        The parts, and `photograph_digest` by id, or `None` where the file is from before there
        were digests.

    Raises:
        UserError: the file cannot be read.
    """
    rows = read_table(path, "id", ["split"], "give the splits.csv of a run")
    digests = {key: row.get("digest", "") for key, row in rows.items()}
    known = all(_DIGEST.fullmatch(digest) for digest in digests.values())
    return {key: row["split"] for key, row in rows.items()}, digests if known else None


def write_split(
    path: Path, parts: Mapping[str, str], digests: Mapping[str, str] | None = None
) -> None:
    """Write the part of each sample by id as a CSV that `read_split` reads.

    Args:
        path: the file.
        parts: by id.
        digests: `photograph_digest` by id, a third column.
    """
    columns = (parts, digests) if digests else (parts,)
    rows = [(key, *(column[key] for column in columns)) for key in parts]
    text = io.StringIO()
    header = ("id", "split", "digest")[: 1 + len(columns)]
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text_atomic(path, text.getvalue())


def leaks(groups: Sequence[str | None], parts: Sequence[str]) -> dict[str, list[int]]:
    """Return the groups that are in more than one part, with the indices of their samples."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(index)
    return {g: rows for g, rows in members.items() if len({parts[row] for row in rows}) > 1}


def refuse_leaks(ids: Sequence[str], groups: Sequence[str | None], parts: Sequence[str]) -> None:
    """Refuse a split that has images of one lesion in two parts.

    Raises:
        UserError: it has; the message names the first.
    """
    found = leaks(groups, parts)
    if found:
        group, rows = next(iter(found.items()))
        first = next(row for row in rows if parts[row] != parts[rows[0]])
        raise UserError(
            f"This split has images of {len(found)} lesion(s) in more than one part, first "
            f"{ids[rows[0]]} in {parts[rows[0]]} and {ids[first]} in {parts[first]}, both of "
            f"{group}; choose another split, or set datamodule.allow_leak=true to reproduce a "
            "paper that has it."
        )


def _refuse_empty_parts(parts: Sequence[str], reference: Sequence[int], what: str) -> None:
    for part in PARTS:
        if part not in parts:
            raise UserError(
                f"{what} are too few to split into train, val and test in the proportions "
                f"{'/'.join(map(str, reference))}: {part} would be empty; add images."
            )


def split_sha(ids: Sequence[str], parts: Sequence[str], masks: str = "") -> str:
    """Return a digest of the split: equal for two runs with equal images in equal parts.

    Args:
        ids: of all samples, in any order.
        parts: of each sample.
        masks: how their true masks are made; runs with other masks have other splits.
    """
    lines = "".join(f"{i},{p}\n" for i, p in sorted(zip(ids, parts, strict=True)))
    lines += f"masks,{masks}\n" if masks else ""
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def spread(count: int, limit: int | None) -> np.ndarray:
    """Return `limit` evenly spaced indices below `count`, or all of them.

    Files in sorted order are not exchangeable, so a limited test set must not be its beginning.
    """
    if limit is None or limit >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).round().astype(int)
