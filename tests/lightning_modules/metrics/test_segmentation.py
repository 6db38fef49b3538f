"""What a test says of masks: at the network's size and at the images' own."""

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
    assert found["dice"].tolist() == pytest.approx(expected)
    assert found["lesion_pixels"].tolist() == [int(truth.sum()) for truth in truths]


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
        ({"resolution": "own"}, "metrics.resolution=own does not exist; .*native"),
        ({"bins": 0}, "metrics.bins=0"),
        ({"tolerance": -1.0}, "metrics.tolerance=-1"),
        ({"referral": 1.0}, "metrics.referral=1"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        SegmentationScores(**settings)
