"""Splits: the reference's counts and proportions."""

import numpy as np
import pytest

from common.errors import UserError
from datamodules.splits import proportional_split, split_sha, spread

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
    with pytest.raises(UserError, match="3 images are too few"):
        proportional_split(3, REFERENCE, range(3))


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
