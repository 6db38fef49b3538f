"""Splits: the reference's counts and proportions."""

import numpy as np
import pytest

from common.errors import UserError
from datamodules.splits import (
    PARTS,
    fold_split,
    grouped_split,
    leaks,
    official_split,
    proportional_split,
    read_parts,
    read_split,
    refuse_leaks,
    split_sha,
    spread,
    stratified_grouped_split,
    write_split,
)

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


def test_every_class_is_divided_in_proportion_and_groups_stay_together():
    groups = lesions(2000)
    rng = np.random.default_rng(1)
    class_of = {group: int(rng.choice(3, p=[0.7, 0.25, 0.05])) for group in sorted(set(groups))}
    labels = [class_of[group] for group in groups]
    parts = stratified_grouped_split(groups, labels, (7200, 1800, 1015), 0)
    assert not leaks(groups, parts)
    for label in range(3):
        of_class = [part for part, other in zip(parts, labels, strict=True) if other == label]
        borders = np.cumsum([of_class.count("train"), of_class.count("val")])
        expected = np.cumsum([7200, 1800]) * len(of_class) / 10015
        assert np.abs(borders - expected).max() <= 2.5
    assert stratified_grouped_split(groups, labels, (7200, 1800, 1015), 1) != parts


def test_published_parts_are_kept_and_validation_is_taken_from_training():
    published = ["train"] * 10 + ["test"] * 4
    groups = [str(i // 2) for i in range(14)]
    parts = official_split(published, groups, (8, 2, 4), 0)
    assert parts[10:] == ["test"] * 4
    assert parts.count("val") == 2
    assert not leaks(groups, parts)
    assert official_split(["val", "train", "test"], [None] * 3, (1, 1, 1), 0) == [
        "val",
        "train",
        "test",
    ]


def test_images_without_a_published_part_are_refused():
    with pytest.raises(UserError, match=r"published part of every image, and 2 have none"):
        official_split(["train", None, "test", None], [None] * 4, (1, 1, 1), 0)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_part_that_is_not_published_is_named(missing):
    published = [part for part in PARTS if part != missing]
    with pytest.raises(UserError, match=f"needs the published {missing} part"):
        official_split(published, [None] * 2, (1, 1, 1), 0)


def test_a_split_file_is_read_as_it_was_written(tmp_path):
    parts = {"a": "train", "b,c": "val", "d": "test"}
    write_split(tmp_path / "splits.csv", parts)
    assert read_split(tmp_path / "splits.csv", ["d", "a", "b,c"]) == ["test", "train", "val"]
    assert read_parts(tmp_path / "splits.csv") == (parts, None)


def test_the_digests_of_a_run_do_not_disturb_its_split(tmp_path):
    parts = {"a": "train", "b,c": "val", "d": "test"}
    digests = {key: f"{number:016x}" for number, key in enumerate(parts)}
    path = tmp_path / "splits.csv"
    write_split(path, parts, digests)
    assert path.read_text().splitlines()[:2] == ["id,split,digest", "a,train,0000000000000000"]
    assert read_split(path, ["d", "a", "b,c"]) == ["test", "train", "val"]
    assert read_parts(path) == (parts, digests)
    path.write_text(path.read_text().replace("0000000000000001", ""))
    assert read_parts(path) == (parts, None), "one is missing"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,train", "b,val"], r"has no row for 1 image\(s\), first c"),
        (["a,train", "b,val", "c,test", "d,test"], r"names images that are not there, 1 .*first d"),
        (["a,train", "b,val", "c,test", "a,val"], r"has two rows of a; remove one"),
        (["a,train", "b,fold1", "c,test"], r"has split=fold1 for b; choose from train, val, test"),
        (["a,train", "b,val", "c,val"], r"has no image in test"),
    ],
)
def test_a_split_file_that_does_not_fit_is_refused(tmp_path, rows, message):
    path = tmp_path / "splits.csv"
    path.write_text("\n".join(["id,split", *rows]))
    with pytest.raises(UserError, match=message):
        read_split(path, ["a", "b", "c"])


def test_a_split_file_is_read_as_people_write_it(tmp_path):
    (tmp_path / "splits.csv").write_text("ID;Split\na.jpg;Training\nb.PNG;valid\nc.tar;Test\n")
    assert read_split(tmp_path / "splits.csv", ["c.tar", "a", "b"]) == ["test", "train", "val"]
    (tmp_path / "splits.csv").write_text("id,split\na.jpg,train\na,test\nb,val\n")
    with pytest.raises(UserError, match=r"rows of a.jpg and a, one image"):
        read_split(tmp_path / "splits.csv", ["a", "b"])


def test_small_classes_are_in_every_part():
    for count in (3, 8):
        groups = [f"{label} {number}" for label in range(3) for number in range(count)]
        labels = [int(group[0]) for group in groups]
        for seed in range(5):
            parts = stratified_grouped_split(groups, labels, (7, 1, 2), seed)
            found = {(label, part) for label, part in zip(labels, parts, strict=True)}
            assert len(found) == 9, (count, seed)
    with pytest.raises(UserError, match="too few"):
        stratified_grouped_split(["a", "b"], [0, 1], (7, 1, 2), 0)


def test_a_split_file_without_its_columns_is_refused(tmp_path):
    (tmp_path / "splits.csv").write_text("image,part\na,train")
    with pytest.raises(UserError, match=r"has no columns id and split; give datamodule.split_file"):
        read_split(tmp_path / "splits.csv", ["a"])
    with pytest.raises(UserError, match=r"other.csv cannot be read"):
        read_split(tmp_path / "other.csv", ["a"])


def test_a_lesion_in_two_parts_is_refused():
    ids, groups = ["a", "b", "c", "d"], ["1", "1", None, None]
    refuse_leaks(ids, groups, ["train", "train", "val", "test"])
    with pytest.raises(
        UserError, match=r"1 lesion\(s\) .* a in train and b in val, both of 1; .*a"
    ):
        refuse_leaks(ids, groups, ["train", "val", "val", "test"])


def folds_of(ids, groups, labels, folds, seed=0, reference=REFERENCE):
    """Return the parts of every fold, an array `(folds, N)`."""
    split = [fold_split(ids, groups, labels, folds, fold, reference, seed) for fold in range(folds)]
    return np.array(split)


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_every_image_is_tested_in_one_fold(folds):
    ids = [f"image_{number:04d}" for number in range(259)]
    parts = folds_of(ids, [None] * 259, [None] * 259, folds)
    assert ((parts == "test").sum(0) == 1).all()
    tested = (parts == "test").sum(1)
    assert tested.max() - tested.min() <= 1
    rest = 259 - tested
    assert np.abs((parts == "val").sum(1) - rest * 259 / (1815 + 259)).max() <= 2
    assert ((parts == "train").sum(1) + (parts == "val").sum(1) == rest).all()


def test_folds_keep_groups_together_and_classes_in_proportion():
    groups = lesions(1000)
    rng = np.random.default_rng(2)
    # Patients with images of several classes: the class is of the image, not of its group.
    labels = rng.choice(3, len(groups), p=[0.7, 0.27, 0.03]).tolist()
    ids = [f"image_{number:04d}" for number in range(len(groups))]
    parts = folds_of(ids, groups, labels, 5)
    for of_fold in parts:
        assert not leaks(groups, of_fold)
    tested = parts == "test"
    assert (tested.sum(0) == 1).all()
    for label in range(3):
        of_class = np.array(labels) == label
        counts = tested[:, of_class].sum(1)
        assert counts.max() - counts.min() <= 2
        assert np.ptp((parts == "val")[:, of_class].sum(1)) <= 2
        assert (parts == "val")[:, of_class].sum(1).min() > 0


def test_folds_depend_on_the_seed_and_not_on_the_order_of_samples():
    ids = [f"image_{number:03d}" for number in range(120)]
    groups = [f"lesion_{number % 70}" if number % 3 else None for number in range(120)]
    labels = [number % 4 for number in range(120)]
    order = np.random.default_rng(1).permutation(120)
    parts = folds_of(ids, groups, labels, 4)
    mixed = [[values[i] for i in order] for values in (ids, groups, labels)]
    assert np.array_equal(parts[:, order], folds_of(*mixed, 4))
    assert not np.array_equal(parts, folds_of(ids, groups, labels, 4, seed=1))


def test_a_class_of_two_lesions_is_trained_whenever_it_is_tested():
    ids = [f"image_{number:03d}" for number in range(40)]
    labels = [7, 7] + [0] * 38
    for of_fold in folds_of(ids, [None] * 40, labels, 5):
        rare = of_fold[:2]
        assert "train" in rare


@pytest.mark.parametrize(("count", "group_count", "folds"), [(9, 4, 5), (9, 3, 2), (2, 2, 2)])
def test_too_few_groups_for_the_folds_are_refused(count, group_count, folds):
    ids = [str(number) for number in range(count)]
    groups = [f"lesion_{number % group_count}" for number in range(count)]
    with pytest.raises(UserError, match=rf"cross_validation={folds} .* {group_count} groups"):
        folds_of(ids, groups, [None] * count, folds)
