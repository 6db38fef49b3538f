"""Overlap metrics against the reference, torchmetrics and by hand."""

import pytest
import torch
from torchmetrics.functional import classification as oracle

from lightning_modules.metrics import OverlapMetrics, dice_score, iou_score, overlap_counts


def test_pooled_scores_match_the_reference(golden, manifest):
    values = golden("metrics")
    mean = torch.zeros_like(values["mask"])
    for member, sample in enumerate(values["samples"]):
        mean += (sample - mean) / (member + 1)
    torch.testing.assert_close(mean, values["mean_pred"], rtol=0, atol=1e-6)
    probability = (mean.clamp(-1, 1) + 1) / 2
    counts = overlap_counts(probability > 0.5, values["mask"])
    expected = torch.stack([values[key] for key in ("tp", "fp", "fn", "tn")], dim=1)
    assert torch.equal(counts, expected)

    metrics = OverlapMetrics()
    metrics.update(counts[:4])
    metrics.update(counts[4:])
    scores = metrics.compute()
    micro = manifest["files"]["metrics.npz"]["micro"]
    for ours, theirs in {
        "pooled_f1": "F1",
        "pooled_accuracy": "Accuracy",
        "pooled_precision": "Precision",
        "pooled_specificity": "Specificity",
        "pooled_sensitivity": "Recall",
        "pooled_iou": "Jaccard",
    }.items():
        assert scores[ours].item() == pytest.approx(micro[theirs], abs=1e-6)


def test_scores_match_torchmetrics():
    torch.manual_seed(3)
    predicted, truth = torch.rand(6, 1, 9, 7) > 0.4, (torch.rand(6, 1, 9, 7) > 0.6).float()
    metrics = OverlapMetrics()
    metrics.update(overlap_counts(predicted, truth))
    scores = metrics.compute()
    flat = predicted.int().flatten(), truth.int().flatten()
    assert scores["pooled_f1"].item() == pytest.approx(oracle.binary_f1_score(*flat).item())
    assert scores["pooled_iou"].item() == pytest.approx(oracle.binary_jaccard_index(*flat).item())
    per_image = [
        oracle.binary_f1_score(p.int().flatten(), m.int().flatten()).item()
        for p, m in zip(predicted, truth, strict=True)
    ]
    assert scores["dice"].item() == pytest.approx(sum(per_image) / 6)


@pytest.mark.parametrize(
    ("counts", "dice", "iou"),
    [
        ([0, 0, 0, 9], 1, 1),
        ([0, 4, 0, 5], 0, 0),
        ([0, 0, 4, 5], 0, 0),
        ([9, 0, 0, 0], 1, 1),
        ([2, 1, 1, 5], 2 / 3, 1 / 2),
    ],
)
def test_per_image_scores_are_defined_for_empty_masks(counts, dice, iou):
    counts = torch.tensor([counts])
    assert dice_score(counts).item() == pytest.approx(dice)
    assert iou_score(counts).item() == pytest.approx(iou)


def test_mean_over_images_is_not_the_pooled_score():
    metrics = OverlapMetrics()
    metrics.update(torch.tensor([[1, 0, 0, 99], [0, 50, 50, 0]]))
    scores = metrics.compute()
    assert scores["dice"] == 0.5
    assert scores["pooled_f1"].item() == pytest.approx(2 / 102)


def test_counts_stay_exact_beyond_float32():
    metrics = OverlapMetrics()
    metrics.update(torch.tensor([[2**25, 1, 0, 0]] * 3))
    assert metrics.counts.tolist() == [3 * 2**25, 3, 0, 0]
