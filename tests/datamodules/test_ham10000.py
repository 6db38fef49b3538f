"""HAM10000: both layouts, lesions that stay together, and what is said of damaged folders."""

import shutil

import pytest
import torch

from common.errors import UserError
from datamodules import HAM10000, HAM10000Diagnosis
from datamodules.splits import leaks

PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")
MASKS = "HAM10000_segmentations_lesion_tschandl"
METADATA = "HAM10000_metadata.csv"


@pytest.fixture
def ham_copy(ham_data, tmp_path):
    """A copy of the data folder for a test to damage."""
    return shutil.copytree(ham_data, tmp_path / "data")


def build(data, tmp_path, **settings):
    arguments = {"image_size": 16, "batch_size": 4, "split": "lesion_grouped", **settings}
    return HAM10000(root=data / "ham10000", cache=tmp_path / "cache", **arguments)


def make(data, tmp_path, **settings):
    datamodule = build(data, tmp_path, **settings)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def to_reference_layout(root):
    (root / MASKS).rename(root / "masks")
    (root / PARTS[0]).rename(root / "images")
    for path in (root / PARTS[1]).iterdir():
        path.rename(root / "images" / path.name)
    (root / PARTS[1]).rmdir()


def counts(datamodule):
    return {part: len(dataset) for part, dataset in datamodule.datasets.items()}


def test_batches_follow_the_contract(ham_data, tmp_path):
    datamodule = make(ham_data, tmp_path)
    for part in ("train", "val", "test"):
        batch = next(iter(getattr(datamodule, f"{part}_dataloader")()))
        count = len(batch["id"])
        assert batch.keys() == {"image", "mask", "edge_distance", "id", "size"}
        assert batch["image"].shape == (count, 3, 16, 16)
        assert batch["mask"].shape == batch["edge_distance"].shape == (count, 1, 16, 16)
        assert batch["mask"].unique().tolist() == [0, 1]
        assert batch["size"].tolist() == [[144, 192]] * count


def test_both_parts_are_found_and_the_references_split_is_in_sorted_order(ham_data, tmp_path):
    datamodule = make(ham_data, tmp_path, split="reference", allow_leak=True)
    assert list(datamodule.parts) == [f"ISIC_{i:07d}" for i in range(24)]
    assert list(datamodule.parts.values()) == ["train"] * 17 + ["val"] * 4 + ["test"] * 3


def test_the_references_split_has_lesions_in_two_parts(ham_data, tmp_path):
    message = r"images of \d lesion\(s\) in more than one part, .*set datamodule.allow_leak=true"
    with pytest.raises(UserError, match=message):
        make(ham_data, tmp_path, split="reference")


def test_images_of_a_lesion_stay_together(ham_data, tmp_path):
    for split_seed in range(5):
        datamodule = make(ham_data, tmp_path, split_seed=split_seed)
        parts = datamodule.parts
        for index in range(8):
            assert parts[f"ISIC_{index:07d}"] == parts[f"ISIC_{index + 16:07d}"]
        sizes = counts(datamodule)
        assert sum(sizes.values()) == 24
        assert abs(sizes["train"] - 24 * 7200 / 10015) <= 1
        assert abs(sizes["test"] - 24 * 1015 / 10015) <= 1


def test_only_the_seed_of_the_split_changes_it(ham_data, tmp_path):
    first = make(ham_data, tmp_path, split_seed=1, seed=1)
    assert first.split_sha == make(ham_data, tmp_path, split_seed=1, seed=2).split_sha
    assert first.split_sha != make(ham_data, tmp_path, split_seed=2, seed=1).split_sha


def test_the_references_layout_gives_the_same_samples(ham_data, ham_copy, tmp_path):
    to_reference_layout(ham_copy / "ham10000")
    official, reference = make(ham_data, tmp_path), make(ham_copy, tmp_path)
    assert reference.parts == official.parts
    for part in ("train", "val", "test"):
        one, two = (d.datasets[part][0, 0] for d in (official, reference))
        assert torch.equal(one["image"], two["image"])


def test_the_first_part_alone_is_a_dataset(ham_copy, tmp_path):
    root = ham_copy / "ham10000"
    for path in (root / PARTS[1]).iterdir():
        (root / MASKS / f"{path.stem}_segmentation.png").unlink()
    shutil.rmtree(root / PARTS[1])
    assert counts(make(ham_copy, tmp_path, split="reference")) == {"train": 9, "val": 2, "test": 1}


def quoted(text):
    lines = (line.replace(",", '"\t"') for line in text.splitlines())
    return "".join(f'"{line}"\n' for line in lines)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("HAM10000_metadata", lambda text: text),
        ("HAM10000_metadata.tab", lambda text: text.replace(",", "\t")),
        ("HAM10000_metadata.tab", quoted),
        ("HAM10000_metadata.csv", lambda text: text.replace(",", ";")),
        ("HAM10000_metadata.csv", lambda text: "\ufeff" + text),
        ("HAM10000_metadata.csv", lambda t: "\n".join([t.split()[0], *sorted(t.split()[1:])])),
    ],
)
def test_metadata_is_read_in_every_form_it_comes_in(ham_data, ham_copy, tmp_path, name, change):
    path = ham_copy / "ham10000" / METADATA
    text = path.read_bytes().decode()
    path.unlink()
    path.with_name(name).write_bytes(change(text).encode())
    assert make(ham_copy, tmp_path).parts == make(ham_data, tmp_path).parts


def drop_row(root):
    lines = (root / METADATA).read_text().splitlines()
    (root / METADATA).write_text("\n".join(line for line in lines if "ISIC_0000007" not in line))


def one_lesion(root):
    rows = "".join(f"ISIC_{index:07d},HAM_0000001\n" for index in range(24))
    (root / METADATA).write_text("image_id,lesion_id\n" + rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda r: (r / METADATA).unlink(),
            r"lesion_grouped needs the lesion .* 24 of 24 have not, first ISIC_0000000; .*DBW86T",
        ),
        (
            drop_row,
            r"lesion_grouped needs the lesion .* 1 of 24 have not, first ISIC_0000007; get",
        ),
        (
            lambda r: (r / METADATA).write_text("image_id,dx\nISIC_0000000,nv\n"),
            r"metadata.csv has no columns (image_id and )?lesion_id; get it from",
        ),
        (
            lambda r: (r / METADATA).write_bytes(b"\x89PNG\xff\xfe\x00,"),
            r"metadata.csv cannot be read \(it is no text\); get it from",
        ),
        (
            one_lesion,
            r"24 images in 1 group\(s\) are too few .* 7200/1800/1015: val would be empty",
        ),
    ],
)
def test_a_split_that_is_not_possible_is_refused_before_decoding(
    ham_copy, tmp_path, damage, message
):
    damage(ham_copy / "ham10000")
    datamodule = build(ham_copy, tmp_path)
    with pytest.raises(UserError, match=message):
        datamodule.prepare_data()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("split", ["reference", "random"])
def test_other_splits_do_without_metadata(ham_copy, tmp_path, split):
    (ham_copy / "ham10000" / METADATA).unlink()
    datamodule = make(ham_copy, tmp_path, split=split)
    assert counts(datamodule) == {"train": 17, "val": 4, "test": 3}


def copy_to_second_part(root):
    shutil.copy(root / PARTS[0] / "ISIC_0000002.jpg", root / PARTS[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"ham10000 has neither HAM10000_images_part_1/ .*, nor images/"),
        (
            lambda r: shutil.rmtree(r / MASKS),
            r"segmentations_lesion_tschandl/, nor images/ beside masks/; .*DBW86T.*paths.data",
        ),
        (
            lambda r: shutil.rmtree(r / PARTS[1]),
            r"^12 times mask without partner: .*part_1/ISIC_0000012.jpg or "
            r".*part_2/ISIC_0000012.jpg is missing",
        ),
        (
            copy_to_second_part,
            r"the id ISIC_0000002: .*part_1/ISIC_0000002.jpg and .*part_2/ISIC_0000002.jpg",
        ),
    ],
)
def test_missing_and_doubled_files_are_named(ham_copy, tmp_path, damage, message):
    damage(ham_copy / "ham10000")
    with pytest.raises(UserError, match=message):
        make(ham_copy, tmp_path)


def test_lesions_are_grouped_unless_asked_otherwise(ham_data, make_config):
    from tasks.build import build_datamodule

    config = make_config("datamodule=ham10000", f"paths.data={ham_data}", "seed=4")
    datamodule = build_datamodule(config["datamodule"])
    assert datamodule.split == "lesion_grouped"
    assert (datamodule.seed, datamodule.split_seed) == (4, 0)
    assert len(datamodule.find_samples()) == 24


def test_an_image_with_two_rows_is_refused(ham_copy, tmp_path):
    path = ham_copy / "ham10000" / METADATA
    path.write_text(path.read_text() + "\nHAM_9,ISIC_0000003,nv,histo,50.0,male,back")
    with pytest.raises(UserError, match="metadata.csv has two rows of ISIC_0000003; remove one"):
        make(ham_copy, tmp_path)


def diagnoses(data, tmp_path, **settings):
    arguments = {"image_size": 16, "batch_size": 4, **settings}
    datamodule = HAM10000Diagnosis(root=data / "ham10000", cache=tmp_path / "cache", **arguments)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def test_diagnoses_are_those_of_the_table(ham_copy, tmp_path):
    rows = ["lesion_id,image_id,dx"]
    rows += [f"HAM_{i % 16},ISIC_{i:07d},{'mel' if i % 16 < 6 else 'nv'}" for i in range(24)]
    (ham_copy / "ham10000" / METADATA).write_text("\n".join(rows))
    datamodule = diagnoses(ham_copy, tmp_path)
    assert datamodule.classes == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    for dataset in datamodule.datasets.values():
        for key, label in zip(dataset.ids, dataset.labels, strict=True):
            assert label == (4 if int(key[5:]) % 16 < 6 else 5)
    for index in range(8):
        parts = datamodule.parts
        assert parts[f"ISIC_{index:07d}"] == parts[f"ISIC_{index + 16:07d}"]
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.keys() == {"image", "label", "id", "size"}
    shutil.rmtree(ham_copy / "ham10000" / MASKS)
    assert diagnoses(ham_copy, tmp_path).parts == datamodule.parts


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "ISIC_0000003,nv",
            "ISIC_0000003,naevus",
            "has dx=naevus for ISIC_0000003; choose from ak",
        ),
        ("ISIC_0000003,nv", "ISIC_3,nv", "has no row of ISIC_0000003; restore it or remove"),
        ("dx,", "diagnosis,", "has no columns dx; get it from Harvard"),
    ],
)
def test_what_is_wrong_with_the_diagnoses_is_named(ham_copy, tmp_path, old, new, message):
    path = ham_copy / "ham10000" / METADATA
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        diagnoses(ham_copy, tmp_path)


@pytest.mark.parametrize("cls", [HAM10000, HAM10000Diagnosis])
def test_folds_keep_lesions_together(ham_data, tmp_path, cls):
    tested = []
    for fold in range(4):
        places = {"root": ham_data / "ham10000", "cache": tmp_path / "cache"}
        datamodule = cls(**places, image_size=16, batch_size=4, folds=4, fold=fold)
        samples = datamodule.find_samples()
        parts = datamodule.divide(samples)
        assert not leaks([sample.group for sample in samples], parts)
        tested += [s.id for s, part in zip(samples, parts, strict=True) if part == "test"]
    assert sorted(tested) == [f"ISIC_{i:07d}" for i in range(24)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 3}, "folds=3 and datamodule.fold=None do not fit"),
        ({"fold": 0}, "folds=None and datamodule.fold=0 do not fit"),
        ({"folds": 3, "fold": 3}, "fold=3 do not fit"),
        ({"folds": 1, "fold": 0}, "folds=1 must be a whole number, at least 2"),
        ({"folds": 2.5, "fold": 0}, "folds=2.5 must be"),
        ({"folds": 3, "fold": -1}, "fold=-1 must be"),
        ({"folds": 3, "fold": 0, "split_file": "a.csv"}, "split_file=a.csv and .* 3 folds"),
    ],
)
def test_folds_out_of_range_are_refused(ham_data, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        build(ham_data, tmp_path, **settings)
