"""What diagnosis datasets share: the reference's images and rotated views."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import HAM10000Diagnosis

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "ssd_kd"


def read_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        values = {key.removeprefix("case0/"): arrays[key] for key in arrays}
    tolerance = json.loads((GOLDEN / f"{name}.json").read_text())["tolerance"]
    return values, {"rtol": tolerance["loss_rtol"], "atol": tolerance["loss_atol"]}


@pytest.fixture
def item_of(load, tmp_path):
    """Returns the item of a test part that a photograph becomes."""

    def make(pixels, **settings):
        root = tmp_path / "ham10000"
        (root / "images").mkdir(parents=True)
        rows = ["lesion_id,image_id,dx"]
        for index in range(20):
            Image.fromarray(pixels).save(root / "images" / f"ISIC_{index:07d}.png")
            rows.append(f"HAM_{index},ISIC_{index:07d},nv")
        (root / "HAM10000_metadata.csv").write_text("\n".join(rows))
        settings = {"normalization": "imagenet", "antialias": "pillow", **settings}
        datamodule = load(HAM10000Diagnosis, root, **settings)
        assert datamodule.metadata_columns == ()
        return datamodule.datasets["test"][0, 0]

    return make


def test_evaluation_sees_the_references_image(item_of):
    values, near = read_golden("eval_transform")
    item = item_of(values["in/image"], image_size=int(values["in/size"]))
    torch.testing.assert_close(item["image"], torch.from_numpy(values["out/out"]), **near)
    assert "views" not in item


def test_views_are_the_references(item_of):
    values, near = read_golden("rotation_stack")
    item = item_of(values["in/image"], image_size=int(values["in/size"]), views=True)
    expected = torch.from_numpy(values["out/out"])
    torch.testing.assert_close(item["views"], expected, **near)
    assert torch.equal(item["image"], item["views"][0])
