"""Sampling noise belongs to a sample, not to its place in a batch."""

import torch

from lightning_modules.processes import SampleNoise, stable_seed


def test_noise_depends_on_id_member_and_seed_only():
    together = SampleNoise(5, ["a", "b", "c"], 0, (1, 4, 4))
    first, second = together(), together()
    alone = SampleNoise(5, ["b"], 0, (1, 4, 4))
    assert torch.equal(alone()[0], first[1])
    assert torch.equal(alone()[0], second[1])
    for other in (
        SampleNoise(6, ["b"], 0, (1, 4, 4)),
        SampleNoise(5, ["b"], 1, (1, 4, 4)),
        SampleNoise(5, ["d"], 0, (1, 4, 4)),
    ):
        assert not torch.equal(other()[0], first[1])


def test_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    SampleNoise(0, ["a"], 0, (1, 8, 8))()
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_standard_normal():
    draws = SampleNoise(0, [str(i) for i in range(64)], 0, (1, 32, 32))()
    assert abs(draws.mean().item()) < 0.01
    assert abs(draws.std().item() - 1) < 0.01


def test_seeds_are_stable_and_distinguish_their_parts():
    assert stable_seed(0, "ISIC_0000000", 0) == 1997544566938694894
    assert stable_seed(1, 23) != stable_seed(12, 3)
