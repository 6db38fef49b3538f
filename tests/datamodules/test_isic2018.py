"""ISIC 2018: layout, batch contract and what is said of damaged folders."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datamodules import ISIC2018, border_distance
from datamodules.loading import EpochSampler

IMAGES = "ISIC2018_Task1-2_Training_Input"
MASKS = "ISIC2018_Task1_Training_GroundTruth"


def build(data, tmp_path, **settings):
    arguments = {"image_size": 16, "batch_size": 4, **settings}
    return ISIC2018(root=data / "isic2018", cache=tmp_path / "cache", **arguments)


def make(data, tmp_path, **settings):
    datamodule = build(data, tmp_path, **settings)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def test_batches_follow_the_contract(isic_data, tmp_path):
    datamodule = make(isic_data, tmp_path)
    assert {k: len(v) for k, v in datamodule.datasets.items()} == {"train": 14, "val": 2, "test": 4}
    for part in ("train", "val", "test"):
        batch = next(iter(getattr(datamodule, f"{part}_dataloader")()))
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
            assert torch.equal(distance, border_distance(mask)), "made after augmentation"


def test_reference_split_is_in_sorted_order(isic_data, tmp_path):
    parts = make(isic_data, tmp_path).parts
    assert list(parts) == [f"ISIC_{i:07d}" for i in range(20)]
    assert list(parts.values()) == ["train"] * 14 + ["val"] * 2 + ["test"] * 4


def test_random_split_has_the_same_sizes_and_depends_on_its_own_seed(isic_data, tmp_path):
    first = make(isic_data, tmp_path, split="random", split_seed=1, seed=1).parts
    again = make(isic_data, tmp_path, split="random", split_seed=1, seed=2).parts
    other = make(isic_data, tmp_path, split="random", split_seed=2, seed=1).parts
    assert first == again != other
    assert sorted(first.values()) == sorted(other.values())


def test_official_parts_are_taken_as_published(isic_copy, tmp_path, pairs):
    root = isic_copy / "isic2018"
    for content, (name, count) in enumerate((("Validation", 2), ("Test", 3))):
        folders = (root / IMAGES.replace("Training", name), root / MASKS.replace("Training", name))
        pairs(*folders, [f"ISIC_{content}{i}" for i in range(count)], content=content)
    parts = make(isic_copy, tmp_path, split="official").parts
    assert sorted(parts.values()) == ["test"] * 3 + ["train"] * 10 + ["val"] * 2
    assert len(make(isic_copy, tmp_path).parts) == 10, "the references divide the training part"


def test_a_split_file_is_taken_in_place_of_a_split(isic_data, tmp_path):
    drawn = make(isic_data, tmp_path, split="random", split_seed=3)
    rows = "".join(f"{key},{part}\n" for key, part in drawn.parts.items())
    (tmp_path / "mine.csv").write_text("id,split\n" + rows)
    given = make(isic_data, tmp_path, split_file=tmp_path / "mine.csv")
    assert given.parts == drawn.parts
    assert given.split_sha == drawn.split_sha


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


@pytest.mark.parametrize("normalization", ["minmax", "reference"])
def test_overfitting_sees_the_same_few_images_everywhere(isic_data, tmp_path, normalization):
    flip = {"transforms": [{"name": "HorizontalFlip", "p": 1.0}]}
    settings = {"augmentation": flip, "normalization": normalization}
    datamodule = make(isic_data, tmp_path, overfit=3, **settings)
    train, val, test = (datamodule.datasets[part] for part in ("train", "val", "test"))
    assert train.ids == val.ids == test.ids == ["ISIC_0000000", "ISIC_0000006", "ISIC_0000013"]
    straight = make(isic_data, tmp_path, normalization=normalization).datasets["train"]
    for index, row in enumerate((0, 6, 13)):
        for dataset in (train, val, test):
            assert torch.equal(dataset[5, index]["image"], straight[0, row]["image"])
    batch = next(iter(datamodule.train_dataloader()))
    assert sorted(batch["id"]) == train.ids


def test_overfitting_on_more_than_there_are_takes_all(isic_data, tmp_path):
    datamodule = make(isic_data, tmp_path, overfit=99)
    assert [len(dataset) for dataset in datamodule.datasets.values()] == [14, 14, 14]


def test_more_processes_than_images_are_refused(isic_data, tmp_path):
    datamodule = make(isic_data, tmp_path)
    datamodule.check_processes(2)
    with pytest.raises(UserError, match=r"val part has 2 image\(s\) for 3 proc.*trainer.devices"):
        datamodule.check_processes(3)
    assert len(EpochSampler(14, pad=True, rank=29, world_size=30)) == 1, "training repeats images"


def test_a_data_folder_that_goes_during_a_run_does_not_end_it(isic_copy, tmp_path):
    datamodule = make(isic_copy, tmp_path)
    shutil.rmtree(isic_copy)
    datamodule.prepare_data()
    datamodule.setup()
    assert len(next(iter(datamodule.test_dataloader()))["id"]) == 2


def test_other_files_among_the_images_are_passed_over(isic_copy, tmp_path):
    (isic_copy / "isic2018" / IMAGES / "ATTRIBUTION.txt").write_text("thanks")
    (isic_copy / "isic2018" / IMAGES / "._ISIC_0000001.jpg").write_text("left by macOS")
    (isic_copy / "isic2018" / MASKS / ".DS_Store").write_text("")
    (isic_copy / "isic2018" / MASKS / "._ISIC_0000001_segmentation.png").write_text("")
    assert len(make(isic_copy, tmp_path).parts) == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda r: shutil.rmtree(r),
            rf"{IMAGES} does not exist; get it from challenge.*set paths.data",
        ),
        (lambda r: shutil.rmtree(r / MASKS), rf"{MASKS} does not exist"),
        (lambda r: [p.unlink() for p in (r / IMAGES).iterdir()], r"has no images; get it from"),
        (
            lambda r: (r / MASKS / "ISIC_0000003_segmentation.png").unlink(),
            r"ISIC_0000003.jpg is without partner: .*ISIC_0000003_segmentation.png is missing",
        ),
        (
            lambda r: (r / IMAGES / "ISIC_0000005.jpg").unlink(),
            r"ISIC_0000005_segmentation.png is without partner: .*/ISIC_0000005.jpg is missing",
        ),
        (
            lambda r: [p.unlink() for p in (r / MASKS).iterdir()],
            r"^10 times image without partner: .*ISIC_0000000.jpg .* 10 problems in all",
        ),
        (
            lambda r: [p.unlink() for f in (IMAGES, MASKS) for p in sorted((r / f).iterdir())[3:]],
            r"3 images are too few to split .*: val would be empty; add images",
        ),
        (
            lambda r: shutil.copy(r / IMAGES / "ISIC_0000004.jpg", r / IMAGES / "ISIC_0000004.png"),
            r"Two images have the id ISIC_0000004: .*ISIC_0000004.jpg and .*ISIC_0000004.png",
        ),
        (
            lambda r: Image.new("L", (60, 50)).save(r / MASKS / "ISIC_0000006_segmentation.png"),
            r"ISIC_0000006.jpg has 192x144 .*ISIC_0000006_segmentation.png has 60x50; replace",
        ),
    ],
)
def test_what_names_and_headers_show_is_named(isic_copy, tmp_path, damage, message):
    damage(isic_copy / "isic2018")
    datamodule = build(isic_copy, tmp_path)
    with pytest.raises(UserError, match=message):
        datamodule.prepare_data()
    assert not (tmp_path / "cache").exists(), "known before anything is decoded"


def cut(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def save_grey(path):
    grey = np.tile(np.arange(192, dtype=np.uint8), (144, 1))
    Image.fromarray(grey).save(path)


@pytest.mark.parametrize(
    ("folder", "damage", "message"),
    [
        (IMAGES, cut, r"ISIC_0000006.jpg cannot be decoded"),
        (MASKS, cut, r"ISIC_0000006_segmentation.png cannot be decoded"),
        (IMAGES, lambda p: p.write_bytes(b""), r"ISIC_0000006.jpg cannot be decoded"),
        (MASKS, save_grey, r"ISIC_0000006_segmentation.png has 192 grey levels"),
    ],
)
def test_broken_files_are_named_at_caching(isic_copy, tmp_path, folder, damage, message):
    (path,) = (isic_copy / "isic2018" / folder).glob("ISIC_0000006*")
    damage(path)
    datamodule = build(isic_copy, tmp_path)
    with pytest.raises(UserError, match=message):
        datamodule.prepare_data()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("mode", ["1", "P", "RGB"])
def test_masks_of_any_storage_are_read(isic_copy, tmp_path, mode):
    expected = make(isic_copy, tmp_path).cache.masks
    for path in (isic_copy / "isic2018" / MASKS).iterdir():
        Image.open(path).convert(mode).save(path)
    masks = make(isic_copy, tmp_path).cache.masks
    assert np.array_equal(masks, expected)
    assert masks.max() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"batch_size": "four"}, "batch_size=four"),
        ({"split": "grouped"}, "split=grouped does not exist; choose one of reference, ran"),
        ({"normalization": "zscore"}, "normalization=zscore"),
        ({"limit_test": 0}, "limit_test=0"),
        ({"overfit": 0}, "overfit=0"),
        ({"split_seed": -1}, "split_seed=-1"),
    ],
)
def test_illegal_arguments_are_named(isic_data, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        make(isic_data, tmp_path, **settings)
