"""What all lesion datasets share: soft masks and a teacher's maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.errors import UserError
from datamodules import ISIC2018, ISIC2019, Folder, border_distance, edge_distance
from datamodules.augmentations import Augmentation
from datamodules.loading import sample_seed
from disc_set import write_discs

POLICIES = sorted((Path(__file__).resolve().parents[2] / "conf" / "augmentation").glob("*.yaml"))
FLIP = {"transforms": [{"name": "HorizontalFlip", "p": 1.0}]}


@pytest.fixture
def root(isic_data):
    return isic_data / "isic2018"


def test_soft_masks_have_grey_edges_in_every_part(root, load):
    hard, soft = (load(ISIC2018, root, mask_resize=how) for how in ("area", "soft"))
    assert hard.cache.folder != soft.cache.folder
    for part in ("train", "val", "test"):
        loaders = (getattr(datamodule, f"{part}_dataloader")() for datamodule in (hard, soft))
        for one, other in zip(*loaders, strict=True):
            assert one["id"] == other["id"]
            assert torch.equal(one["image"], other["image"])
            mask = other["mask"]
            assert mask.dtype == torch.float32
            assert mask.shape == one["mask"].shape
            assert mask.min() == 0
            assert mask.max() == 1
            assert len(mask.unique()) > 4
            levels = mask * 255
            torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
            assert ((mask > 0.5) != one["mask"].bool()).float().mean() < 0.1
            for grey, distance in zip(mask, other["edge_distance"], strict=True):
                assert torch.equal(distance, border_distance((grey > 0.5).float()))


def test_soft_masks_are_augmented_as_they_are(root, load):
    straight, flipped = (
        load(ISIC2018, root, mask_resize="soft", augmentation=policy).datasets["train"][0, 3]
        for policy in (None, FLIP)
    )
    for key in ("image", "mask"):
        assert torch.equal(flipped[key], straight[key].flip(-1))


def test_masks_at_their_own_size_are_never_soft(root, load):
    datamodule = load(ISIC2018, root, mask_resize="soft")
    datamodule.test_at_native_size()
    native = datamodule.datasets["test"][0, 0]["native_mask"]
    assert native.shape == (144, 192)
    assert native.dtype == np.uint8
    assert set(np.unique(native)) == {0, 1}


def test_diagnosis_data_takes_the_setting_and_needs_no_other_cache(tmp_path):
    assert ISIC2019(tmp_path, 8, 1, mask_resize="soft").mask_resize == "area"


def teach(dataset, seed=0):
    shape = (len(dataset), *dataset.cache.masks.shape[1:])
    dataset.teacher_maps = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return dataset.teacher_maps


@pytest.mark.parametrize("policy", POLICIES, ids=[path.stem for path in POLICIES])
@pytest.mark.parametrize("mask_resize", ["area", "soft"])
def test_a_teachers_maps_are_augmented_with_the_image(root, load, policy, mask_resize):
    policy = yaml.safe_load(policy.read_text())
    settings = {"image_size": 32, "mask_resize": mask_resize, "seed": 4}
    dataset = load(ISIC2018, root, augmentation=policy, **settings).datasets["train"]
    augmentation = Augmentation(**policy)
    for epoch in range(3):
        plain = [dataset[epoch, index] for index in range(len(dataset))]
        maps = teach(dataset, epoch)
        for index, without in enumerate(plain):
            item = dataset[epoch, index]
            taught = item.pop("teacher_probability")
            assert item.keys() == without.keys()
            for key in ("image", "mask", "edge_distance"):
                assert torch.equal(item[key], without[key])
            assert (taught.dtype, taught.shape) == (torch.float32, (1, 32, 32))
            image = np.array(dataset.cache.images[dataset.indices[index]])
            seed = sample_seed(4, epoch, index)
            _, moved = augmentation(image, maps[index], seed)
            assert torch.equal(taught[0], torch.from_numpy(moved.copy()).float() / 255)
        dataset.teacher_maps = None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_carry_a_teachers_maps(root, load, num_workers):
    datamodule = load(ISIC2018, root, num_workers=num_workers)
    dataset = datamodule.datasets["train"]
    maps = dict(zip(dataset.ids, teach(dataset), strict=True))
    for batch in datamodule.train_dataloader():
        expected = np.stack([maps[key] for key in batch["id"]])[:, None] / np.float32(255)
        assert np.array_equal(batch["teacher_probability"].numpy(), expected)
    assert "teacher_probability" not in next(iter(datamodule.val_dataloader()))
    assert "teacher_probability" in dataset.plain(0)


@pytest.mark.parametrize(
    ("empty", "message"),
    [("train val test", "All 12 masks of the dataset"), ("train", "All 8 masks of the train part")],
)
def test_masks_that_are_all_empty_are_refused(tmp_path, load, empty, message):
    root = tmp_path / "mine"
    for part, count in (("train", 8), ("val", 2), ("test", 2)):
        write_discs(root / part, count)
        if part in empty.split():
            for path in (root / part / "masks").iterdir():
                Image.new("L", (64, 48)).save(path)
    with pytest.raises(UserError, match=message):
        load(Folder, root)
    one = root / "train" / "masks" / "disc_07.png"
    Image.new("L", (64, 48), 255).save(one)
    assert len(load(Folder, root).datasets["train"]) == 8
    for part in ("train", "val", "test"):
        for path in (root / part / "masks").iterdir():
            Image.new("L", (64, 48), 255).save(path)
    with pytest.raises(UserError, match="All 12 masks of the dataset .* are full"):
        load(Folder, root)
    Image.new("L", (64, 48)).save(one)
    # A selection of healthy skin is no broken dataset.
    assert len(load(Folder, root, overfit=1).datasets["train"]) == 1
    assert len(load(Folder, root, split="all", limit_test=1).datasets["test"]) == 1


def test_the_published_masks_and_edges_can_be_had(root, load):
    published = load(ISIC2018, root, mask_resize="published", edges="canny")
    batch = next(iter(published.train_dataloader()))
    for mask, distance in zip(batch["mask"], batch["edge_distance"], strict=True):
        assert torch.equal(distance, edge_distance(mask))
    ours = load(ISIC2018, root)
    assert published.split_sha != ours.split_sha, "scores on other masks are not comparable"
    assert published.parts == ours.parts
    with pytest.raises(UserError, match=r"datamodule.edges=sobel.*border, canny"):
        load(ISIC2018, root, edges="sobel")
