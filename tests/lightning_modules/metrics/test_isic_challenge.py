"""The scores are those of `isic-challenge-scoring`, the ISIC challenges' own program."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from isic_challenge_scoring import ClassificationMetric, ClassificationScore, SegmentationScore
from isic_challenge_scoring import metrics as challenge
from isic_challenge_scoring.load_image import ImagePair

from common.geometry import restore
from datamodules.synthetic import synthesise_lesion
from lightning_modules.metrics import OverlapMetrics, SegmentationScores, classification_scores
from lightning_modules.metrics import overlap_counts as count_overlap

pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword in Series.rename")
NEAR = {"rel": 0, "abs": 1e-6}
PAIRS = 60
# Theirs of one image: ours of all pixels of that image.
OF_ONE_IMAGE = {
    "accuracy": "pooled_accuracy",
    "sensitivity": "pooled_sensitivity",
    "specificity": "pooled_specificity",
    "jaccard": "pooled_iou",
    "dice": "pooled_f1",
}


def make_pairs():
    """Return a probability `(1, 32, 32)` and a mask `(H, W)` for each of 60 images.

    Sizes differ. Among the masks are empty, full and tiny ones, and so are predictions.
    """
    rng = np.random.default_rng(0)
    pairs = []
    for index in range(PAIRS):
        height, width = rng.integers(20, 150, 2)
        _, lesion = synthesise_lesion(1, index)
        rows, columns = (
            np.linspace(0, side - 1, count).astype(int)
            for side, count in zip(lesion.shape, (height, width), strict=True)
        )
        mask = lesion[np.ix_(rows, columns)]
        small = torch.nn.functional.interpolate(
            torch.from_numpy(mask)[None, None].float(), (32, 32), mode="bilinear", antialias=True
        )[0]
        noise = torch.from_numpy(rng.random((1, 32, 32))).float()
        shift = tuple(int(step) for step in rng.integers(-6, 7, 2))
        chance = (small * 0.7 + noise * 0.3).roll(shift, (1, 2))
        if index % 10 == 0:
            mask = np.zeros_like(mask)
        elif index % 10 == 1:
            mask = np.ones_like(mask)
        elif index % 10 == 2:
            mask = np.zeros_like(mask)
            mask[height // 2, width // 2] = 1
        if index % 4 == 0:
            chance = torch.zeros_like(chance)
        elif index % 4 == 1 and index % 10 < 3:
            chance = torch.ones_like(chance)
        pairs.append((chance, mask))
    return pairs


def as_submitted(name, predicted, mask):
    """Return an image of a submission, as the challenge's program holds it."""
    pair = ImagePair(truth_file=Path(name))
    pair.image_id = name
    pair.truth_image, pair.prediction_image = mask * 255, predicted.astype(np.uint8) * 255
    return pair


def test_scores_of_masks_are_the_challenges():
    scores = SegmentationScores(resolution="native")
    submitted, seen = [], set()
    for index, (chance, mask) in enumerate(make_pairs()):
        rows = scores.update({"probability": chance[None]}, {"native_mask": [mask]})
        predicted = restore(chance, mask.shape)[0].numpy() > 0.5
        submitted.append(as_submitted(str(index), predicted, mask))
        theirs = SegmentationScore(submitted[-1:]).macro_average
        for ours, name in (
            ("native_dice", "dice"),
            ("native_iou", "jaccard"),
            ("native_threshold_jaccard", "threshold_jaccard"),
        ):
            assert rows[ours].item() == pytest.approx(theirs[name], **NEAR)
        seen.add((predicted.any(), mask.any(), bool(theirs["threshold_jaccard"])))
        # With an empty mask sensitivity is 1 in both, with a full one specificity.
        alone = OverlapMetrics()
        tensors = (torch.from_numpy(values)[None, None] for values in (predicted, mask))
        alone.update(count_overlap(*tensors))
        found = alone.compute()
        for name, ours in OF_ONE_IMAGE.items():
            assert found[ours].item() == pytest.approx(theirs[name], **NEAR)
    assert len(submitted) == PAIRS
    assert {(False, False, True), (False, True, False), (True, False, False)} <= seen
    assert {(True, True, False), (True, True, True)} <= seen
    total, theirs = scores.compute(), SegmentationScore(submitted).macro_average
    assert theirs["threshold_jaccard"] < theirs["jaccard"]
    for ours, name in (("dice", "dice"), ("iou", "jaccard")):
        assert total[f"native_{ours}"].item() == pytest.approx(theirs[name], **NEAR)
    found = total["native_threshold_jaccard"].item()
    assert found == pytest.approx(SegmentationScore(submitted).overall, **NEAR)
    # Over several images theirs are means over images and ours pool the pixels.
    pooled = total["native_pooled_accuracy"].item()
    assert abs(pooled - theirs["accuracy"]) > 1e-3


@pytest.mark.parametrize(
    ("jaccard", "expected"), [(0.649, 0), (0.65, 0.65), (0.651, 0.651), (1, 1), (0, 0)]
)
def test_the_threshold_includes_its_value(jaccard, expected):
    mask = np.ones((1, 1000), np.uint8)
    predicted = np.arange(1000)[None] < round(1000 * jaccard)
    scores = OverlapMetrics()
    tensors = (torch.from_numpy(values)[None, None] for values in (predicted, mask))
    scores.update(count_overlap(*tensors))
    theirs = SegmentationScore([as_submitted("a", predicted, mask)]).overall
    assert scores.compute()["threshold_jaccard"].item() == pytest.approx(theirs, **NEAR)
    assert theirs == pytest.approx(expected, **NEAR)


def make_table(num_classes, count=200, hard=False):
    rng = np.random.default_rng(num_classes)
    share = 2.0 ** -np.arange(num_classes)
    label = np.append(
        np.arange(num_classes), rng.choice(num_classes, count - num_classes, p=share / share.sum())
    )
    logits = rng.normal(size=(count, num_classes)) + 1.2 * np.eye(num_classes)[label]
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if hard:
        chance = np.eye(num_classes)[chance.argmax(1)]
    return chance, label


def challenge_score(chance, label):
    names = [f"class {index}" for index in range(chance.shape[1])]
    truth = pd.DataFrame(np.eye(len(names))[label], columns=names)
    weights = pd.DataFrame(1.0, truth.index, ["score_weight", "validation_weight"])
    predicted = pd.DataFrame(chance, columns=names)
    return ClassificationScore(truth, predicted, weights, ClassificationMetric.BALANCED_ACCURACY)


@pytest.mark.parametrize("num_classes", [7, 8])
@pytest.mark.parametrize("hard", [False, True])
def test_scores_of_diagnoses_are_the_challenges(num_classes, hard):
    chance, label = make_table(num_classes, hard=hard)
    theirs, ours = challenge_score(chance, label), classification_scores(chance, label)
    assert ours["balanced_accuracy"] == pytest.approx(theirs.overall, **NEAR)
    shared = {"auc": "auc", "average_precision": "ap"}
    # They predict a class from a probability of a half on, we the most probable one, which is the
    # same where predictions are certain.
    if hard:
        shared |= {"recall": "sensitivity", "precision": "ppv", "f1": "dice"}
    for name, other in shared.items():
        assert ours[name] == pytest.approx(theirs.macro_average[other], **NEAR)
        by_class = [ours[f"{name}/{index}"] for index in range(num_classes)]
        assert by_class == pytest.approx(theirs.per_category[other].tolist(), **NEAR)
    if not hard:
        assert ours["recall"] > theirs.macro_average["sensitivity"] + 0.01


def test_a_class_that_is_never_predicted_is_scored_otherwise():
    chance, label = np.eye(3)[[0, 1, 0, 1]], np.array([0, 1, 2, 2])
    theirs, ours = challenge_score(chance, label), classification_scores(chance, label)
    assert (ours["precision/2"], theirs.per_category.ppv.iloc[2]) == (0, 1)
    assert ours["balanced_accuracy"] == pytest.approx(theirs.overall, **NEAR)


def test_equal_probabilities_are_scored_otherwise():
    chance, label = np.full((2, 2), 0.5), np.array([0, 1])
    # The first of equals is predicted here, none of them there.
    assert classification_scores(chance, label)["balanced_accuracy"] == 0.5
    assert challenge_score(chance, label).overall == 0


def test_a_class_without_images_is_left_out_of_the_balanced_accuracy():
    chance, label = make_table(7)
    kept = label != 3
    chance, label = chance[kept], label[kept]
    names = list(range(7))
    truth, predicted = (
        pd.DataFrame(values, columns=names) for values in (np.eye(7)[label], chance)
    )
    theirs = challenge.balanced_multiclass_accuracy(truth, predicted, pd.Series(1.0, truth.index))
    ours = classification_scores(chance, label)["balanced_accuracy"]
    assert ours == pytest.approx(theirs, **NEAR)
