"""Several modules predict together: mean and total variance."""

import lightning as L
import pytest
import torch

from lightning_modules.ensemble import Ensemble


class Samples(L.LightningModule):
    """Predicts the mean over samples, and their deviation where there are several."""

    def __init__(self, samples, classes=()):
        super().__init__()
        self.samples = samples
        self.classes = classes

    def predict(self, batch):
        result = {"probability": self.samples.mean(0)}
        if len(self.samples) > 1:
            result["uncertainty"] = self.samples.std(0, correction=0)
        return result


def test_uncertainty_is_the_deviation_over_all_samples():
    samples = torch.rand(3, 5, 2, 1, 4, 4)
    result = Ensemble([Samples(own) for own in samples]).predict_step({}, 0)
    torch.testing.assert_close(result["probability"], samples.flatten(0, 1).mean(0))
    whole = samples.flatten(0, 1).std(0, correction=0)
    torch.testing.assert_close(result["uncertainty"], whole)


def test_members_of_one_pass_differ_by_their_masks_alone():
    samples = torch.rand(4, 2, 1, 4, 4)
    result = Ensemble([Samples(own[None]) for own in samples]).predict({})
    torch.testing.assert_close(result["probability"], samples.mean(0))
    torch.testing.assert_close(result["uncertainty"], samples.std(0, correction=0))


def test_classifiers_predict_the_mean_of_their_probabilities():
    chances = torch.rand(3, 6, 4).softmax(-1)
    ensemble = Ensemble([Samples(own[None], tuple("abcd")) for own in chances])
    result = ensemble.predict({})
    assert ensemble.classes == ("a", "b", "c", "d")
    assert result.keys() == {"probability"}
    torch.testing.assert_close(result["probability"], chances.mean(0))
    assert result["probability"].sum(1) == pytest.approx(torch.ones(6), abs=1e-6)


def test_a_member_that_is_not_finite_is_not_hidden():
    samples = torch.rand(2, 1, 1, 4, 4)
    samples[1, 0, 0, 0, 0] = float("nan")
    result = Ensemble([Samples(own[None]) for own in samples]).predict({})
    assert result["probability"].isnan().sum() == 1
