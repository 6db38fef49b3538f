"""Plain diagnosis: weighted cross-entropy, probabilities, scores under the keys of all methods."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common.errors import UserError
from lightning_modules import Classification
from networks import Classifier

SGD = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
CLASSES = ("bkl", "mel", "nv")
CE = {"cross_entropy": {"weight": 1}}


def make(network, losses=None, classes=CLASSES, **settings):
    return Classification(network, losses or CE, SGD, classes=classes, **settings)


def test_the_loss_is_the_weighted_cross_entropy(small_classifier, photographs):
    module, batch = make(small_classifier), photographs(5)
    module.class_weights.copy_(torch.tensor([1.0, 5.0, 0.5]))
    losses, answer = module.weighted_losses(batch, module.losses)
    expected = F.cross_entropy(answer["logits"], batch["label"], module.class_weights)
    torch.testing.assert_close(losses["loss"], expected)
    assert losses["loss"].requires_grad


def test_smoothing_is_for_training_alone(small_classifier, photographs):
    smooth = {"cross_entropy": {"weight": 3, "label_smoothing": 0.2}}
    module, batch = make(small_classifier, smooth), photographs(5)
    trained, answer = module.weighted_losses(batch, module.losses)
    logits, label = answer["logits"], batch["label"]
    expected = 3 * F.cross_entropy(logits, label, label_smoothing=0.2)
    torch.testing.assert_close(trained["loss"], expected)
    for terms in (module.val_terms, module.test_terms):
        scored, _ = module.weighted_losses(batch, terms)
        torch.testing.assert_close(scored["loss"], F.cross_entropy(logits, label))


def test_prediction_is_the_softmax_of_one_call_of_the_image_alone(
    small_classifier, photographs, calls
):
    module = make(small_classifier).eval()
    seen = calls(small_classifier)
    batch = photographs(4)
    result = module.predict({"image": batch["image"]})
    assert len(seen) == 1
    assert torch.equal(result["probability"], small_classifier(batch["image"]).softmax(1))
    torch.testing.assert_close(result["probability"].sum(1), torch.ones(4))
    assert not result["probability"].requires_grad
    assert (module.calls_per_mask, module.network_calls(7, 11)) == (1, (7, 11))


def test_class_weights_are_the_datamodules_and_are_kept(small_classifier):
    trainer = SimpleNamespace(datamodule=SimpleNamespace(class_weights=[2.0, 0.0, 3.5]))
    module = make(small_classifier)
    module._trainer = trainer
    module.setup("test")
    assert module.class_weights.tolist() == [1, 1, 1], "a test has those of the training"
    module.setup("fit")
    assert module.state_dict()["class_weights"].tolist() == [2.0, 0.0, 3.5]
    unweighted = make(small_classifier, weighted=False)
    unweighted._trainer = trainer
    unweighted.setup("fit")
    assert unweighted.class_weights.tolist() == [1, 1, 1]


def test_it_learns_and_logs_the_keys_of_all_methods(small_classifier, photographs, make_trainer):
    module = make(small_classifier)
    loader = DataLoader([photographs(12)], batch_size=None)
    trainer = make_trainer(max_epochs=60, check_val_every_n_epoch=60)
    trainer.fit(module, loader, loader)
    logged = trainer.callback_metrics
    assert {"train/loss", "train/loss/cross_entropy", "val/loss", "val/top2_accuracy"} <= {*logged}
    assert logged["val/balanced_accuracy"] > 0.9
    (scores,) = trainer.test(module, loader, verbose=False)
    assert scores["test/balanced_accuracy"] == pytest.approx(logged["val/balanced_accuracy"].item())
    assert {"test/loss", "test/auc", "test/mel_sensitivity", "test/recall/nv"} <= set(scores)
    (result,) = trainer.predict(module, loader)
    truth = loader.dataset[0]["label"]
    assert (result["probability"].argmax(1) == truth).float().mean() > 0.9


def test_metadata_goes_into_a_network_that_takes_it(photographs):
    network = Classifier("mobilenet_v2", 3, metadata=2, options={"width_mult": 0.25}).eval()
    module = make(network)
    batch = photographs(3)
    one, other = (
        module.predict({**batch, "metadata": torch.full((3, 2), value)})["probability"]
        for value in (0.0, 9.0)
    )
    assert not torch.equal(one, other)


def test_losses_are_in_float32_under_autocast(small_classifier, photographs):
    module, batch = make(small_classifier), photographs(4)
    with torch.autocast("cpu", torch.bfloat16):
        losses, answer = module.weighted_losses(batch, module.losses)
    assert answer["logits"].dtype == losses["loss"].dtype == torch.float32


def test_an_unknown_term_is_refused(small_classifier):
    with pytest.raises(UserError, match=r"losses.kd is not a loss term here; .* cross_entropy"):
        make(small_classifier, {"kd": {"weight": 1}})


def test_the_checkpoint_has_the_network_and_the_class_weights(small_classifier):
    keys = set(make(small_classifier).state_dict())
    assert {key for key in keys if not key.startswith("network.")} == {"class_weights"}
