"""Splits: the reference's counts and proportions."""

import numpy as np
import pytest

from common.errors import UserError
from datamodules.splits import PARTS, grouped_split, proportional_split, split_sha, spread

REFERENCE = (1815, 259, 520)


def test_the_full_dataset_has_the_references_counts():
    parts = proportional_split(2594, REFERENCE, range(2594))
    assert parts == ["train"] * 1815 + ["val"] * 259 + ["test"] * 520


@pytest.mark.parametrize("count", [10, 97, 1000])
def test_fewer_files_keep_the_proportions(count):
    parts = proportional_split(count, REFERENCE, range(count))
    assert parts.count("train") == round(count * 1815 / 2594)
    assert parts.count("val") == round(count * 259 / 2594)
    assert parts.count("test") == count - parts.count("train") - parts.count("val")
    assert parts == sorted(parts, key=["train", "val", "test"].index)


def test_the_order_decides_who_is_where():
    parts = proportional_split(10, (6, 2, 2), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert parts == ["test"] * 2 + ["val"] * 2 + ["train"] * 6


def test_too_few_files_are_refused():
    with pytest.raises(UserError, match="3 images are too few .* 1815/259/520: val would be empty"):
        proportional_split(3, REFERENCE, range(3))


def lesions(count, seed=0):
    """Lesions of one to five images each, about as HAM10000 has them."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1, 2, 3, 4, 5], count, p=[0.72, 0.2, 0.06, 0.01, 0.01])
    return [f"HAM_{i:07d}" for i, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("count", [30, 1000, 7470])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_stay_together_in_the_references_proportions(count, seed):
    groups = lesions(count)
    parts = grouped_split(groups, (7200, 1800, 1015), seed)
    members = [{g for g, p in zip(groups, parts, strict=True) if p == part} for part in PARTS]
    assert sum(len(part) for part in members) == len(set(groups)), "no group in two parts"
    borders = np.cumsum([parts.count("train"), parts.count("val")])
    expected = np.cumsum([7200, 1800]) * len(groups) / 10015
    assert np.abs(borders - expected).max() <= 2.5, "half of the largest group"


def test_groups_of_one_have_the_references_counts():
    parts = grouped_split([str(i) for i in range(10015)], (7200, 1800, 1015), 0)
    assert [parts.count(part) for part in PARTS] == [7200, 1800, 1015]
    assert parts != sorted(parts, key=PARTS.index), "dealt out at random"


def test_grouping_depends_on_the_seed_and_not_on_the_order_of_samples():
    groups = lesions(100)
    order = np.random.default_rng(1).permutation(len(groups))
    parts = np.array(grouped_split(groups, REFERENCE, 3))
    again = np.array(grouped_split([groups[i] for i in order], REFERENCE, 3))
    assert np.array_equal(parts[order], again)
    assert grouped_split(groups, REFERENCE, 4) != parts.tolist()


def test_too_few_groups_are_refused():
    with pytest.raises(UserError, match=r"9 images in 1 group\(s\) are too few .* would be empty"):
        grouped_split(["one"] * 9, REFERENCE, 0)


def test_digest_depends_on_the_split_and_not_on_the_order():
    first = split_sha(["a", "b"], ["train", "test"])
    assert first == split_sha(["b", "a"], ["test", "train"])
    assert first != split_sha(["a", "b"], ["test", "train"])


def test_a_limit_is_spread_evenly():
    assert spread(100, None).tolist() == list(range(100))
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    chosen = spread(520, 128)
    assert len(np.unique(chosen)) == 128
    assert (chosen[0], chosen[-1]) == (0, 519)
    assert set(np.diff(chosen)) <= {4, 5}
