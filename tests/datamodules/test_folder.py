"""Any folder of images and masks."""

import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules import Folder
from disc_set import write_discs

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


def counts(datamodule):
    return {part: len(dataset) for part, dataset in datamodule.datasets.items()}


def write_parts(root, *folders, each=3, layout="{}/images {}/masks"):
    for number, folder in enumerate(folders):
        images, masks = layout.format(folder, folder).split()
        names = [f"{number}_{index}" for index in range(each)]
        write_discs(root, images=images, masks=masks, names=names)


@pytest.mark.parametrize(
    "layout", ["{}/images {}/masks", "images/{} masks/{}", "{}/Images {}/MASKS"]
)
@pytest.mark.parametrize(
    "folders",
    [
        ("train", "valid", "test"),
        ("train", "validation", "test"),
        ("Training", "Val", "TESTING"),
        ("training", "dev", "Test"),
    ],
)
def test_folders_of_parts_mean_what_they_say(tmp_path, load, folders, layout):
    write_parts(tmp_path / "mine", *folders, layout=layout)
    datamodule = load(Folder, tmp_path / "mine")
    assert counts(datamodule) == {"train": 3, "val": 3, "test": 3}
    assert [key for key in datamodule.parts if key.startswith("val/")] == [
        f"val/1_{index}" for index in range(3)
    ]


@pytest.mark.parametrize("layout", ["{}/images {}/masks", "images/{} masks/{}"])
def test_another_folder_beside_train_is_refused(tmp_path, load, layout):
    write_parts(tmp_path / "mine", "train", "holdout", "test", layout=layout)
    (tmp_path / "mine" / ".cache").mkdir()
    with pytest.raises(UserError, match=r"holdout.*train, training, val, valid, validation, dev,"):
        load(Folder, tmp_path / "mine")


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("train", "val", "valid", "test"), "val/ and valid/"),
        (("train", "Test", "test"), "Test/ and test/"),
        (("train", "training", "test"), "train/ and training/"),
    ],
)
def test_two_folders_of_one_part_are_refused(tmp_path, load, folders, names):
    write_parts(tmp_path / "mine", *folders)
    with pytest.raises(UserError, match=names):
        load(Folder, tmp_path / "mine")


def test_images_beside_train_are_refused(root, load):
    write_parts(root, "train", "test")
    with pytest.raises(UserError, match=r"images/ beside train/, test/"):
        load(Folder, root)


def test_a_part_that_is_a_broken_link_is_refused(tmp_path, load):
    write_parts(tmp_path / "mine", "train", "test")
    (tmp_path / "mine" / "val").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"mine/val is a link to nothing"):
        load(Folder, tmp_path / "mine")


PATIENTS = [f"p{patient}/IMG_{index:04d}" for patient in range(5) for index in range(2)]


@pytest.mark.parametrize("masks", ["masks", "images"])
def test_subfolders_are_read_and_equal_names_are_different(tmp_path, load, masks):
    root = tmp_path / "mine"
    write_discs(root, names=PATIENTS, masks=masks, mask_suffix="_mask")
    datamodule = load(Folder, root)
    assert list(datamodule.parts) == PATIENTS
    by_id = {sample.id: sample for sample in datamodule.find_samples()}
    for name in PATIENTS:
        assert by_id[name].masks == (root / masks / f"{name}_mask.png",)
    assert len({datamodule.cache.images[row].tobytes() for row in range(10)}) == 10


def test_subfolders_of_parts_are_read(tmp_path, load):
    for part in ("train", "val", "test"):
        write_discs(tmp_path / "mine" / part, names=PATIENTS)
    parts = load(Folder, tmp_path / "mine").parts
    assert list(parts) == [f"{p}/{name}" for p in ("test", "train", "val") for name in PATIENTS]


def test_masks_without_subfolders_fit_where_the_name_is_the_only_one(tmp_path, load):
    root = tmp_path / "mine"
    names = [f"p{index % 3}/IMG_{index}" for index in range(10)]
    write_discs(root, names=names)
    for path in sorted((root / "masks").rglob("*.png")):
        path.rename(root / "masks" / path.name)
    assert sorted(load(Folder, root).parts) == sorted(names)
    write_discs(root, names=["p9/IMG_1"], masks="elsewhere")
    with pytest.raises(UserError, match=r"p1/IMG_1.jpg is without partner"):
        load(Folder, root)


def test_masks_beside_their_images_are_found(tmp_path, load):
    root = tmp_path / "mine"
    names = write_discs(root, 10, images=".", masks=".", mask_suffix="_Segmentation")
    datamodule = load(Folder, root)
    assert list(datamodule.parts) == names
    assert all(dataset.labelled for dataset in datamodule.datasets.values())
    (root / "disc_03_Segmentation.png").unlink()
    with pytest.raises(UserError, match=r"disc_03.jpg is without partner"):
        load(Folder, root)


@pytest.mark.parametrize("suffix", ["-mask", "_seg0", "_Mask", "-MASK"])
def test_more_mask_suffixes_are_known(tmp_path, load, suffix):
    names = write_discs(tmp_path / "mine", 10, mask_suffix=suffix)
    assert list(load(Folder, tmp_path / "mine").parts) == names


@pytest.mark.parametrize("given", ["_contour", "_Contour", "_contour.png"])
def test_a_suffix_of_ones_own_is_given_by_its_key(tmp_path, load, given):
    root = tmp_path / "mine"
    names = write_discs(root, 10, mask_suffix="_contour")
    with pytest.raises(UserError, match=r"disc_00_contour.png.*datamodule.mask_suffix"):
        load(Folder, root)
    datamodule = load(Folder, root, mask_suffix=given)
    assert list(datamodule.parts) == names
    # Masks of another name are not taken as well.
    (root / "masks" / "disc_02_contour.png").rename(root / "masks" / "disc_02_mask.png")
    with pytest.raises(UserError, match=r"disc_02.jpg is without partner.*disc_02_mask.png"):
        load(Folder, root, mask_suffix=given)


def test_names_that_differ_in_case_alone_keep_their_masks(tmp_path, load):
    root = tmp_path / "mine"
    names = [f"{letter}_{index}" for index in range(5) for letter in "Aa"]
    write_discs(root, names=names)
    for sample in load(Folder, root).find_samples():
        assert sample.masks == (root / "masks" / f"{sample.id}.png",)


def test_damaged_entries_are_named_before_training(root, load):
    (root / "images" / "case 3.jpg").unlink()
    (root / "images" / "case 3.jpg").symlink_to(root / "gone.jpg")
    with pytest.raises(UserError, match=r"case 3.jpg is a link to nothing"):
        load(Folder, root)


@pytest.mark.parametrize("lesion", [2, (255, 0, 0), (128, 0, 0)])
def test_masks_of_other_values_train_alike(root, load, lesion):
    before = load(Folder, root).cache.masks
    assert before.any()
    for path in (root / "masks").iterdir():
        mask = np.asarray(Image.open(path)) > 0
        values = mask if isinstance(lesion, int) else mask[..., None]
        Image.fromarray((values * np.array(lesion)).astype(np.uint8)).save(path)
    assert np.array_equal(load(Folder, root).cache.masks, before)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_grey_masks_are_read_with_the_threshold(root, load, suffix):
    before = load(Folder, root).cache.masks
    for path in list((root / "masks").iterdir()):
        mask = Image.open(path)
        small = mask.resize((mask.width // 2, mask.height // 2), Image.Resampling.BILINEAR)
        path.unlink()
        small.resize(mask.size, Image.Resampling.BILINEAR).save(path.with_suffix(f".{suffix}"))
    with pytest.raises(UserError, match="datamodule.mask_threshold=0.5"):
        load(Folder, root)
    after = load(Folder, root, mask_threshold=0.5)
    assert (after.cache.masks != before).mean() < 0.02
    assert after.split_sha != load(Folder, root, mask_threshold=0.4).split_sha


@pytest.mark.parametrize("value", [0.0, 1.0, 1, -0.5, "half", True])
def test_a_threshold_outside_its_range_is_refused(root, load, value):
    with pytest.raises(UserError, match=f"datamodule.mask_threshold={value} must lie between"):
        load(Folder, root, mask_threshold=value)


def test_turned_photographs_are_refused_before_anything_is_cached(tmp_path, load):
    root = tmp_path / "mine"
    write_discs(root, 20, orientation=3)
    with pytest.raises(UserError, match=r"20 times EXIF orientation: .*datamodule.exif=apply"):
        load(Folder, root)
    assert not (tmp_path / "cache").exists()
    stored = load(Folder, root, exif="ignore").cache
    turned = load(Folder, root, exif="apply").cache
    # Resizing rounds.
    difference = stored.images - turned.images[:, ::-1, ::-1].astype(int)
    assert np.abs(difference).max() <= 1
    assert np.array_equal(stored.masks, turned.masks)
    with pytest.raises(UserError, match="datamodule.exif=always"):
        load(Folder, root, exif="always")


def test_accents_and_formats_of_any_kind_pair(tmp_path, load):
    write_discs(tmp_path / "mine", 12)
    for index, path in enumerate(sorted((tmp_path / "mine" / "images").iterdir())):
        mask = tmp_path / "mine" / "masks" / f"{path.stem}.png"
        name = f"\u00e9{index}"
        with Image.open(path) as picture:
            picture.save(path.with_name(f"{name}.webp"))
        path.unlink()
        mask.rename(mask.with_name(unicodedata.normalize("NFD", f"{name}.png")))
    datamodule = load(Folder, tmp_path / "mine")
    assert sum(map(len, datamodule.datasets.values())) == 12
    (tmp_path / "mine" / "images" / "x.HEIC").touch()
    with pytest.raises(UserError, match=r"x.HEIC is in a format that is not read"):
        load(Folder, tmp_path / "mine")
