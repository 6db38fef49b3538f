"""Intervals and paired differences, against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from common.errors import UserError
from tasks.statistics import bootstrap_interval, compare_scores, read_images, read_scores


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(1).beta(8, 2, size=200)
    low, high = bootstrap_interval(values)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    assert bootstrap_interval(values) == [low, high], "the same every time"


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(size=60))
        hits += low <= 0 <= high
    assert 0.9 <= hits / 200 <= 0.99


def test_many_images_are_drawn_in_blocks(monkeypatch):
    values = np.random.default_rng(1).random(50)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("tasks.statistics.BLOCK", 500)
    assert bootstrap_interval(values) == whole


def scores(values):
    return {f"image_{i}": {"dice": float(v)} for i, v in enumerate(values)}


def test_a_small_but_steady_gain_is_found():
    rng = np.random.default_rng(0)
    first = rng.uniform(0.4, 1, 80)
    second = first + rng.normal(0.01, 0.01, 80)
    row = compare_scores(scores(first), scores(second))["dice"]
    assert row["difference"] == pytest.approx((second - first).mean())
    assert row["interval"][0] > 0, "though the runs differ less than their images"
    assert row["p"] == pytest.approx(stats.wilcoxon(second - first).pvalue)
    assert row["p"] < 1e-6
    assert row["images"] == 80


def test_equal_runs_do_not_differ():
    same = scores(np.linspace(0, 1, 9))
    row = compare_scores(same, same)["dice"]
    assert (row["difference"], row["p"], row["interval"]) == (0, 1, [0, 0])


def test_only_common_images_count():
    first, second = scores([0.5, 0.6, 0.7]), scores([0.9, 0.8, 0.7])
    del first["image_0"]
    row = compare_scores(first, second)["dice"]
    assert row["images"] == 2
    assert row["first"] == pytest.approx(0.65)
    with pytest.raises(UserError, match="no test image in common"):
        compare_scores({"a": {"dice": 1.0}}, {"b": {"dice": 1.0}})


def test_a_runs_table_is_read(tmp_path):
    table = "id,dice,hd95,lesion_pixels,predicted_pixels\nb,0.5,3,10,20\na,0.25,1,1,2\n"
    (tmp_path / "test_images.csv").write_text(table)
    assert read_images(tmp_path)["a"] == {"dice": 0.25, "hd95": 1}
    assert read_scores(tmp_path)["dice"].tolist() == [0.5, 0.25]
    assert read_scores(tmp_path / "nowhere") == {}
    with pytest.raises(UserError, match="cannot be read.*task=test"):
        read_images(tmp_path / "nowhere")
    (tmp_path / "test_images.csv").write_text("id,dice\na,none\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_images(tmp_path)
