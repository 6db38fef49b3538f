"""Any folder of images and masks."""

import shutil

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules import Folder

NAMES = [f"case {i}" for i in range(10)]


@pytest.fixture
def root(pairs, tmp_path):
    root = tmp_path / "mine"
    pairs(root / "images", root / "masks", NAMES, ".png")
    return root


def divide(root):
    """Put the pairs into train, val and test."""
    for index, name in enumerate(NAMES):
        part = "train" if index < 7 else "val" if index < 8 else "test"
        for kind, suffix in (("images", "jpg"), ("masks", "png")):
            (root / part / kind).mkdir(parents=True, exist_ok=True)
            path = root / kind / f"{name}.{suffix}"
            path.rename(root / part / kind / path.name)
    shutil.rmtree(root / "images")
    shutil.rmtree(root / "masks")


def test_an_undivided_folder_is_divided_by_chance(root, load):
    parts = load(Folder, root).parts
    assert list(parts) == NAMES
    assert sorted(parts.values()) == ["test"] * 2 + ["train"] * 7 + ["val"]
    assert load(Folder, root, seed=3).parts == parts != load(Folder, root, split_seed=3).parts


def test_folders_divide_and_make_ids_unique(root, load):
    divide(root)
    parts = load(Folder, root).parts
    assert sorted(parts.values()) == ["test"] * 2 + ["train"] * 7 + ["val"]
    assert all(key.startswith(f"{part}/case") for key, part in parts.items())


def test_a_split_beside_the_images_comes_first(root, load):
    rows = [
        f"{name},{'test' if i < 5 else 'train' if i < 9 else 'val'}" for i, name in enumerate(NAMES)
    ]
    (root / "splits.csv").write_text("\n".join(["id,split", *reversed(rows)]))
    assert list(load(Folder, root).parts.values()) == ["test"] * 5 + ["train"] * 4 + ["val"]
    assert list(load(Folder, root, split="random").parts.values())[:5] != ["test"] * 5


def test_a_test_folder_may_have_no_masks(root, load):
    divide(root)
    shutil.rmtree(root / "test" / "masks")
    datamodule = load(Folder, root)
    assert not datamodule.testable
    assert "mask" not in next(iter(datamodule.predict_dataloader()))


def test_without_validation_some_of_training_becomes_it(root, load):
    divide(root)
    shutil.rmtree(root / "val")
    parts = load(Folder, root).parts
    assert sorted(parts.values()) == ["test"] * 2 + ["train"] * 6 + ["val"]


@pytest.mark.parametrize("suffix", ["_segmentation", "_Mask", "_lesion", "_seg", "_gt"])
def test_masks_may_have_the_usual_names(root, load, suffix):
    before = load(Folder, root).cache.masks
    for path in list((root / "masks").iterdir()):
        path.rename(path.with_stem(path.stem + suffix))
    assert np.array_equal(load(Folder, root).cache.masks, before)


def test_other_files_and_other_suffixes_are_dealt_with(root, load):
    images = root / "images"
    for name, suffix in zip(
        NAMES,
        ("JPG", "jpeg", "Jpeg", "png", "PNG", "bmp", "BMP", "tif", "TIFF", "tiff"),
        strict=True,
    ):
        Image.open(images / f"{name}.jpg").save(images / f"{name}.new.png")
        (images / f"{name}.jpg").unlink()
        Image.open(images / f"{name}.new.png").save(images / f"{name}.{suffix}")
        (images / f"{name}.new.png").unlink()
    (images / ".DS_Store").write_text("")
    (images / "ATTRIBUTION.txt").write_text("thanks")
    shutil.copy(images / "case 3.png", images / "case 3_superpixels.png")
    assert list(load(Folder, root).parts) == NAMES


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"mine has neither images/ nor train/; set datamodule.root"),
        (lambda r: shutil.rmtree(r / "masks"), r"mine/masks does not exist; set datamodule.root"),
        (
            lambda r: (r / "masks/case 3.png").unlink(),
            r"case 3.jpg is without partner: .*masks/case 3.png is missing",
        ),
        (
            lambda r: (r / "images/case 3.jpg").unlink(),
            r"case 3.png is without partner: an image of that name in .*images is missing",
        ),
    ],
)
def test_what_is_missing_is_named(root, load, damage, message):
    damage(root)
    with pytest.raises(UserError, match=message):
        load(Folder, root)
