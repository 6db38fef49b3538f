"""Scores pooled over a batch, against the references and by hand."""

import pytest
import torch

from lightning_modules.metrics import (
    BatchPooledScores,
    SegmentationScores,
    batch_pooled_scores,
    dice_score,
    overlap_counts,
)

KEYS = [f"batch_pooled_{name}" for name in ("dice", "iou", "precision", "recall")]
KEYS += ["hard_dice_loss"]


def test_scores_are_the_deeplab_references(golden_cases):
    cases = golden_cases("deeplab_kd", "batch_metrics")
    assert len(cases) == 5
    for case in cases:
        scores = batch_pooled_scores(case.inputs["logits"].sigmoid(), case.inputs["target"])
        assert len(case.outputs) == 4
        for name, expected in case.outputs.items():
            torch.testing.assert_close(scores[name], expected, rtol=1e-6, atol=1e-9)


def test_the_hard_dice_loss_is_the_deeplab_references(golden_cases):
    cases = golden_cases("deeplab_kd", "dice_hard")
    assert len(cases) == 5
    for case in cases:
        scores = batch_pooled_scores(case.inputs["logits"].sigmoid(), case.inputs["target"])
        loss = case.outputs["loss"].double()
        torch.testing.assert_close(scores["hard_dice_loss"], loss, **case.near("loss"))


def test_the_dice_of_images_is_that_of_the_distilled_unet(golden_cases):
    cases = golden_cases("distilled_unet", "dice_score")
    assert len(cases) == 2
    for case in cases:
        predicted = case.inputs["logits"].sigmoid() > case.params["threshold"]
        dice = dice_score(overlap_counts(predicted, case.inputs["target"]))
        # Its small addend to both sides of the fraction is what makes empty images 1 there as well.
        torch.testing.assert_close(dice, case.outputs["per_image"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dice.mean(), case.outputs["mean"], rtol=1e-6, atol=1e-6)


def batch(*rows):
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


# Of 4 predicted pixels, one of which has a grey edge, the batch's lesion of 4 has 2.5.
PROBABILITY = batch([0.9, 0.8, 0.2, 0.5], [0.7, 0.6, 0.1, 0.0])
MASK = batch([1.0, 0.5, 1.0, 0.5], [1.0, 0.0, 0.0, 0.0])


def test_values_by_hand():
    scores = batch_pooled_scores(PROBABILITY, MASK)
    assert {key: value.item() for key, value in scores.items()} == pytest.approx(
        {
            "dice": 5 / 8,
            "iou": 2.5 / 5.5,
            "precision": 2.5 / 4,
            "recall": 2.5 / 4,
            "hard_dice_loss": 3 / 8,
        }
    )


def test_batches_count_alike_whatever_their_size():
    metric = BatchPooledScores()
    metric.update(PROBABILITY, MASK)
    metric.update(PROBABILITY[1:], MASK[1:])
    scores = metric.compute()
    assert list(scores) == KEYS
    assert scores["batch_pooled_dice"].item() == pytest.approx((5 / 8 + 2 / 3) / 2)
    assert scores["batch_pooled_recall"].item() == pytest.approx((5 / 8 + 1) / 2)
    assert scores["hard_dice_loss"].item() == pytest.approx((3 / 8 + 1 / 3) / 2)
    assert all(value.dtype == torch.float32 for value in scores.values())
    metric.reset()
    metric.update(PROBABILITY, MASK)
    assert metric.compute()["batch_pooled_dice"] == 5 / 8


def test_processes_count_by_their_batches():
    parts = [BatchPooledScores() for _ in range(2)]
    for _ in range(3):
        parts[0].update(PROBABILITY, MASK)
    parts[1].update(PROBABILITY[1:], MASK[1:])
    parts[0].totals += parts[1].totals
    parts[0].batches += parts[1].batches
    merged = parts[0].compute()["batch_pooled_dice"]
    assert merged.item() == pytest.approx((3 * 5 / 8 + 2 / 3) / 4)
    reductions = BatchPooledScores()._reductions
    assert {function.__name__ for function in reductions.values()} == {"dim_zero_sum"}


@pytest.mark.parametrize("resolution", ["model", "native"])
def test_a_test_has_them_at_the_networks_size_on_request(resolution):
    native = [torch.ones(3, 5, dtype=torch.uint8)] * 2
    probability, mask = (values.expand(2, 1, 4, 4) for values in (PROBABILITY, MASK))
    plain = SegmentationScores(resolution=resolution)
    scores = SegmentationScores(resolution=resolution, batch_pooled=True)
    for metric in (plain, scores):
        for size in (2, 1):
            part = {"mask": mask[:size], "native_mask": native[:size]}
            rows = metric.update({"probability": probability[:size]}, part)
            assert not set(KEYS) & set(rows), "no score of an image"
    expected = BatchPooledScores()
    expected.update(probability, mask)
    expected.update(probability[:1], mask[:1])
    usual, total = plain.compute(), scores.compute()
    assert total == {**usual, **expected.compute()}
    scores.update({"probability": mask}, {"mask": mask, "native_mask": native})
    assert scores.compute()["batch_pooled_recall"] == 0.75, "forgets the last"


def test_half_precision_of_the_module_does_not_round_them():
    scores = SegmentationScores(batch_pooled=True).to(torch.bfloat16)
    for _ in range(300):
        scores.update({"probability": PROBABILITY.bfloat16()}, {"mask": MASK.bfloat16()})
    assert scores.compute()["batch_pooled_iou"].item() == pytest.approx(2.5 / 5.5, rel=1e-6)
