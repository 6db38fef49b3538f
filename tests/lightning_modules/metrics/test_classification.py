"""Scores of class probabilities: against scikit-learn, the SSD-KD reference and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as theirs

from common.errors import UserError
from lightning_modules.metrics import (
    ClassificationScores,
    classification_scores,
    confusion_matrix,
    reliability,
    roc_curves,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "ssd_kd" / "classification_metrics"
CLASSES = ("AK", "BCC", "MEL", "NV")


def make_case(count=120, num_classes=4, seed=0, decimals=None):
    """Make probabilities that know something of the labels; rounded ones have many ties."""
    rng = np.random.default_rng(seed)
    label = np.concatenate(
        [np.arange(num_classes), rng.integers(0, num_classes, count - num_classes)]
    )
    logits = rng.normal(size=(count, num_classes))
    logits[np.arange(count), label] += 1.2
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return (chance if decimals is None else chance.round(decimals)), label


def sklearn_scores(chance, label, weight):
    """Return the same scores of one replicate, for classes that are all present."""
    predicted, every = chance.argmax(1), np.arange(chance.shape[1])
    settings = {"labels": every, "zero_division": 0, "sample_weight": weight}
    precision, recall, f1, _ = theirs.precision_recall_fscore_support(label, predicted, **settings)
    hot = (label[:, None] == every).astype(int)
    columns = [(hot[:, c], chance[:, c]) for c in every]
    by_class = {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auc": [theirs.roc_auc_score(*pair, sample_weight=weight) for pair in columns],
        "average_precision": [
            theirs.average_precision_score(*pair, sample_weight=weight) for pair in columns
        ],
    }
    fpr, tpr, _ = theirs.roc_curve(*columns[2], sample_weight=weight, drop_intermediate=False)
    return {
        "accuracy": theirs.accuracy_score(label, predicted, sample_weight=weight),
        "balanced_accuracy": theirs.balanced_accuracy_score(label, predicted, sample_weight=weight),
        "mel_sensitivity": tpr[fpr <= 0.1 + 1e-9].max(),
        **{name: np.mean(values) for name, values in by_class.items()},
        **{f"{n}/{c}": v for n, vs in by_class.items() for c, v in zip(CLASSES, vs, strict=True)},
    }


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_the_reference_scores_are_matched(case):
    described = json.loads(GOLDEN.with_suffix(".json").read_text())
    near = {"rel": described["tolerance"]["loss_rtol"], "abs": described["tolerance"]["loss_atol"]}
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        golden = {key.removeprefix(f"{case}/"): arrays[key] for key in arrays if case in key}
    chance, label = golden["in/probs"], golden["in/labels"]
    num_classes = chance.shape[1]
    found = classification_scores(chance, label)
    for name, reference in (
        ("accuracy", "accuracy"),
        ("top2_accuracy", "top2_accuracy"),
        ("balanced_accuracy", "balanced_accuracy"),
        ("auc", "auc_macro_ovr"),
        ("f1", "f1_macro"),
    ):
        assert found[name] == pytest.approx(float(golden[f"out/{reference}"]), **near)
    for name in ("precision", "recall", "auc"):
        values = [found[f"{name}/{index}"] for index in range(num_classes)]
        assert values == pytest.approx(golden[f"out/{name}_per_class"].tolist(), **near)
    matrix = confusion_matrix(chance, label, num_classes)
    assert np.array_equal(matrix, golden["out/conf_matrix"])
    assert np.array_equal(matrix, confusion_matrix(chance.argmax(1), label, num_classes))
    curves = roc_curves(chance, label)
    for name in ("macro", "micro"):
        assert curves[name].auc == pytest.approx(float(golden[f"out/auc_curve_{name}"]), **near)
    for index in range(num_classes):
        assert curves[index].auc == pytest.approx(found[f"auc/{index}"])


@pytest.mark.parametrize("decimals", [None, 1])
def test_replicates_are_scored_as_scikit_learn_scores_weighted_images(decimals):
    chance, label = make_case(decimals=decimals)
    rng = np.random.default_rng(1)
    weights = rng.multinomial(len(label), np.full(len(label), 1 / len(label)), size=5)
    weights[:, :4] += 1  # All classes are drawn.
    weights[0] = 1
    found = classification_scores(chance, label, weights, classes=CLASSES, positive="mel")
    once = classification_scores(chance, label, classes=CLASSES, positive="mel")
    assert all(values.shape == (5,) for values in found.values())
    for row, weight in enumerate(weights):
        expected = sklearn_scores(chance, label, weight)
        assert {name: found[name][row] for name in expected} == pytest.approx(expected, rel=1e-9)
        # A replicate is the same as its images, each as often as it was drawn.
        drawn = np.repeat(np.arange(len(label)), weight)
        images = (chance[drawn], label[drawn])
        spelt_out = classification_scores(*images, classes=CLASSES, positive="mel")
        assert {k: v[row] for k, v in found.items()} == pytest.approx(spelt_out, rel=1e-9)
    assert {k: v[0] for k, v in found.items()} == pytest.approx(once, rel=1e-9)
    if decimals is None:
        top2 = theirs.top_k_accuracy_score(label, chance, k=2)
        assert once["top2_accuracy"] == pytest.approx(top2)


def test_many_replicates_are_scored_in_blocks(monkeypatch):
    chance, label = make_case(50)
    weights = np.random.default_rng(0).integers(0, 3, (7, 50))
    whole = classification_scores(chance, label, weights)
    monkeypatch.setattr("lightning_modules.metrics.classification.BLOCK", 150)
    parts = classification_scores(chance, label, weights)
    assert whole.keys() == parts.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-12)


def test_absent_classes_are_nan_and_left_out_of_the_means():
    chance, label = make_case(60)
    kept = label != 1
    chance, label = chance[kept], label[kept]
    assert (chance.argmax(1) == 1).any(), "it is predicted all the same"
    found = classification_scores(chance, label, classes=CLASSES, positive="BCC")
    for name in ("precision", "recall", "f1", "auc", "average_precision"):
        assert np.isnan(found[f"{name}/BCC"])
        rest = [found[f"{name}/{key}"] for key in ("AK", "MEL", "NV")]
        assert found[name] == pytest.approx(np.mean(rest))
    assert found["balanced_accuracy"] == found["recall"]
    assert np.isnan(found["bcc_sensitivity"])
    assert set(roc_curves(chance, label)) == {0, 2, 3, "macro", "micro"}
    assert confusion_matrix(chance, label, 4)[1].sum() == 0
    # A class may be missing in some replicates only.
    weights = np.stack([np.ones(len(label)), label != 2])
    found = classification_scores(chance, label, weights, classes=CLASSES)
    assert np.isnan(found["auc/MEL"]).tolist() == [False, True]
    assert np.isfinite(found["auc"]).all()


def test_a_single_class_has_no_auc():
    chance = np.array([[0.7, 0.3], [0.4, 0.6]])
    found = classification_scores(chance, [0, 0], positive="0")
    assert found["accuracy"] == found["recall"] == found["recall/0"] == 0.5
    assert found["average_precision"] == 1
    assert np.isnan([found["auc"], found["auc/0"], found["0_sensitivity"]]).all()
    assert set(roc_curves(chance, [0, 0])) == {"micro"}


def test_a_present_class_that_is_never_predicted_has_no_precision():
    chance = np.array([[0.9, 0.1], [0.8, 0.2]])
    found = classification_scores(chance, [0, 1])
    assert (found["precision/0"], found["precision/1"], found["f1/1"]) == (0.5, 0, 0)


def test_ties_by_hand():
    # Whatever is said of all images alike tells nothing; the first of equals is predicted.
    found = classification_scores(np.full((4, 4), 0.25), [0, 1, 2, 3])
    assert (found["accuracy"], found["top2_accuracy"], found["auc"]) == (0.25, 0.5, 0.5)
    assert found["average_precision"] == 0.25
    assert found["calibration_error"] == 0


def test_the_sensitivity_is_the_highest_that_the_specificity_allows():
    # Nine of ten naevi may lie below the threshold at the least: one of them above it.
    naevi = np.array([0.8, 0.6, 0.5, *np.linspace(0, 0.3, 7)])
    melanomas = np.array([0.9, 0.7, 0.6, 0.55])
    chance = np.concatenate((naevi, melanomas))
    pair = (np.stack((1 - chance, chance), axis=1), np.repeat([0, 1], [10, 4]))
    for specificity, expected in ((0.95, 0.25), (0.9, 0.5), (0.8, 1.0), (1.0, 0.25)):
        found = classification_scores(
            *pair, classes=("NV", "MEL"), positive="Mel", specificity=specificity
        )
        assert found["mel_sensitivity"] == expected


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_the_calibration_error_is_that_of_the_reliability_diagram(bins):
    chance, label = make_case()
    found = reliability(chance, label, bins)
    highest, correct = chance.max(1), chance.argmax(1) == label
    rows = np.minimum((highest * bins).astype(int), bins - 1)
    error = 0
    for index in range(bins):
        there = rows == index
        assert found.count[index] == there.sum()
        if there.any():
            assert found.confidence[index] == pytest.approx(highest[there].mean())
            assert found.accuracy[index] == pytest.approx(correct[there].mean())
            error += abs((highest - correct)[there].sum()) / len(label)
        else:
            assert np.isnan(found.accuracy[index])
    assert found.error == pytest.approx(error)
    scores = classification_scores(chance, label, bins=bins)
    assert scores["calibration_error"] == pytest.approx(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("classes", [1, slice(None)])
@pytest.mark.parametrize("truth", [0, 1])
def test_an_image_without_finite_probabilities_is_wrong_in_every_score(value, classes, truth):
    chance, label = make_case(30)
    label[3] = truth
    broken = chance.copy()
    broken[3, classes] = value
    others = np.arange(30) != 3
    found, rest = (
        classification_scores(broken, label),
        classification_scores(chance[others], label[others]),
    )
    for name in ("accuracy", "top2_accuracy"):
        assert found[name] == pytest.approx(rest[name] * 29 / 30)
    assert found["calibration_error"] == pytest.approx((rest["calibration_error"] * 29 + 1) / 30)
    same = (label == truth).sum()
    assert found[f"recall/{truth}"] == pytest.approx(rest[f"recall/{truth}"] * (same - 1) / same)
    # No class is predicted, not even the first one.
    for index in range(len(CLASSES)):
        assert found[f"precision/{index}"] == pytest.approx(rest[f"precision/{index}"])
        # It loses against all others, where it has the class and where it does not.
        negatives, positives = (label != index).sum(), (label == index).sum()
        lost = positives if index == truth else negatives
        shrunk = rest[f"auc/{index}"] * (lost - 1) / lost
        assert found[f"auc/{index}"] == pytest.approx(shrunk)
        assert roc_curves(broken, label)[index].auc == pytest.approx(shrunk)
        assert found[f"average_precision/{index}"] < rest[f"average_precision/{index}"]
    assert confusion_matrix(broken, label, len(CLASSES)).sum() == 29
    assert reliability(broken, label).error == pytest.approx(found["calibration_error"])
    metric = ClassificationScores(CLASSES)
    rows = metric.update(torch.from_numpy(broken), torch.from_numpy(label))
    assert (rows["correct"][3], rows["confidence"][3]) == (0, 0)
    total = metric.compute()
    assert total["accuracy"].item() == pytest.approx(found["accuracy"])
    assert all(score.isfinite() for score in total.values())


def test_of_two_classes_such_an_image_is_not_among_the_two_most_probable():
    found = classification_scores([[0.9, 0.1], [np.nan, np.nan]], [0, 0])
    assert (found["top2_accuracy"], found["accuracy"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("chance", "label", "settings", "message"),
    [
        (np.ones((2, 3)), [0], {}, r"\(2, 3\) do not match labels \(1,\)"),
        (np.ones((0, 3)), [], {}, "no images"),
        (np.ones((1, 3)), [3], {}, "from 0 to 2"),
        (np.ones((1, 3)), [0], {"classes": ["a"]}, "3 probabilities .* 1 names"),
        (np.ones((1, 2)), [0], {"classes": ["a", "b"], "positive": "c"}, "none of a, b"),
        (np.ones((1, 2)), [0], {"weights": [1]}, "do not match 1 images"),
    ],
)
def test_what_does_not_fit_is_refused(chance, label, settings, message):
    with pytest.raises(ValueError, match=message):
        classification_scores(chance, label, **settings)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_metric_is_exact_however_images_come():
    chance, label = (torch.from_numpy(values) for values in make_case(97))
    chance = chance.float()
    whole, parts = ClassificationScores(CLASSES), ClassificationScores(CLASSES).bfloat16()
    rows = whole.update(chance, label)
    assert rows["correct"].tolist() == (chance.argmax(1) == label).int().tolist()
    assert torch.equal(rows["confidence"], chance.max(1).values)
    for index in torch.randperm(97).split(10):
        parts.update(chance[index], label[index])
    scores = whole.compute()
    assert scores == parts.compute(), "to the last bit"
    expected = classification_scores(chance, label, classes=CLASSES, positive="MEL")
    assert {k: v.item() for k, v in scores.items()} == pytest.approx(expected, rel=1e-6)
    assert all(v.dtype == torch.float32 and v.ndim == 0 for v in scores.values())
    assert whole.compute() == {}, "the next epoch must not see this one"


def score_part(rank, folder):
    """Score images of which another process has all or, as the case may be, a part."""
    group = {"init_method": f"file://{folder}/group", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **group)
    chance, label = (torch.from_numpy(values) for values in make_case(41))
    results = []
    for first in (0, 30):
        metric = ClassificationScores(CLASSES)
        part = slice(first) if rank else slice(first, None)
        if len(label[part]):
            metric.update(chance[part], label[part])
        results.append(metric.compute())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_are_merged_also_those_without_images(tmp_path):
    torch.multiprocessing.spawn(score_part, (str(tmp_path),), nprocs=2)
    alone = ClassificationScores(CLASSES)
    alone.update(*(torch.from_numpy(values) for values in make_case(41)))
    expected = alone.compute()
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == [expected, expected]


def test_scores_that_are_no_numbers_are_left_out():
    metric = ClassificationScores(CLASSES)
    metric.update(torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1]]), torch.tensor([0, 1]))
    scores = metric.compute()
    assert {"accuracy", "auc", "auc/AK", "recall/BCC"} <= set(scores)
    assert not {"auc/MEL", "recall/NV", "mel_sensitivity"} & set(scores)


def test_melanoma_need_not_be_a_class():
    assert ClassificationScores(("akiec", "mel")).positive == "mel"
    assert ClassificationScores(("Malignant", "Melanoma")).positive == "Melanoma"
    assert ClassificationScores(("benign", "malignant")).positive == "malignant"
    assert ClassificationScores(("bkl", "nv")).positive is None
    assert ClassificationScores(CLASSES, positive=None).positive is None
    assert ClassificationScores(("0", "1"), positive=1).positive == "1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bins": 0}, "metrics.bins=0"),
        ({"specificity": 1.0}, "metrics.specificity=1.0"),
        ({"specificity": 0.0}, "metrics.specificity=0.0"),
        ({"positive": "melanoma"}, "metrics.positive=melanoma .* AK, BCC, MEL, NV"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        ClassificationScores(CLASSES, **settings)
