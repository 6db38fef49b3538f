"""Checkpoints are read strictly, and nothing in them is executed."""

import pickle

import numpy as np
import pytest
import torch

from common.errors import UserError
from tasks.checkpoints import (
    AtomicCheckpointIO,
    load_checkpoint,
    load_weights,
    network_from_checkpoint,
)


class Malicious:
    def __reduce__(self):
        return (open, (self.path, "w"))

    def __init__(self, path):
        self.path = str(path)


@pytest.mark.parametrize("content", [b"", b"broken", b"not a checkpoint", b"PK\x03\x04 half"])
def test_files_that_are_none_are_refused(tmp_path, content):
    path = tmp_path / "some.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"some.ckpt is damaged or no checkpoint of this project"):
        load_checkpoint(path)


def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path):
    path = tmp_path / "some.ckpt"
    torch.save({"state_dict": {"network.a": torch.zeros(99)}, "config": {"seed": 1}}, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for length in rng.integers(1, len(whole) - 30, 40):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)
    for size in rng.integers(1, 200, 40):
        path.write_bytes(rng.bytes(size))
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"teacher.checkpoint=.*gone.ckpt does not exist"):
        load_checkpoint(tmp_path / "gone.ckpt", key="teacher.checkpoint")


@pytest.mark.parametrize(
    "value",
    [{"model": torch.zeros(2)}, [1, 2], torch.zeros(3), {"state_dict": {}, "config": [1]}],
)
def test_other_peoples_checkpoints_are_refused(tmp_path, value):
    torch.save(value, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="no state_dict and config"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_a_checkpoint_of_another_project_is_refused(tmp_path):
    torch.save({"state_dict": {}, "config": {"lr": 0.1}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"The config in checkpoint=.*other.ckpt has no datamodule"):
        load_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize("writer", [torch.save, lambda v, p: p.write_bytes(pickle.dumps(v))])
def test_a_malicious_file_is_refused_without_being_executed(tmp_path, writer):
    target = tmp_path / "executed"
    path = tmp_path / "evil.ckpt"
    writer({"state_dict": {}, "config": Malicious(target)}, path)
    target.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"evil.ckpt is damaged"):
        load_checkpoint(path)
    assert not target.exists()


def test_a_network_is_looked_up_by_name_only():
    checkpoint = {"state_dict": {}, "config": {"network": {"name": "os.system", "kwargs": {}}}}
    with pytest.raises(UserError, match=r"network.name=os.system does not exist; choose one of"):
        network_from_checkpoint(checkpoint, "x.ckpt", "ema", "checkpoint")


def test_choice_of_weights():
    layer = torch.nn.Linear(1, 1, bias=False)
    state = {"network.weight": torch.full((1, 1), 3.0), "other": torch.ones(2)}
    checkpoint = {"state_dict": state, "config": {"network": {"name": "Linear"}}}

    def load(weights, prefix="network."):
        load_weights(layer, checkpoint, "best.ckpt", weights, "teacher", prefix)

    load("ema")
    assert layer.weight.item() == 3
    with pytest.raises(UserError, match="teacher.weights=online is not in this checkpoint"):
        load("online")
    with pytest.raises(UserError, match="teacher.weights=best does not exist"):
        load("best")
    with pytest.raises(UserError, match=r"best.ckpt do not fit the network .*\(Linear\)"):
        load("ema", prefix="")


def test_a_checkpoint_is_replaced_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "last.ckpt"
    groups = ("datamodule", "lightning_module", "network", "sampler", "schedule")
    checkpoint = {"state_dict": {"a": torch.ones(2)}, "config": {g: {} for g in groups}}
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)

    def half(value, target):
        target.write(b"PK half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=None)
    assert torch.equal(loaded["state_dict"]["a"], torch.ones(2))
