"""ISIC 2017: three published parts, with superpixels among the images."""

import shutil

import pytest

from common.errors import UserError
from datamodules import ISIC2017

PARTS = {"Training": 9, "Validation": 2, "Test_v2": 4}


@pytest.fixture
def root(pairs, tmp_path):
    root = tmp_path / "isic2017"
    for content, (name, count) in enumerate(PARTS.items()):
        images, masks = root / f"ISIC-2017_{name}_Data", f"ISIC-2017_{name}_Part1_GroundTruth"
        pairs(images, root / masks, [f"ISIC_{content}{i}" for i in range(count)], content=content)
        for path in list(images.iterdir()):
            shutil.copy(path, images / f"{path.stem}_superpixels.png")
    return root


def test_the_parts_are_as_published(root, load):
    datamodule = load(ISIC2017, root)
    assert {part: len(dataset) for part, dataset in datamodule.datasets.items()} == {
        "train": 9,
        "val": 2,
        "test": 4,
    }
    assert {key[:6] for key, part in datamodule.parts.items() if part == "val"} == {"ISIC_1"}


def test_a_part_that_is_not_there_is_named(root, load):
    shutil.rmtree(root / "ISIC-2017_Test_v2_Data")
    with pytest.raises(UserError, match="needs the published test part, of which no image is the"):
        load(ISIC2017, root)
    assert len(load(ISIC2017, root, split="random").parts) == 11


def test_images_without_their_masks_are_refused(root, load):
    shutil.rmtree(root / "ISIC-2017_Validation_Part1_GroundTruth")
    with pytest.raises(UserError, match="ISIC-2017_Validation_Part1_GroundTruth does not exist; g"):
        load(ISIC2017, root)
