"""Intervals and paired differences, against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from common.errors import UserError
from common.runs import write_results
from tasks.statistics import (
    Predictions,
    bootstrap_interval,
    compare_predictions,
    compare_scores,
    join_predictions,
    mean_images,
    percentile_interval,
    pooled_scores,
    read_images,
    read_predictions,
    read_scores,
    resampled_scores,
)


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
    write_results(tmp_path, {"schema": 1, "resolution": "native"})
    assert read_images(tmp_path)["a"] == {"native_dice": 0.25, "native_hd95": 1}, "an old test"
    columns = "id,native_dice,native_lesion_pixels,dice,predicted_pixels,finite"
    (tmp_path / "test_images.csv").write_text(f"{columns}\na,0.5,10,0.25,3,1\n")
    assert list(read_images(tmp_path)["a"].items()) == [("native_dice", 0.5), ("dice", 0.25)]
    (tmp_path / "test_images.csv").write_text("id,dice\na,none\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_images(tmp_path)


CLASSES = ("bkl", "mel", "nv")
SETTINGS = {"bins": 10, "positive": "MEL", "specificity": 0.9}


def diagnoses(skill, seed=0, count=120, classes=CLASSES):
    """Return predictions that tell the classes apart as far as `skill` goes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(classes)
    logits = rng.normal(size=(count, len(classes))) + skill * np.eye(len(classes))[labels]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions([f"i{index}" for index in range(count)], labels, chances, classes)


def test_accuracys_resampled_interval_is_that_of_a_mean():
    predictions = diagnoses(1.0)
    correct = predictions.probability.argmax(1) == predictions.labels
    drawn = resampled_scores(predictions, SETTINGS)
    expected = bootstrap_interval(correct.astype(float))
    assert percentile_interval(drawn["accuracy"]) == pytest.approx(expected, abs=0.01)
    assert {"balanced_accuracy", "auc", "mel_sensitivity", "recall/nv"} <= drawn.keys()
    assert all(
        np.array_equal(v, drawn[k]) for k, v in resampled_scores(predictions, SETTINGS).items()
    )


def test_a_class_that_is_not_there_leaves_no_interval():
    predictions = diagnoses(1.0)
    few = predictions.of([predictions.ids[row] for row in np.flatnonzero(predictions.labels)])
    drawn = resampled_scores(few, SETTINGS)
    assert np.isnan(percentile_interval(drawn["recall/bkl"])).all()
    assert np.isfinite(percentile_interval(drawn["balanced_accuracy"])).all()


def test_the_better_diagnoses_are_told():
    first, second = diagnoses(0.5), diagnoses(2.0, seed=1)
    row = compare_predictions(first, second, SETTINGS)["balanced_accuracy"]
    assert row["difference"] == pytest.approx(row["second"] - row["first"])
    assert 0 < row["interval"][0] < row["difference"] < row["interval"][1]
    assert row["p"] == pytest.approx(2 / 2001), "no draw is the other way round; it is never 0"
    assert row["images"] == 120
    turned = compare_predictions(second, first, SETTINGS)["balanced_accuracy"]
    assert turned["difference"] == pytest.approx(-row["difference"])
    assert turned["interval"] == pytest.approx([-row["interval"][1], -row["interval"][0]])


def test_equal_diagnoses_do_not_differ():
    first = diagnoses(1.0)
    compared = compare_predictions(first, first, SETTINGS)
    assert all(row["p"] == 1 and row["difference"] == 0 for row in compared.values())


def test_diagnoses_are_compared_on_the_photographs_of_both():
    first = diagnoses(1.0)
    second = first.of(first.ids[100:] + first.ids[:50][::-1])
    row = compare_predictions(first, second, SETTINGS)["accuracy"]
    assert (row["images"], row["difference"]) == (70, 0)
    other = diagnoses(1.0, classes=("akiec", "mel", "nv"))
    with pytest.raises(UserError, match="The runs tell other classes apart"):
        compare_predictions(first, other, SETTINGS)


def test_predictions_are_read_as_they_were_written(tmp_path):
    rows = ["id,label,predicted,correct,confidence,bkl,mel,nv", "a,nv,mel,0,0.5,0.2,0.5,0.3"]
    (tmp_path / "predictions.csv").write_text("\n".join(rows))
    predictions = read_predictions(tmp_path)
    assert (predictions.ids, predictions.classes) == (["a"], CLASSES)
    assert predictions.labels.tolist() == [2]
    assert predictions.probability.tolist() == [[0.2, 0.5, 0.3]]
    assert predictions.of_truth() == {"a": {"probability_of_truth": 0.3}}
    (tmp_path / "predictions.csv").write_text("\n".join([*rows, "b,scc,nv,0,0.5,0.2,0.5,0.3"]))
    with pytest.raises(UserError, match=r"predictions.csv cannot be read \(ValueError\); test"):
        read_predictions(tmp_path)


def test_folds_pool_their_images_and_seeds_average_them():
    first, second = {"a": {"dice": 0.2}, "b": {"dice": 0.4}}, {"b": {"dice": 0.8}}
    assert mean_images([first, second]) == {"b": {"dice": pytest.approx(0.6)}}
    pooled = mean_images([first, second], pooled=True)
    assert pooled == {"a": {"dice": 0.2}, "b": {"dice": pytest.approx(0.6)}}


@pytest.fixture
def diagnosed(tmp_path):
    """Writes the diagnoses of a run as its test does."""

    def write(name, predictions):
        folder = tmp_path / name
        folder.mkdir()
        rows = ["id,label,predicted,correct,confidence,mel,nv"]
        for key, label, chances in zip(
            predictions.ids, predictions.labels, predictions.probability, strict=True
        ):
            row = (key, predictions.classes[label], "nv", 0, 0.5, *chances)
            rows.append(",".join(map(str, row)))
        (folder / "predictions.csv").write_text("\n".join([*rows, ""]))
        (folder / "config.yaml").write_text("metrics: {positive: null}\n")
        return folder

    return write


def diagnosed_fold(ids, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, len(ids))
    probability = 0.8 * rng.dirichlet((1, 1), len(ids)) + 0.2 * np.eye(2)[labels]
    return Predictions(list(ids), labels, probability, ("mel", "nv"))


def test_diagnoses_of_folds_are_scored_as_those_of_one_test(diagnosed):
    folds = [diagnosed_fold([f"{fold}_{i}" for i in range(20)], fold) for fold in range(3)]
    folders = [diagnosed(f"fold_{number}", fold) for number, fold in enumerate(folds)]
    images, scores = pooled_scores([folders])
    whole = join_predictions(folds)
    assert images == len(whole.ids) == 60
    right = (whole.probability.argmax(1) == whole.labels).mean()
    assert scores["accuracy"][0] == pytest.approx(right)
    drawn = resampled_scores(whole, {"positive": None})
    assert scores["auc"][1] == pytest.approx(percentile_interval(drawn["auc"]))
    assert scores["auc"][1][0] < scores["auc"][0] < scores["auc"][1][1]
    again, repeated = pooled_scores([folders, folders[::-1]])
    assert again == 60
    assert repeated["auc"][0] == pytest.approx(scores["auc"][0])


def test_a_pool_without_test_has_no_scores(tmp_path):
    assert pooled_scores([[tmp_path / "a", tmp_path / "b"]]) == (0, {})
