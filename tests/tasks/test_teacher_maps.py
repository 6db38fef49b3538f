"""A teacher's probability, computed once for every image."""

import io
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from tasks.build import build_datamodule, build_module, build_network
from tasks.teacher_maps import attach_teacher, check_cacheable
from tasks.teachers import load_teacher

CPU = torch.device("cpu")


@pytest.fixture
def prepare(make_config, make_checkpoint):
    """Sets up a student of a diffusion teacher; returns it with teacher, data and config."""

    def make(*overrides):
        small = ("datamodule.image_size=16", "datamodule.num_samples=20")
        checkpoint = make_checkpoint(*small)
        config = make_config(
            *("lightning_module=segmentation_kd", "network.kwargs.base_width=2"),
            *("teacher=newest", "teacher.experiment=demo_teacher", "teacher.cached=true"),
            *("datamodule.batch_size=4", "augmentation=flips", "datamodule.num_workers=0"),
            *(f"teacher.checkpoint={checkpoint}", "++teacher.sampler.ensemble=2", *small),
            *overrides,
        )
        teacher, _ = load_teacher(config)
        module = build_module(config, build_network(config["network"]), teacher)
        datamodule = build_datamodule(config["datamodule"])
        datamodule.prepare_data()
        datamodule.setup()
        return module, teacher, datamodule, config

    return make


def cached(datamodule):
    return sorted(datamodule.cache_root.glob("*-teacher-*.npy"))


def test_batches_carry_what_the_teacher_says_of_the_plain_image(prepare):
    module, teacher, datamodule, config = prepare()
    attach_teacher(teacher, datamodule, config, CPU)
    for part in ("train", "val"):
        dataset = datamodule.datasets[part]
        for index in (0, len(dataset) - 1):
            item = dataset.plain(index)
            batch = {"image": item["image"][None], "id": [item["id"]]}
            expected = teacher.predict(batch)["probability"][0]
            assert (item["teacher_probability"] - expected).abs().max() <= 0.5 / 255 + 1e-5
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["teacher_probability"].shape == batch["mask"].shape
    losses, _ = module.weighted_losses(batch, module.losses)
    assert losses["logit_kd"] > 0
    assert len(cached(datamodule)) == 2, "one of the training, one of the validation part"
    assert datamodule.datasets["test"].teacher_maps is None


def test_maps_move_with_their_image(prepare):
    _, teacher, datamodule, config = prepare()
    attach_teacher(teacher, datamodule, config, CPU)
    dataset = datamodule.datasets["train"]
    # The lesion's mask in the place of the teacher's map must come out as the mask does.
    dataset.teacher_maps = dataset.cache.lesions(dataset.indices) * 255
    for epoch in range(4):
        item = dataset[epoch, 1]
        assert torch.equal(item["teacher_probability"], item["mask"])


def test_maps_are_computed_once_for_each_teacher_and_sampler(prepare, monkeypatch):
    _, teacher, datamodule, config = prepare()
    attach_teacher(teacher, datamodule, config, CPU)
    first = {path: path.stat().st_mtime_ns for path in cached(datamodule)}

    def refuse(batch):
        raise AssertionError("the teacher was asked again")

    # A checkpoint with other weights has been written: the old maps are not taken for its own.
    _, other, datamodule, config = prepare()
    again = (other, datamodule, config, CPU)
    attach_teacher(*again)
    assert len(cached(datamodule)) == 4
    monkeypatch.setattr(other.module, "predict", refuse)
    attach_teacher(*again)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    config["teacher"]["sampler"] = {"ensemble": 3}
    with pytest.raises(AssertionError, match="asked again"):
        attach_teacher(*again)
    assert len(cached(datamodule)) == 4
    assert not list(datamodule.cache_root.glob(".*")), "nothing half-written"


def test_damaged_maps_are_computed_again(prepare, monkeypatch):
    _, teacher, datamodule, config = prepare()
    again = (teacher, datamodule, config, CPU)
    attach_teacher(*again)
    expected = {path: path.read_bytes() for path in cached(datamodule)}
    for path, whole in expected.items():
        for content in (b"", whole[:-1], bytes(len(whole)), whole + b"1"):
            path.unlink()  # What is open stays readable.
            path.write_bytes(content)
            attach_teacher(*again)
            assert cached(datamodule) == list(expected)
            assert len(path.read_bytes()) == len(whole)
            maps = np.load(io.BytesIO(whole)).astype(int)
            # The last bit of a convolution may differ between two calls.
            assert np.abs(np.load(path) - maps).max() <= 1
    max(cached(datamodule), key=lambda path: path.stat().st_size).unlink()
    usage = shutil._ntuple_diskusage(1000, 0, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"1\.0 kB free and the teacher's .*paths\.cache="):
        attach_teacher(*again)
    assert len(cached(datamodule)) == 1


def test_the_mean_of_several_teachers_is_kept(prepare, make_checkpoint):
    _, alone, datamodule, config = prepare()
    attach_teacher(alone, datamodule, config, CPU)
    files = [str(config["teacher"]["checkpoint"])]
    files.append(str(make_checkpoint("datamodule.image_size=16", "seed=1")))
    config["teacher"]["checkpoint"] = files
    both, _ = load_teacher(config)
    attach_teacher(both, datamodule, config, CPU)
    assert len(cached(datamodule)) == 4
    item = datamodule.datasets["train"].plain(3)
    expected = both.predict({"image": item["image"][None], "id": [item["id"]]})["probability"]
    assert (item["teacher_probability"] - expected[0]).abs().max() <= 0.5 / 255 + 1e-5


def test_probabilities_alone_are_kept(prepare):
    module, *_ = prepare()
    check_cacheable(module)
    module.losses = SimpleNamespace(needs=lambda name: name == "teacher_auxiliary")
    with pytest.raises(UserError, match="losses.auxiliary_kd needs more; set its weight to 0"):
        check_cacheable(module)
