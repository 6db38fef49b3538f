"""A checkpoint is tested on other data where that fits, and refused in a sentence elsewhere."""

import json
import shutil

import pytest
import torch

from common.errors import UserError
from disc_set import write_discs
from tasks import fit, test
from tasks.build import build_datamodule, build_network
from tasks.configuration import checkpoint_config

QUICK = ("trainer.accelerator=cpu", "datamodule.num_workers=0", "logger=none")


@pytest.fixture
def trained(make_checkpoint, tmp_path):
    """A checkpoint that was trained on a folder."""
    write_discs(tmp_path / "A", 10)
    return make_checkpoint(
        "datamodule=folder", f"datamodule.root={tmp_path}/A", "datamodule.image_size=32"
    )


def test_other_folders_are_tested_on_whole(trained, make_config, tmp_path):
    write_discs(tmp_path / "B" / "test", 3)
    command = ("task=test", f"checkpoint={trained}", f"datamodule.root={tmp_path}/B", *QUICK)
    with pytest.raises(UserError, match="datamodule.split=all"):
        test.run(make_config(*command))
    test.run(make_config(*command, "datamodule.split=all"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tested_images"] == 3
    counts = [results["data"][f"n_{part}"] for part in ("train", "val", "test")]
    assert counts == [0, 0, 3]
    assert list(results["baselines"]) == ["otsu"]
    rows = (tmp_path / "run" / "test_images.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [f"test/disc_{n:02d}" for n in range(3)]


@pytest.mark.parametrize("group", [(), ("datamodule=folder",)])
def test_a_root_alone_moves_the_data(trained, make_config, tmp_path, group):
    shutil.copytree(tmp_path / "A", tmp_path / "C")
    config = make_config(
        "task=test", f"checkpoint={trained}", f"datamodule.root={tmp_path}/C", *group, *QUICK
    )
    stored = torch.load(trained, weights_only=True)["config"]
    merged = checkpoint_config(config, stored)
    assert merged["datamodule"]["name"] == "Folder"
    assert merged["datamodule"]["root"] == f"{tmp_path}/C"
    assert merged["datamodule"]["image_size"] == 32
    test.check_data(
        merged, build_network(merged["network"]), build_datamodule(merged["datamodule"])
    )


def test_a_split_without_training_is_not_trained_on(make_config):
    with pytest.raises(UserError, match=r"split=all leaves no image .*reference, random"):
        fit.run(make_config("datamodule.split=all", *QUICK))


def test_masks_are_not_tested_on_diagnoses(trained, make_config):
    config = make_config("task=test", f"checkpoint={trained}", "datamodule=isic2019", *QUICK)
    with pytest.raises(UserError, match=r"ISIC2019 has diagnoses, .* makes masks"):
        test.run(config)


@pytest.mark.parametrize(
    ("data", "classes", "metadata", "message"),
    [
        ("isic2018", ["MEL", "NV"], 0, r"ISIC2018 has masks, .* makes diagnoses"),
        ("ham10000_diagnosis", ["mel", "nv"], 0, r"has the classes .* names mel, nv"),
        ("isic2019", None, 11, r"needs 11 numbers of metadata .* gives 0"),
    ],
)
def test_diagnoses_are_tested_on_their_own_classes(make_config, data, classes, metadata, message):
    config = make_config("experiment=classifier_raw_isic2019", f"datamodule={data}", *QUICK)
    datamodule = build_datamodule(config["datamodule"])
    config["lightning_module"]["classes"] = classes or list(datamodule.classes)
    network = torch.nn.Module()
    network.metadata_inputs = metadata
    with pytest.raises(UserError, match=message):
        test.check_data(config, network, datamodule)


def test_weights_that_are_not_finite_are_refused(trained, make_config):
    checkpoint = torch.load(trained, weights_only=True)
    next(iter(checkpoint["current_model_state"].values())).view(-1)[0] = torch.nan
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] = torch.nan
    torch.save(checkpoint, trained)
    with pytest.raises(UserError, match=r"not finite, in 1 tensor\(s\), first x_stem.weight"):
        test.run(make_config("task=test", f"checkpoint={trained}", *QUICK))
