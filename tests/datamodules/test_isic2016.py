"""ISIC 2016: the layouts of Part 1 and Part 3B."""

import pytest

from common.errors import UserError
from datamodules import ISIC2016

NAMES = {"Training": [f"ISIC_{i:07d}" for i in range(18)], "Test": ["ISIC_1", "ISIC_2", "ISIC_3"]}


@pytest.fixture(params=["part 1", "part 3b"])
def root(request, pairs, tmp_path):
    for name, ids in NAMES.items():
        if request.param == "part 1":
            folders = [f"ISBI2016_ISIC_Part1_{name}_{kind}" for kind in ("Data", "GroundTruth")]
        else:
            folders = [f"ISBI2016_ISIC_Part3B_{name}_Data"] * 2
        images, masks = (tmp_path / "isic2016" / folder for folder in folders)
        pairs(images, masks, ids, mask_suffix="_Segmentation.png", content=len(ids))
    return tmp_path / "isic2016"


def test_the_test_part_is_as_published_and_validation_is_drawn(root, load):
    parts = load(ISIC2016, root).parts
    assert [key for key, part in parts.items() if part == "test"] == NAMES["Test"]
    validation = [key for key, part in parts.items() if part == "val"]
    assert len(validation) == 3, "150 of 900"
    assert load(ISIC2016, root).parts == parts
    other = load(ISIC2016, root, split_seed=1).parts
    assert [key for key, part in other.items() if part == "val"] != validation
    assert [key for key, part in other.items() if part == "test"] == NAMES["Test"]


def test_masks_among_the_images_are_no_images(root, load):
    assert len(load(ISIC2016, root).parts) == 21


def test_all_can_be_divided_anew(root, load):
    parts = load(ISIC2016, root, split="random").parts
    assert sorted(parts.values()) == ["test"] * 7 + ["train"] * 12 + ["val"] * 2


def test_another_split_is_refused(root, load):
    with pytest.raises(UserError, match="split=reference does not exist; choose one of official"):
        load(ISIC2016, root, split="reference")


def test_what_is_published_is_known():
    downloads = {download.target: download.images for download in ISIC2016.downloads}
    assert downloads == {
        "ISBI2016_ISIC_Part1_Training_Data": 900,
        "ISBI2016_ISIC_Part1_Training_GroundTruth": 900,
        "ISBI2016_ISIC_Part1_Test_Data": 379,
        "ISBI2016_ISIC_Part1_Test_GroundTruth": 379,
    }
