"""PH2: the published tree of bitmaps and the reference's two folders."""

import shutil

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules import PH2

NAMES = [f"IMD{number:03d}" for number in range(2, 12)]


@pytest.fixture
def root(pairs, tmp_path):
    """The published tree, with 1-bit masks, and a JPEG of the mask and outlines beside it."""
    pairs(tmp_path / "flat", tmp_path / "flat", NAMES, "_lesion.bmp", ".bmp")
    root = tmp_path / "ph2"
    for name in NAMES:
        case = root / "PH2 Dataset images" / name
        for folder, stem in (("Dermoscopic_Image", name), ("lesion", f"{name}_lesion")):
            (case / f"{name}_{folder}").mkdir(parents=True)
            path = case / f"{name}_{folder}" / f"{stem}.bmp"
            (tmp_path / "flat" / f"{stem}.bmp").rename(path)
            if folder == "lesion":
                Image.open(path).convert("1").save(path)
                Image.open(path).convert("L").save(path.with_suffix(".jpg"))
        (case / f"{name}_roi").mkdir()
        shutil.copy(path, case / f"{name}_roi" / f"{name}_R1_Label1.bmp")
    (root / "PH2_dataset.txt").write_text("Name\n")
    return root


def case(root, name="IMD004"):
    return root / "PH2 Dataset images" / name


def to_reference_layout(root):
    for name in NAMES:
        for folder, stem, to in (
            ("Dermoscopic_Image", name, "trainx"),
            ("lesion", f"{name}_lesion", "trainy"),
        ):
            (root / to).mkdir(exist_ok=True)
            (case(root, name) / f"{name}_{folder}" / f"{stem}.bmp").rename(
                root / to / f"{stem}.bmp"
            )
    shutil.rmtree(root / "PH2 Dataset images")


def test_the_reference_divides_them_in_sorted_order(root, load):
    parts = load(PH2, root).parts
    assert list(parts) == NAMES
    assert list(parts.values()) == ["train"] * 4 + ["val"] + ["test"] * 5


def test_both_layouts_give_the_same_samples(root, load):
    tree = load(PH2, root)
    to_reference_layout(root)
    flat = load(PH2, root)
    assert flat.parts == tree.parts
    assert np.array_equal(flat.cache.images, tree.cache.images)
    assert np.array_equal(flat.cache.masks, tree.cache.masks)
    assert tree.cache.masks.max() == 1


def upper(folder):
    for path in list(folder.rglob("*.bmp")):
        path.rename(path.with_suffix(".BMP"))


def test_suffixes_may_be_in_capitals(root, load):
    before = load(PH2, root).parts
    upper(root)
    assert load(PH2, root).parts == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"ph2 has neither PH2 Dataset images/ nor trainx/; get it from .*addi"),
        (
            lambda r: (case(r) / "IMD004_lesion/IMD004_lesion.bmp").unlink(),
            r"image .*IMD004 is without partner: .*IMD004_lesion.bmp is missing",
        ),
        (
            lambda r: shutil.rmtree(case(r) / "IMD004_Dermoscopic_Image"),
            r"mask .*IMD004 is without partner: .*IMD004_Dermoscopic_Image/IMD004.bmp is missing",
        ),
    ],
)
def test_what_is_missing_is_named(root, load, damage, message):
    damage(root)
    with pytest.raises(UserError, match=message):
        load(PH2, root)
