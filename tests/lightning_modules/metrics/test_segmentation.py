"""What a test says of masks: at the network's size and at the images' own."""

import math

import pytest
import torch

from common.errors import UserError
from common.geometry import restore
from lightning_modules.metrics import SegmentationScores, boundary_scores, dice_score
from lightning_modules.metrics import overlap_counts as count_overlap

SIZES = [(24, 40), (50, 20), (16, 16)]


def make_case(count=3, size=16):
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(count, 1, size, size)
    mask[..., 4:12, 3:10] = 1
    noise = torch.rand(mask.shape, generator=generator)
    return {"probability": 0.2 + 0.4 * mask + 0.4 * noise}, mask


def test_scores_of_images_and_of_all():
    prediction, mask = make_case()
    scores = SegmentationScores()
    rows = scores.update(prediction, {"mask": mask})
    predicted = prediction["probability"] > 0.5
    assert torch.equal(rows["dice"], dice_score(count_overlap(predicted, mask)))
    assert torch.equal(rows["hd95"], boundary_scores(predicted, mask)["hd95"])
    assert rows["lesion_pixels"].tolist() == [56, 56, 56]
    total = scores.compute()
    assert total["dice"].item() == pytest.approx(rows["dice"].mean().item())
    for name in ("hd95", "assd_relative", "boundary_f1", "uncertainty_correlation"):
        assert total[name].item() == pytest.approx(rows[name].mean().item(), rel=1e-6)
    assert 0.1 < total["calibration_error"] < 0.5
    # They start anew: the next epoch must not see this one.
    scores.update({"probability": mask}, {"mask": mask})
    assert scores.compute()["dice"] == 1


def test_how_images_are_batched_changes_nothing():
    prediction, mask = make_case(5)
    whole, parts = SegmentationScores(), SegmentationScores()
    whole.update(prediction, {"mask": mask})
    for index in (slice(0, 2), slice(2, 5)):
        chance = {"probability": prediction["probability"][index]}
        parts.update(chance, {"mask": mask[index]})
    first, second = whole.compute(), parts.compute()
    assert {k: v.item() for k, v in first.items()} == pytest.approx(
        {k: v.item() for k, v in second.items()}, rel=1e-6
    )


@pytest.mark.parametrize("letterbox", [False, True])
def test_native_scores_are_those_at_the_images_own_size(letterbox):
    prediction, _ = make_case()
    scores = SegmentationScores(resolution="native", letterbox=letterbox)
    truths, expected = [], []
    for index, (height, width) in enumerate(SIZES):
        resized = restore(prediction["probability"][index], (height, width), letterbox)[None]
        truth = torch.zeros(height, width, dtype=torch.uint8)
        truth[height // 4 : height // 2, width // 4 : width // 2] = 1
        truths.append(truth)
        counts = count_overlap(resized > 0.5, truth[None, None])
        expected.append(dice_score(counts).item())
    found = scores.update(prediction, {"mask": torch.ones(3, 1, 16, 16), "native_mask": truths})
    assert found["native_dice"].tolist() == pytest.approx(expected)
    assert found["native_lesion_pixels"].tolist() == [int(truth.sum()) for truth in truths]
    assert {name[:7] for name in found} == {"native_", "finite"}
    assert {name[:7] for name in scores.compute()} == {"native_"}


def test_both_resolutions_are_those_of_either_with_native_first():
    prediction, mask = make_case()
    truths = [torch.ones(size, dtype=torch.uint8).triu() for size in SIZES]
    batch = {"mask": mask, "native_mask": truths}
    rows, totals = {}, {}
    for resolution in ("both", "native", "model"):
        scores = SegmentationScores(resolution=resolution)
        rows[resolution] = scores.update(prediction, batch)
        totals[resolution] = scores.compute()
    for found in (rows, totals):
        expected = {**found["native"], **found["model"]}
        assert found["both"].keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found["both"].items())
        assert not {k for k in found["model"] if k.startswith("native_")}
    assert list(totals["both"]) == [*totals["native"], *totals["model"]]
    assert totals["both"]["native_dice"] != totals["both"]["dice"]
    assert len(totals["native"]) == len(totals["model"])


# Scores that are not 0 at their worst.
WORST = {
    "hd95": math.hypot(16, 16),
    "hd95_relative": 1,
    "assd": math.hypot(16, 16),
    "assd_relative": 1,
    "uncertainty_correlation": -1,
    "expected_dice": 1,
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("truth", ["empty", "full", "lesion"])
@pytest.mark.parametrize("pixels", ["one", "all"])
def test_a_prediction_that_is_not_finite_has_the_worst_scores(value, truth, pixels):
    mask = {"empty": torch.zeros, "full": torch.ones}.get(truth, torch.zeros)(1, 1, 16, 16)
    if truth == "lesion":
        mask[..., 4:9, 3:12] = 1
    probability = mask * 0.8 + 0.1
    probability[..., slice(5, 6) if pixels == "one" else slice(None), 7] = value
    if pixels == "all":
        probability[:] = value
    scores = SegmentationScores(resolution="both", batch_pooled=True)
    batch = {"mask": mask, "native_mask": [mask[0, 0].to(torch.uint8)]}
    rows = scores.update({"probability": probability}, batch)
    total = scores.compute()
    assert rows.pop("finite").tolist() == [0]
    for prefix in ("", "native_"):
        assert rows.pop(f"{prefix}lesion_pixels").item() == mask.sum()
        assert rows.pop(f"{prefix}predicted_pixels").item() == 0
        assert total[f"{prefix}calibration_error"] == 1
        assert total[f"{prefix}referral_dice"] == 0
        assert total[f"{prefix}pooled_accuracy"] == 0
        assert total[f"{prefix}pooled_iou"] == 0
    for name, found in rows.items():
        assert found.item() == pytest.approx(WORST.get(name.removeprefix("native_"), 0)), name
    assert all(values.isfinite() for values in total.values())
    assert total["hard_dice_loss"] == pytest.approx(1, abs=1e-6)
    assert total["batch_pooled_dice"] == 0


def test_one_such_prediction_leaves_the_others_as_they_are():
    prediction, mask = make_case(5)
    broken = prediction["probability"].clone()
    broken[2, 0, 0, 0] = torch.nan
    whole, alone = SegmentationScores(), SegmentationScores()
    rows = whole.update({"probability": broken}, {"mask": mask})
    kept = [0, 1, 3, 4]
    fine = alone.update({"probability": prediction["probability"][kept]}, {"mask": mask[kept]})
    for name, values in fine.items():
        assert torch.equal(rows[name][kept], values)
    total, rest = whole.compute(), alone.compute()
    assert total["dice"].item() == pytest.approx(rest["dice"].item() * 4 / 5)
    error = (4 * rest["calibration_error"].item() + 1) / 5
    assert total["calibration_error"].item() == pytest.approx(error, rel=1e-5)
    # It counts as certain and is not referred.
    assert total["referral_dice"] < rest["referral_dice"]


def test_an_uncertainty_that_is_not_finite_has_the_worst_correlation():
    prediction, mask = make_case()
    uncertainty = torch.full_like(mask, 0.1)
    uncertainty[1, 0, 3, 3] = torch.nan
    rows = SegmentationScores().update({**prediction, "uncertainty": uncertainty}, {"mask": mask})
    assert rows["uncertainty_correlation"].tolist() == [0, -1, 0]
    assert rows["dice"][1] > 0.5


def test_the_uncertainty_of_an_ensemble_is_used():
    prediction, mask = make_case()
    wrong = ((prediction["probability"] > 0.5) != mask.bool()).float()
    alone = SegmentationScores().update(prediction, {"mask": mask})
    knowing = {"probability": prediction["probability"], "uncertainty": wrong}
    told = SegmentationScores().update(knowing, {"mask": mask})
    assert wrong.sum() > 0
    assert (told["uncertainty_correlation"] > alone["uncertainty_correlation"]).any()


@pytest.mark.parametrize("halve", [lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_half_precision_of_the_module_does_not_round_the_scores(halve):
    prediction, mask = make_case(5)
    scores = halve(SegmentationScores())
    half = {"probability": prediction["probability"].bfloat16()}
    # Of 1505 images a bfloat16 would count 256.
    for _ in range(300):
        rows = scores.update(half, {"mask": mask.bfloat16()})
    scores.update({"probability": mask}, {"mask": mask})
    total = scores.compute()
    exact = (rows["dice"].mean() * 300 + 1) / 301
    assert total["dice"].item() == pytest.approx(exact.item(), rel=1e-6)
    assert all(value.isfinite() for value in total.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": "own"}, "metrics.resolution=own does not exist; .*both, model, native"),
        ({"bins": 0}, "metrics.bins=0"),
        ({"bins": 1.5}, "metrics.bins=1.5"),
        ({"tolerance": ".nan"}, "metrics.tolerance=.nan"),
        ({"referral": float("nan")}, "metrics.referral=nan"),
        ({"referral": True}, "metrics.referral=True"),
        ({"tolerance": -1.0}, "metrics.tolerance=-1"),
        ({"referral": 1.0}, "metrics.referral=1"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        SegmentationScores(**settings)
