"""One-pass segmentation: losses by name, predictions, scores under the keys of all methods."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common.errors import UserError
from lightning_modules import Segmentation
from lightning_modules.losses import dice_loss, focal_loss

ADAM = {"name": "Adam", "lr": 1e-2}


def make(network, losses=None, **settings):
    return Segmentation(network, losses or {"bce": {"weight": 1}}, ADAM, **settings)


def test_losses_are_weighted_by_name(unet, lesions):
    losses = {"bce": {"weight": 2}, "dice": {"weight": 0.5}, "focal": {"weight": 0.25}}
    batch = lesions()
    values, answer = make(unet, losses).weighted_losses(batch, make(unet, losses).losses)
    logits, mask = answer["logits"], batch["mask"]
    assert values["bce"].item() == pytest.approx(
        F.binary_cross_entropy_with_logits(logits, mask).item()
    )
    expected = 2 * values["bce"] + 0.5 * dice_loss(logits, mask) + 0.25 * focal_loss(logits, mask)
    torch.testing.assert_close(values["loss"], expected)
    assert values["loss"].requires_grad
    assert not values["dice"].requires_grad


def test_an_unknown_term_is_refused(unet):
    with pytest.raises(UserError, match="losses.logit_kd is not a loss term here; choose from bce"):
        make(unet, {"logit_kd": {"weight": 1}})


def test_prediction_is_the_sigmoid_of_one_call_of_the_image_alone(unet, lesions, calls):
    module = make(unet).eval()
    seen = calls(unet)
    batch = lesions()
    result = module.predict({"image": batch["image"]})
    assert len(seen) == 1
    assert torch.equal(result["probability"], unet(batch["image"]).sigmoid())
    assert not result["probability"].requires_grad
    assert module.calls_per_mask == 1
    assert module.network_calls(7, 11) == (7, 11)


def test_it_learns_and_logs_the_keys_of_all_methods(unet, lesions, make_trainer, calls):
    module = make(unet, {"bce": {"weight": 1}, "dice": {"weight": 1}})
    loader = DataLoader([lesions(4)], batch_size=None)
    seen = calls(unet)
    trainer = make_trainer(max_epochs=40, check_val_every_n_epoch=40)
    trainer.fit(module, loader, loader)
    assert len(seen) == 40 + 1, "one call a step"
    logged = trainer.callback_metrics
    assert {"train/loss", "train/loss/bce", "val/loss", "val/loss/dice", "val/iou"} <= set(logged)
    assert logged["val/dice"] > 0.8
    seen.clear()
    (scores,) = trainer.test(module, loader, verbose=False)
    assert len(seen) == 1
    assert {"test/loss/bce", "test/dice", "test/hd95", "test/calibration_error"} <= set(scores)
    assert scores["test/dice"] == pytest.approx(logged["val/dice"].item())
    predictions = trainer.predict(module, loader)
    agreed = (predictions[0]["probability"] > 0.5) == (loader.dataset[0]["mask"] > 0.5)
    assert agreed.float().mean() > 0.95


def test_scores_of_batches_are_a_switch(unet, lesions, make_trainer):
    loader = DataLoader([lesions(2), lesions(3)], batch_size=None)
    (plain,) = make_trainer().test(make(unet), loader, verbose=False)
    (pooled,) = make_trainer().test(
        make(unet, metrics={"batch_pooled": True}), loader, verbose=False
    )
    added = {f"test/batch_pooled_{name}" for name in ("dice", "iou", "precision", "recall")}
    assert added <= set(pooled) - set(plain)
    assert {key: pooled[key] for key in plain} == plain


def test_losses_are_in_float32_under_autocast(unet, lesions):
    module, batch = make(unet), lesions()
    with torch.autocast("cpu", torch.bfloat16):
        values, answer = module.weighted_losses(batch, module.losses)
    assert answer["logits"].dtype == values["loss"].dtype == torch.float32
    values["loss"].backward()
    assert {p.grad.dtype for p in unet.parameters()} == {torch.float32}


def test_the_checkpoint_has_the_network_alone(unet):
    assert all(key.startswith("network.") for key in make(unet).state_dict())


def test_a_prediction_that_is_not_finite_is_wrong_in_a_validation(unet):
    module = make(unet)
    probability, mask = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    probability[1, 0, 2, 2] = torch.nan
    module.score_validation({"probability": probability}, {"mask": mask})
    scores = module.compute_validation_scores()
    assert {name: value.item() for name, value in scores.items()} == {"dice": 0.5, "iou": 0.5}
