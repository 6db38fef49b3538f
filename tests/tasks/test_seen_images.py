"""A teacher that has seen the student's validation or test images."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from datamodules.splits import PARTS, read_parts, write_split
from tasks import fit
from tasks.build import build_datamodule
from tasks.seen_images import check_teacher, find_seen, seen_record

SIZES = {"train": 8, "val": 4, "test": 4}


@pytest.fixture
def folder(pairs, tmp_path):
    """Writes 16 photographs of one's own and how they are divided; returns their folder."""

    def make(name, content=0, renamed="", turned=0, train=8):
        root = tmp_path / "data" / name
        ids = [f"{renamed}{index:03d}" for index in range(16)]
        pairs(root / "images", root / "masks", ids, ".png", ".png", content)
        order = ids[turned:] + ids[:turned]
        parts = ["train"] * train + ["val"] * 4 + ["test"] * (12 - train)
        write_split(root / "splits.csv", dict(zip(order, parts, strict=True)))
        return root

    return make


@pytest.fixture
def configure(make_config, tmp_path):
    """Composes a tiny run on a folder; with teachers it distils from them."""

    def make(root, *overrides, teachers=(), data="folder", run="now"):
        if teachers:
            files = ",".join(map(str, teachers))
            overrides = ("lightning_module=segmentation_kd", "teacher=newest", *overrides)
            overrides = (*overrides, f"teacher.checkpoint=[{files}]", "teacher.experiment=x")
        else:
            overrides = ("lightning_module=segmentation", *overrides)
        method = next(o for o in overrides if o.startswith("lightning_module="))
        rest = [o for o in overrides if o != method]
        return make_config(
            *("experiment=demo_unet_teacher", f"datamodule={data}", "debug=fast", method),
            *(f"datamodule.root={root}", "datamodule.image_size=16", "augmentation=none"),
            f"hydra.runtime.output_dir={tmp_path}/runs/{run}",
            *rest,
        )

    return make


@pytest.fixture
def make_teacher(configure, make_checkpoint, tmp_path):
    """Writes the run folder of a network that was trained on a folder; returns its checkpoint."""

    def make(root, name="teacher", recorded=True, digests=True, teachers=(), data="folder"):
        config = configure(root, data=data)
        datamodule = build_datamodule(config["datamodule"])
        datamodule.prepare_data()
        datamodule.setup()
        run = tmp_path / "teachers" / name
        made = make_checkpoint(one_pass=True, name=name)
        checkpoint = torch.load(made, weights_only=True)
        checkpoint["config"]["datamodule"] = config["datamodule"]
        if recorded:
            seen = [find_seen(path, torch.load(path, weights_only=True)) for path in teachers]
            checkpoint["seen_images"] = seen_record(config, datamodule, seen)
        path = run / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        torch.save(checkpoint, path)
        write_split(run / "splits.csv", datamodule.parts, datamodule.digests if digests else None)
        return path

    return make


@pytest.fixture
def check(configure):
    """Checks teachers against the split of a student's folder, as a training does."""

    def run(root, *teachers, allow_leak=False, data="folder"):
        config = configure(root, data=data)
        config["teacher"]["allow_leak"] = allow_leak
        datamodule = build_datamodule(config["datamodule"])
        datamodule.prepare_data()
        datamodule.setup()
        seen = [find_seen(path, torch.load(path, weights_only=True)) for path in teachers]
        return check_teacher(seen, config, datamodule.parts, datamodule.digests)

    return run


@pytest.mark.parametrize("recorded", [True, False], ids=["by its record", "by splits.csv"])
def test_overlap_is_counted_by_part(folder, make_teacher, check, recorded):
    teacher = make_teacher(folder("a"), recorded=recorded)
    assert check(folder("a"), teacher) == {"val": 0, "test": 0}, "the same split"
    # By two images: 2 of the training come into the test, and 2 of validation, which chose.
    with pytest.raises(UserError, match=r"trained on 2 test images and was chosen by 2 test im") as e:
        check(folder("b", turned=14), teacher)
    assert "allow_leak=true" in str(e.value)
    assert str(teacher) in str(e.value)
    with pytest.raises(UserError, match=r"was trained on 4 test and 4 validation images .*first"):
        check(folder("c", renamed="x", turned=8), teacher)
    assert check(folder("c"), teacher, allow_leak=True) == {"val": 4, "test": 4}
