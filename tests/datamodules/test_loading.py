"""Samples and their order depend on no worker, process or batch size."""

import functools
import operator
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import datamodules
from datamodules import ISIC2018
from datamodules.loading import EpochSampler

ROOT = Path(__file__).resolve().parents[2]


def test_training_order_changes_with_epoch_and_seed_only():
    sampler = EpochSampler(10, seed=1, shuffle=True)
    first = list(sampler)
    assert list(sampler) == first
    assert sorted(index for _, index in first) == list(range(10))
    sampler.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1}
    assert [i for _, i in second] != [i for _, i in first]
    other = EpochSampler(10, seed=2, shuffle=True)
    assert [i for _, i in other] != [i for _, i in first]


def test_validation_order_is_random_but_fixed():
    sampler = EpochSampler(50, permuted=True)
    first = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == first
    assert [i for _, i in first] != list(range(50))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_share_evaluation_without_repeating(world_size):
    parts = [
        [i for _, i in EpochSampler(10, rank=rank, world_size=world_size)]
        for rank in range(world_size)
    ]
    assert sorted(functools.reduce(operator.iadd, parts, [])) == list(range(10))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_train_on_equally_many(world_size):
    parts = [
        EpochSampler(10, shuffle=True, pad=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    indices = [[i for _, i in part] for part in parts]
    assert {len(part) for part in indices} == {len(parts[0])} == {-(-10 // world_size)}
    assert set(functools.reduce(operator.iadd, indices, [])) == set(range(10))


def test_an_epoch_can_be_taken_up_in_its_middle():
    order = [i for _, i in EpochSampler(10, shuffle=True, pad=True, rank=1, world_size=3)]
    sampler = EpochSampler(10, shuffle=True, pad=True, rank=1, world_size=3, start=3)
    assert len(order) == len(sampler) == 4
    assert [i for _, i in sampler] == order[3:]
    assert len(sampler) == 4
    assert [i for _, i in sampler] == order, "the next epoch is whole"


def last_batches(length, batch_size, world_size, start=0):
    """Return each process's samples and the size of its last batch."""
    for rank in range(world_size):
        sampler = EpochSampler(
            length, 3, True, pad=True, rank=rank, world_size=world_size, batch_size=batch_size
        )
        sampler.start = start
        order = [index for _, index in sampler]
        assert len(sampler) == len(order) + start
        yield order, len(order) % batch_size or batch_size


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 50])
def test_no_batch_of_training_is_a_single_sample(batch_size, world_size):
    for length in range(1, 40):
        parts = list(last_batches(length, batch_size, world_size))
        orders, sizes = zip(*parts, strict=True)
        assert len(set(map(len, orders))) == 1, "every process as many"
        each = -(-length // world_size)
        single = batch_size > 1 and each % batch_size == 1
        assert len(orders[0]) == each + single
        assert batch_size == 1 or min(sizes) > 1
        assert set(functools.reduce(operator.iadd, orders, [])) == set(range(length))
        plain = EpochSampler(length, 3, True, pad=True, world_size=world_size)
        assert world_size > 1 or orders[0][:length] == [index for _, index in plain]
        if length > world_size:
            assert all(order[-1] != order[-2] for order in orders if len(order) > 1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_with_a_repeated_sample_can_be_taken_up(world_size):
    length = 9 * world_size
    whole = [order for order, _ in last_batches(length, 4, world_size)]
    assert [len(order) for order in whole] == [10] * world_size
    for start in (4, 8):
        rest = [order for order, _ in last_batches(length, 4, world_size, start)]
        assert rest == [order[start:] for order in whole]


def test_evaluation_repeats_nothing_for_the_sake_of_a_batch():
    assert len(EpochSampler(9, permuted=True, batch_size=4)) == 9


def batches(make_config, isic_data, **settings):
    from tasks.build import build_datamodule

    config = make_config(
        "experiment=teacher_isic2018", f"paths.data={isic_data}", "datamodule.image_size=16"
    )
    arguments = {"num_workers": 0, "batch_size": 4, **settings}
    datamodule = build_datamodule(config["datamodule"] | arguments)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def epoch_of(datamodule, epoch):
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(epoch)
    samples = {}
    for batch in loader:
        for index, key in enumerate(batch["id"]):
            samples[key] = {k: batch[k][index] for k in ("image", "mask", "edge_distance")}
    return samples


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[key][part], second[key][part]) for key in first for part in first[key]
    )


def test_samples_do_not_depend_on_workers_or_batch_size(make_config, isic_data):
    plain = epoch_of(batches(make_config, isic_data), 2)
    assert equal(plain, epoch_of(batches(make_config, isic_data, num_workers=2), 2))
    assert equal(plain, epoch_of(batches(make_config, isic_data, batch_size=7), 2))
    assert not equal(plain, epoch_of(batches(make_config, isic_data), 3))
    assert not equal(plain, epoch_of(batches(make_config, isic_data, seed=5), 2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_last_batch_of_training_has_two_samples(make_config, isic_data, num_workers):
    # 14 training images.
    datamodule = batches(make_config, isic_data, batch_size=13, num_workers=num_workers)
    loader = datamodule.train_dataloader()
    sizes = [len(batch["id"]) for batch in loader]
    assert sizes == [13, 2]
    assert len(loader) == 2
    assert [len(batch["id"]) for batch in datamodule.val_dataloader()] == [2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_can_be_taken_up_in_the_middle_of_an_epoch(make_config, isic_data, num_workers):
    loader = batches(make_config, isic_data, num_workers=num_workers).train_dataloader()
    whole = [batch["id"] for batch in loader]
    loader.sampler.start = 2 * loader.batch_size
    assert [batch["id"] for batch in loader] == whole[2:]
    assert len(loader) == len(whole) == 4
    assert [batch["id"] for batch in loader] == whole


def test_loading_leaves_the_global_generator_alone(make_config, isic_data):
    datamodule = batches(make_config, isic_data)
    state = torch.get_rng_state()
    list(datamodule.train_dataloader())
    list(datamodule.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


SPAWNED = """
import multiprocessing
import sys
import torch
import datamodules
from datamodules import ISIC2018

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    root, cache, output = sys.argv[1:]
    policy = {"transforms": [{"name": "HorizontalFlip", "p": 0.5}]}
    datamodule = ISIC2018(cache, 16, 4, root=root, num_workers=2, augmentation=policy)
    datamodule.prepare_data()
    datamodule.setup()
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(1)
    torch.save({k: i for b in loader for k, i in zip(b["id"], b["image"])}, output)
"""


@pytest.mark.slow
def test_loader_processes_may_be_started_afresh(isic_data, load, tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    root, output = isic_data / "isic2018", tmp_path / "images.pt"
    command = [sys.executable, tmp_path / "spawned.py", root, tmp_path / "cache", output]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, timeout=200)
    policy = {"transforms": [{"name": "HorizontalFlip", "p": 0.5}]}
    loader = load(ISIC2018, root, augmentation=policy).train_dataloader()
    loader.sampler.set_epoch(1)
    expected = {k: i for b in loader for k, i in zip(b["id"], b["image"], strict=True)}
    images = torch.load(output, weights_only=True)
    assert images.keys() == expected.keys()
    assert all(torch.equal(images[key], expected[key]) for key in images)


def test_a_dataset_takes_no_images_to_its_loader_processes(isic_data, load):
    dataset = load(ISIC2018, isic_data / "isic2018", image_size=128).datasets["train"]
    _ = dataset[0, 0]
    assert len(pickle.dumps(dataset)) < 5000


@pytest.mark.parametrize("name", [n for n in datamodules.__all__ if "distance" not in n])
def test_every_datamodule_takes_the_same_arguments_first(name, tmp_path):
    cls = getattr(datamodules, name)
    datamodule = cls(tmp_path / "cache", 24, 5)
    assert (datamodule.cache_root, datamodule.image_size) == (tmp_path / "cache", 24)
    assert datamodule.batch_size == 5
