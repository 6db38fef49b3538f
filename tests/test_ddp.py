"""Every method on two processes: one run, one folder, every image once, and the weights of one."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import HAM10000Diagnosis
from datamodules.synthetic import synthesise_lesion

ROOT = Path(__file__).resolve().parent.parent
TWO = ("trainer.devices=2", "trainer.limit_test_batches=1.0")
MASKS = (
    *("datamodule=synthetic", "datamodule.num_samples=28", "augmentation=flips"),
    *("~datamodule.split", "datamodule.letterbox=false"),
)
DEEPLAB = ("network=deeplabv3plus_resnet18", "network.weights=null", *MASKS)
# Method: experiment, that of its teacher, and what makes it small.
METHODS = {
    "DiffusionSegmentation": ("demo_teacher", None, ()),
    "EdgeFocusedDistillation": ("demo_efkd", "DiffusionSegmentation", ()),
    "Segmentation": ("deeplab_teacher_isic2018", None, DEEPLAB),
    "AuxiliaryHeads": ("deeplab_aux_isic2018", "Segmentation", DEEPLAB),
    "SegmentationDistillation": ("deeplab_kd_isic2018", "AuxiliaryHeads", DEEPLAB),
    "Classification": ("classifier_teacher_ham10000", None, ()),
    "ClassificationDistillation": ("d_kd_ham10000", "Classification", ()),
    "fitnet": ("d_kd_ham10000", "Classification", ("lightning_module=fitnet",)),
    "SelfSupervisedHead": ("ssd_head_ham10000", "Classification", ()),
    "ssd_kd": ("ssd_kd_ham10000", "SelfSupervisedHead", ()),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with HAM10000 as published, ten made-up images of each class."""
    root = tmp_path_factory.mktemp("data")
    images = root / "ham10000" / "HAM10000_images_part_1"
    images.mkdir(parents=True)
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for index in range(70):
        image, _ = synthesise_lesion(3, index)
        Image.fromarray(image).save(images / f"ISIC_{index:07d}.jpg")
        label = HAM10000Diagnosis.classes[index % 7]
        rows.append(f"HAM_{index},ISIC_{index:07d},{label},histo,50.0,male,back")
    (root / "ham10000" / "HAM10000_metadata.csv").write_text("\n".join(rows))
    return root


def run(folder, *overrides):
    """Run the command line; return the only run folder that it leaves."""
    places = (f"paths.runs={folder}", f"paths.cache={folder.parent}/cache")
    command = [
        *(sys.executable, str(ROOT / "run.py"), *overrides, *places, "logger=csv"),
        *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (left,) = folder.glob("*/*")
    return left


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """The run folders of the methods, each trained once by two processes."""
    root, folders = tmp_path_factory.mktemp("runs"), {}

    def get(name):
        if name not in folders:
            experiment, teacher, small = METHODS[name]
            settings = [f"experiment={experiment}", "debug=fast", *small, *TWO]
            settings += [f"paths.data={data}", "datamodule.num_workers=0"]
            if teacher:
                settings.append(f"teacher.checkpoint={get(teacher)}/checkpoints/best.ckpt")
            folders[name] = run(root / name, *settings)
        return folders[name]

    return get


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_tests_on_two_processes(trained, name):
    folder = trained(name)
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["batch"] == {
        **{"per_process": 1, "processes": 2, "accumulate": 1, "effective": 2},
        **{"scale_lr": "none", "lr": results["batch"]["lr"]},
    }
    table = next(
        folder / n for n in ("predictions.csv", "test_images.csv") if (folder / n).is_file()
    )
    with table.open(newline="") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    assert len(ids) == len(set(ids)) == results["data"]["n_test"] == results["tested_images"]
    assert all(np.isfinite(value) for value in results["val"].values())
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1


ONE_PASS = (
    *("experiment=demo_unet_teacher", "datamodule.num_samples=57", "datamodule.image_size=32"),
    *("datamodule.num_workers=0", "network.kwargs.base_width=4", "trainer.max_epochs=1"),
    *("lightning_module.optimizer.name=SGD", "lightning_module.optimizer.lr=0.1"),
    "datamodule.batch_size=8",
    *("~lightning_module.optimizer.betas", "callbacks.plateau=null"),
    # After more steps, what begins as rounding decides which of two pixels a maximum is.
    "trainer.limit_train_batches=2",
    # Of the whole batch together it is another loss.
    "lightning_module.losses.dice.per_image=true",
)


def test_two_processes_share_a_batch_and_learn_what_one_does(tmp_path):
    settings = {
        "one": (),
        "two": ("trainer.devices=2",),
        "less": (
            *("trainer.devices=2", "training.checkpointing=true", "training.channels_last=true"),
        ),
    }
    states, results = {}, {}
    for name, own in settings.items():
        folder = run(tmp_path / name, *ONE_PASS, *own)
        results[name] = json.loads((folder / "results.json").read_text())
        last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        states[name] = last["state_dict"]
    assert {r["batch"]["effective"] for r in results.values()} == {8}
    for name in ("two", "less"):
        for key, value in states["one"].items():
            torch.testing.assert_close(states[name][key], value, rtol=1e-5, atol=2e-6, msg=key)
        scores = results[name]["test"]
        assert scores == pytest.approx(results["one"]["test"], rel=1e-2, abs=1e-3)
