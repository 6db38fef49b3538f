"""Pictures of sampled masks: what is drawn, and when."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.pictures import PREDICTION_COLOUR, TRUTH_COLOUR
from lightning_modules.callbacks import Pictures
from lightning_modules.callbacks.pictures import CASES


def make_trainer(step=7):
    return SimpleNamespace(is_global_zero=True, sanity_checking=False, global_step=step, loggers=[])


def make_batch(count, size=64):
    mask = torch.zeros(count, 1, size, size)
    mask[..., 10:30, 10:30] = 1
    return {"image": torch.zeros(count, 3, size, size), "mask": mask, "id": list("abc")[:count]}


def draw(tmp_path, num_images, batch, outputs, batches=1):
    callback, trainer = Pictures(tmp_path, num_images), make_trainer()
    callback.on_validation_start(trainer, None)
    for index in range(batches):
        callback.on_validation_batch_end(trainer, None, outputs, batch, index)
    callback.on_validation_end(trainer, None)
    return tmp_path / "samples" / "step_0000007.png"


def test_a_row_shows_image_truth_sample_and_both_outlines(tmp_path):
    batch = make_batch(1)
    probability = torch.zeros_like(batch["mask"])
    probability[..., 10:30, 40:60] = 0.8
    path = draw(tmp_path, 4, batch, {"probability": probability})
    picture = np.asarray(Image.open(path)).astype(int)
    assert picture.shape == (128, 4 * 128 + 6, 3), "64 px are shown twice as large"
    image, truth, sample, overlay = (picture[:, k * 130 : k * 130 + 128] for k in range(4))
    assert image.max() == 0
    assert (truth[:, :, 0] == 255).sum() == (2 * 20) ** 2
    assert set(np.unique(sample)) == {0, int(0.8 * 255)}
    assert (overlay == TRUTH_COLOUR).all(-1)[20:60, 20].all()
    assert (overlay == PREDICTION_COLOUR).all(-1)[20:60, 80].all()


def test_at_most_the_asked_number_of_rows_is_drawn(tmp_path):
    batch = make_batch(3)
    path = draw(tmp_path, 5, batch, {"probability": batch["mask"]}, batches=2)
    assert Image.open(path).height == 5 * 128 + 4 * 2


def test_batches_without_samples_draw_nothing(tmp_path):
    assert not draw(tmp_path, 5, make_batch(2), {}).exists()
    assert not draw(tmp_path, 0, make_batch(2), {"probability": make_batch(2)["mask"]}).exists()


@pytest.mark.parametrize("missing", ["mask", "map", "output"])
def test_diagnoses_and_unknown_masks_are_not_drawn(tmp_path, missing):
    batch = make_batch(2)
    outputs = {
        "probability": torch.full((2, 4), 0.25) if missing == "map" else batch["mask"],
        "per_image": {"correct": torch.ones(2)},
    }
    if missing == "mask":
        del batch["mask"]
    if missing == "output":
        outputs = None
    assert not draw(tmp_path, 5, batch, outputs).exists()
    callback, trainer = Pictures(tmp_path, 5), make_trainer()
    callback.on_test_start(trainer, None)
    callback.on_test_batch_end(trainer, None, outputs, batch, 0)
    callback.on_test_end(trainer, None)
    assert not (tmp_path / "samples").exists()


def test_a_test_leaves_its_best_median_and_worst_images(tmp_path):
    # The brightness of an image says its Dice; in which order they come must not matter.
    order = [3, 0, 6, 2, 5, 1, 4]
    callback, trainer = Pictures(tmp_path, 2), make_trainer()
    callback.on_test_start(trainer, None)
    for index in order:
        batch = make_batch(1)
        batch["image"][..., 0, 0], batch["image"][..., 1, 1] = 1, index / 6
        scores = {"dice": torch.tensor([index / 6])}
        outputs = {"probability": batch["mask"], "per_image": scores}
        callback.on_test_batch_end(trainer, None, outputs, {**batch, "id": [f"i{index}"]}, 0)
    callback.on_test_end(trainer, None)
    shown = {}
    for case in CASES:
        picture = np.asarray(Image.open(tmp_path / "samples" / f"{case}.png")).astype(int)
        assert picture.shape[0] == 3 * 128 + 2 * 2
        shown[case] = [round(picture[row * 130 + 2, 2, 0] / 255 * 6) for row in range(3)]
    assert shown == {"best": [4, 5, 6], "median": [2, 3, 4], "worst": [0, 1, 2]}
    assert Image.open(tmp_path / "samples" / "test.png").height == 2 * 128 + 2


def test_a_test_of_one_image_has_its_cases(tmp_path):
    callback, trainer, batch = Pictures(tmp_path, 2), make_trainer(), make_batch(1)
    callback.on_test_start(trainer, None)
    scores = {"dice": torch.tensor([0.5])}
    outputs = {"probability": batch["mask"], "per_image": scores}
    callback.on_test_batch_end(trainer, None, outputs, batch, 0)
    callback.on_test_end(trainer, None)
    assert all((tmp_path / "samples" / f"{case}.png").is_file() for case in CASES)


def test_soft_masks_are_shown_where_they_are_above_one_half(tmp_path):
    callback, trainer, batch = Pictures(tmp_path, 1), make_trainer(), make_batch(1)
    batch["mask"] = batch["mask"] * 0.7 + 0.2
    outputs = {"probability": batch["mask"], "per_image": {"dice": torch.tensor([0.5])}}
    callback.on_test_start(trainer, None)
    callback.on_test_batch_end(trainer, None, outputs, batch, 0)
    callback.on_test_end(trainer, None)
    for name in ("test", "best"):
        picture = np.asarray(Image.open(tmp_path / "samples" / f"{name}.png"))
        assert (picture[:, 130:258, 0] == 255).sum() == (2 * 20) ** 2
