"""ISIC 2018: layout, batch contract and what is said of damaged folders."""

import shutil

import pytest
import torch

from common.errors import UserError
from datamodules import ISIC2018, edge_distance

IMAGES = "ISIC2018_Task1-2_Training_Input"
MASKS = "ISIC2018_Task1_Training_GroundTruth"


def make(data, tmp_path, **settings):
    arguments = {"image_size": 16, "batch_size": 4, **settings}
    datamodule = ISIC2018(root=data / "isic2018", cache=tmp_path / "cache", **arguments)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def test_batches_follow_the_contract(isic_data, tmp_path):
    datamodule = make(isic_data, tmp_path)
    assert {k: len(v) for k, v in datamodule.datasets.items()} == {"train": 14, "val": 2, "test": 4}
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        batch = next(iter(loader))
        count = len(batch["id"])
        assert batch.keys() == {"image", "mask", "edge_distance", "id", "size"}
        assert batch["image"].shape == (count, 3, 16, 16)
        assert batch["image"].dtype == batch["mask"].dtype == torch.float32
        assert batch["mask"].shape == batch["edge_distance"].shape == (count, 1, 16, 16)
        assert set(batch["mask"].unique().tolist()) <= {0, 1}
        assert batch["size"].tolist() == [[144, 192]] * count
        assert batch["image"].amin(dim=(1, 2, 3)).tolist() == [0] * count
        assert batch["image"].amax(dim=(1, 2, 3)).tolist() == [1] * count
        for mask, distance in zip(batch["mask"], batch["edge_distance"], strict=True):
            assert torch.equal(distance, edge_distance(mask)), "made after augmentation"
    assert "edge_distance" not in next(iter(datamodule.test_dataloader()))


def test_reference_split_is_in_sorted_order(isic_data, tmp_path):
    parts = make(isic_data, tmp_path).parts
    assert list(parts) == [f"ISIC_{i:07d}" for i in range(20)]
    assert list(parts.values()) == ["train"] * 14 + ["val"] * 2 + ["test"] * 4


def test_random_split_has_the_same_sizes_and_depends_on_the_seed(isic_data, tmp_path):
    first = make(isic_data, tmp_path, split="random", seed=1).parts
    again = make(isic_data, tmp_path, split="random", seed=1).parts
    other = make(isic_data, tmp_path, split="random", seed=2).parts
    assert first == again != other
    assert sorted(first.values()) == sorted(other.values())


def test_a_limited_test_is_spread(isic_data, tmp_path):
    datamodule = make(isic_data, tmp_path, limit_test=2)
    assert datamodule.datasets["test"].ids == ["ISIC_0000016", "ISIC_0000019"]


def test_evaluation_is_never_augmented(isic_data, tmp_path):
    flip = {"transforms": [{"name": "HorizontalFlip", "p": 1.0}]}
    flipped = make(isic_data, tmp_path, augmentation=flip)
    straight = make(isic_data, tmp_path)
    for part in ("val", "test"):
        pairs = (d.datasets[part][0, 0]["image"] for d in (flipped, straight))
        assert torch.equal(*pairs)
    first, second = (d.datasets["train"][0, 0] for d in (flipped, straight))
    assert torch.equal(first["image"], second["image"].flip(-1))
    assert torch.equal(first["mask"], second["mask"].flip(-1))


def test_a_data_folder_that_goes_during_a_run_does_not_end_it(isic_copy, tmp_path):
    datamodule = make(isic_copy, tmp_path)
    shutil.rmtree(isic_copy)
    datamodule.prepare_data()
    datamodule.setup()
    assert len(next(iter(datamodule.test_dataloader()))["id"]) == 2


def test_other_files_among_the_images_are_passed_over(isic_copy, tmp_path):
    (isic_copy / "isic2018" / IMAGES / "ATTRIBUTION.txt").write_text("thanks")
    (isic_copy / "isic2018" / MASKS / ".DS_Store").write_text("")
    assert len(make(isic_copy, tmp_path).parts) == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r), rf"{IMAGES} does not exist; set paths.data"),
        (lambda r: shutil.rmtree(r / MASKS), rf"{MASKS} does not exist"),
        (lambda r: [p.unlink() for p in (r / IMAGES).iterdir()], r"has no images; set paths.data"),
        (
            lambda r: (r / MASKS / "ISIC_0000003_segmentation.png").unlink(),
            r"1 image\(s\) without partner, first ISIC_0000003: .*ISIC_0000003_segmentation.png",
        ),
        (
            lambda r: (r / IMAGES / "ISIC_0000005.jpg").unlink(),
            r"1 mask\(s\) without partner, first ISIC_0000005",
        ),
    ],
)
def test_missing_files_are_named(isic_copy, tmp_path, damage, message):
    damage(isic_copy / "isic2018")
    with pytest.raises(UserError, match=message):
        make(isic_copy, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"batch_size": "four"}, "batch_size=four"),
        ({"split": "official"}, "split=official does not exist; choose from reference, random"),
        ({"normalization": "zscore"}, "normalization=zscore"),
        ({"limit_test": 0}, "limit_test=0"),
    ],
)
def test_illegal_arguments_are_named(isic_data, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        make(isic_data, tmp_path, **settings)
