"""MEDIQA-MAGIC: several masks of one image, and a test part without."""

import shutil

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules import MEDIQAMagic

IMAGES = {"train": 20, "valid": 4, "test": 2}


@pytest.fixture
def root(pairs, tmp_path):
    """Three annotators of each image: the first one's mask, the second's is larger, the third's
    is empty."""
    root = tmp_path / "mediqa_magic"
    for content, (part, count) in enumerate(IMAGES.items()):
        names = [f"IMG_ENC{content}{i // 2:04d}_{i:05d}" for i in range(count)]
        masks = root / "dermavqa-segmentations" / part if part != "test" else None
        pairs(root / f"images_{part}", masks, names, "_mask_ann0.tiff", content=content)
        for name in names if masks else ():
            first = np.asarray(Image.open(masks / f"{name}_mask_ann0.tiff"))
            larger = np.maximum(first, np.roll(first, 20, axis=1))
            Image.fromarray(larger).save(masks / f"{name}_mask_ann2.tiff")
            Image.fromarray(first * 0).save(masks / f"{name}_mask_ann3.tiff")
    return root


def counts(datamodule):
    return {part: len(dataset) for part, dataset in datamodule.datasets.items()}


def test_every_mask_is_a_sample(root, load):
    datamodule = load(MEDIQAMagic, root)
    assert counts(datamodule) == {"train": 60, "val": 12, "test": 2}
    assert list(datamodule.parts)[:3] == [f"IMG_ENC00000_00000_ann{i}" for i in (0, 2, 3)]
    first, second, third = datamodule.cache.masks[:3]
    assert third.max() == 0
    assert (second >= first).all()
    assert second.sum() > first.sum() > 0


def test_annotators_can_vote_or_be_joined(root, load):
    each = load(MEDIQAMagic, root).cache.masks
    majority = load(MEDIQAMagic, root, annotators="majority")
    union = load(MEDIQAMagic, root, annotators="union")
    assert counts(majority) == counts(union) == {"train": 20, "val": 4, "test": 2}
    assert next(iter(majority.parts)) == "IMG_ENC00000_00000"
    assert np.array_equal(majority.cache.masks[0], each[0]), "two of three"
    assert np.array_equal(union.cache.masks[0], each[1])
    assert majority.cache.folder != union.cache.folder


def test_the_test_part_can_be_predicted_but_not_tested(root, load):
    datamodule = load(MEDIQAMagic, root)
    assert not datamodule.testable
    batch = next(iter(datamodule.predict_dataloader()))
    assert batch.keys() == {"image", "id", "size"}
    assert batch["id"] == ["IMG_ENC20000_00000", "IMG_ENC20000_00001"]
    with pytest.raises(UserError, match="mediqa_magic has no masks, so it can be predicted but no"):
        datamodule.check_testable()


def test_encounters_stay_together_in_a_split_that_can_be_tested(root, load):
    datamodule = load(MEDIQAMagic, root, split="lesion_grouped", annotators="union")
    assert datamodule.testable
    assert sum(counts(datamodule).values()) == 24
    encounters = {}
    for key, part in datamodule.parts.items():
        encounters.setdefault(key.rpartition("_")[0], set()).add(part)
    assert all(len(parts) == 1 for parts in encounters.values())


def test_folders_may_be_as_unpacked(root, load):
    before = load(MEDIQAMagic, root).parts
    inner = root / "images_final" / "images_final"
    inner.mkdir(parents=True)
    for part in IMAGES:
        (root / f"images_{part}").rename(inner / f"images_{part}")
    assert load(MEDIQAMagic, root).parts == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"mediqa_magic has no images_train/; get it from the MEDIQA-MAGIC"),
        (
            lambda r: shutil.rmtree(r / "dermavqa-segmentations/valid"),
            r"has no dermavqa-segmentations/valid/; get it",
        ),
        (
            lambda r: [p.unlink() for p in r.rglob("IMG_ENC00001_00002_mask*")],
            r"00002.jpg is without partner: .*IMG_ENC00001_00002_mask_ann0.tiff or that of another",
        ),
        (
            lambda r: (r / "images_train/IMG_ENC00001_00002.jpg").unlink(),
            r"00002_mask_ann0.tiff is without partner: .*images_train/IMG_ENC00001_00002.jpg is mi",
        ),
    ],
)
def test_what_is_missing_is_named(root, load, damage, message):
    damage(root)
    with pytest.raises(UserError, match=message):
        load(MEDIQAMagic, root)


def test_an_unknown_merging_is_refused(root, load):
    with pytest.raises(UserError, match="annotators=mean does not exist; choose one of each"):
        load(MEDIQAMagic, root, annotators="mean")


def test_folds_divide_the_images_with_masks_and_keep_encounters_together(root, load):
    tested = []
    for fold in range(3):
        datamodule = load(MEDIQAMagic, root, folds=3, fold=fold, annotators="majority")
        assert len(datamodule.parts) == IMAGES["train"] + IMAGES["valid"]
        encounters = {}
        for image, part in datamodule.parts.items():
            encounters.setdefault(image.rpartition("_")[0], set()).add(part)
        assert all(len(parts) == 1 for parts in encounters.values())
        assert min(counts(datamodule).values()) > 0
        tested += datamodule.datasets["test"].ids
    assert sorted(tested) == list(datamodule.parts)
