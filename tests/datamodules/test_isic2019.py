"""ISIC 2019: classes, the references' split, lesions that stay together, views and metadata."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datamodules import ISIC2019
from datamodules.isic2019 import reference_order
from datamodules.splits import grouped_split, stratified_grouped_split
from datamodules.synthetic import synthesise_lesion

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "ssd_kd"
COLUMNS = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
COUNT = 60


def labels():
    return [COLUMNS[i % 4 if i < 40 else i % 8] for i in range(COUNT)]


def name(index):
    return f"ISIC_{index:07d}" + ("_downsampled" if index % 7 == 0 else "")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with 60 made-up images, drawn once."""
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(COUNT):
        image, _ = synthesise_lesion(0, index)
        Image.fromarray(image).save(folder / f"{name(index)}.jpg", quality=95)
    return folder


@pytest.fixture
def root(photographs, tmp_path):
    """60 images; two of every three share a lesion with the next one, and some have none given."""
    root = tmp_path / "isic2019"
    shutil.copytree(photographs, root / "ISIC_2019_Training_Input")
    rows = [",".join(["image", *COLUMNS])]
    for index, label in enumerate(labels()):
        rows.append(",".join([name(index), *("1.0" if c == label else "0.0" for c in COLUMNS)]))
    (root / "ISIC_2019_Training_GroundTruth.csv").write_text("\n".join(rows))
    write_metadata(root, [f"IL_{i // 4 * 4 + i % 4 // 3}" if i % 10 else "" for i in range(COUNT)])
    return root


def write_metadata(root, lesions, patients=None):
    rows = ["image,age_approx,anatom_site_general,lesion_id,sex"]
    # In another order than the table of diagnoses.
    for index in reversed(range(COUNT)):
        age, site, sex = (patients or {}).get(index, ("50.0", "", "male"))
        rows.append(f"{name(index)},{age},{site},{lesions[index]},{sex}")
    (root / "ISIC_2019_Training_Metadata.csv").write_text("\n".join(rows))


def test_the_references_order_is_the_golden_one():
    golden = json.loads((GOLDEN / "isic2019_permutation.json").read_text())
    order = reference_order(golden["n"])
    assert order[:20].tolist() == golden["first_20"]
    assert order[golden["n_test"] - 5 : golden["n_test"]].tolist() == golden["test_last_5"]
    digest = hashlib.sha256(order.astype("<i4").tobytes()).hexdigest()
    assert digest == golden["sha256_int32_le"]
    assert round(0.1 * golden["n"]) == golden["n_test"]


@pytest.mark.filterwarnings("ignore:.*least populated class")
def test_the_references_split(root, load):
    datamodule = load(ISIC2019, root, split="reference", allow_leak=True)
    expected = {name(row) for row in reference_order(COUNT)[:6]}
    parts = datamodule.parts
    assert {key for key, part in parts.items() if part == "test"} == expected
    assert sorted(parts.values()) == ["test"] * 6 + ["train"] * 43 + ["val"] * 11
    # scikit-learn's stratified folds have each class to within one image in every fold.
    label_of = dict(zip([name(i) for i in range(COUNT)], labels(), strict=True))
    for column in COLUMNS[:8]:
        rest = [key for key in parts if parts[key] != "test" and label_of[key] == column]
        in_val = sum(parts[key] == "val" for key in rest)
        assert abs(in_val - len(rest) / 5) <= 1


@pytest.mark.filterwarnings("ignore:.*least populated class")
def test_a_split_that_has_a_lesion_in_two_parts_must_be_asked_for(root, load):
    with pytest.raises(
        UserError, match=r"images of \d+ lesion\(s\) in more than one part, first I"
    ):
        load(ISIC2019, root, split="reference")


def test_the_split_and_class_weights_are_the_golden_ones(load, tmp_path):
    golden = json.loads((GOLDEN / "split_and_weights.json").read_text())["cases"][0]
    with np.load(GOLDEN / "split_and_weights.npz") as arrays:
        values = {key.removeprefix("case0/"): arrays[key] for key in arrays}
    diagnoses = values["in/label_index_in_MEL_NV_BCC_AK_BKL_DF_VASC_SCC"]
    folder = tmp_path / "isic2019" / "ISIC_2019_Training_Input"
    folder.mkdir(parents=True)
    rows = [",".join(["image", *COLUMNS])]
    for index, diagnosis in enumerate(diagnoses):
        Image.new("RGB", (8, 8)).save(folder / f"ISIC_{index:07d}.jpg")
        hot = ["1.0" if place == diagnosis else "0.0" for place in range(9)]
        rows.append(",".join([f"ISIC_{index:07d}", *hot]))
    (folder.parent / "ISIC_2019_Training_GroundTruth.csv").write_text("\n".join(rows))
    datamodule = load(ISIC2019, folder.parent, split="reference", image_size=8)

    assert list(datamodule.classes) == golden["class_order_alphabetical"]
    folds = dict(zip(values["out/train_ids"], values["out/train_folder"], strict=True))
    expected = {key: "val" if fold == 2 else "train" for key, fold in folds.items()}
    expected |= dict.fromkeys(values["out/test_ids"], "test")
    assert {int(key[5:]): part for key, part in datamodule.parts.items()} == expected
    numbers = dict(zip(values["out/train_ids"], values["out/train_class_number"], strict=True))
    for part in ("train", "val"):
        dataset = datamodule.datasets[part]
        assert dataset.labels.tolist() == [numbers[int(key[5:])] for key in dataset.ids]
    assert datamodule.class_weights == values["out/class_weights_fold2"].tolist()


def test_lesions_stay_together_and_classes_in_proportion(root, load):
    write_metadata(root, [f"IL_{i % 30}" for i in range(COUNT)])
    datamodule = load(ISIC2019, root)
    lesions = {}
    for index in range(COUNT):
        lesions.setdefault(index % 30, set()).add(datamodule.parts[name(index)])
    assert all(len(parts) == 1 for parts in lesions.values())
    samples = datamodule.find_samples()
    groups, reference = [sample.group for sample in samples], datamodule.reference_split
    classes = [sample.label for sample in samples]
    stratified = stratified_grouped_split(groups, classes, reference, 0)
    assert list(datamodule.parts.values()) == stratified
    assert stratified != grouped_split(groups, reference, 0), "classes are not left to chance"


def test_labels_are_alphabetical(root, load):
    datamodule = load(ISIC2019, root)
    assert datamodule.classes == ("AK", "BCC", "BKL", "DF", "MEL", "NV", "SCC", "VASC")
    label_of = dict(zip([name(i) for i in range(COUNT)], labels(), strict=True))
    for dataset in datamodule.datasets.values():
        for key, label in zip(dataset.ids, dataset.labels, strict=True):
            assert datamodule.classes[label] == label_of[key]


@pytest.mark.filterwarnings("ignore:.*least populated class")
def test_class_weights_are_those_of_the_training_part(root, load):
    datamodule = load(ISIC2019, root, split="reference", allow_leak=True)
    train = datamodule.datasets["train"].labels
    counts = np.bincount(train, minlength=8)
    expected = [round(43 / int(count), 3) if count else 0 for count in counts]
    assert datamodule.class_weights == expected


def test_batches_follow_the_contract(root, load):
    datamodule = load(ISIC2019, root, normalization="imagenet")
    for part in ("train", "val", "test"):
        batch = next(iter(getattr(datamodule, f"{part}_dataloader")()))
        count = len(batch["id"])
        assert batch.keys() == {"image", "label", "id", "size"}
        assert batch["image"].shape == (count, 3, 16, 16)
        assert (batch["label"].shape, batch["label"].dtype) == ((count,), torch.int64)
        assert batch["size"].tolist() == [[144, 192]] * count


def test_views_are_the_four_rotations(root, load):
    plain, views = (load(ISIC2019, root, views=v) for v in (False, True))
    for part in ("val", "train"):
        item = views.datasets[part][0, 0]
        upright = plain.datasets[part][0, 0]["image"]
        assert item["views"].shape == (4, 3, 16, 16)
        assert torch.equal(item["image"], item["views"][0])
        for turn in range(4):
            assert torch.equal(item["views"][turn], torch.rot90(upright, turn, dims=(1, 2)))


def test_views_are_mirrored_half_of_the_time_and_augmented_apart(root, load):
    nothing = {"transforms": [{"name": "HorizontalFlip", "p": 0.0}]}
    dataset = load(ISIC2019, root, views=True, augmentation=nothing).datasets["train"]
    upright = dataset.plain(0)["image"]
    mirrored = []
    for epoch in range(40):
        views = dataset[epoch, 0]["views"]
        mirrored.append(not torch.equal(views[0], upright))
        expected = upright.flip(-1) if mirrored[-1] else upright
        assert torch.equal(views[2], torch.rot90(expected, 2, dims=(1, 2)))
    assert 10 < sum(mirrored) < 30
    chance = {"transforms": [{"name": "VerticalFlip", "p": 0.5}]}
    dataset = load(ISIC2019, root, views=True, augmentation=chance).datasets["train"]
    kinds = set()
    for epoch in range(40):
        views = dataset[epoch, 0]["views"]
        turned = [torch.rot90(view, -turn, dims=(1, 2)) for turn, view in enumerate(views)]
        kinds.add(len({tuple(view.flatten().tolist()) for view in turned}))
    assert kinds - {1}, "not all views are augmented alike"


# Age, site and sex as in the table, and the numbers that stand for them.
PATIENTS = {
    5: (("45.0", "oral/genital", "female"), [45, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
    6: (("", "", ""), [0] * 11),
    8: (("80", "anterior torso", "male"), [80, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
    9: (("", "upper extremity", ""), [0] * 10 + [1]),
}


@pytest.mark.parametrize("settings", [{}, {"views": True, "num_workers": 1}])
def test_metadata_comes_with_its_image(root, load, settings):
    write_metadata(root, list(range(COUNT)), {i: given for i, (given, _) in PATIENTS.items()})
    datamodule = load(ISIC2019, root, metadata=True, split="random", **settings)
    assert datamodule.metadata_columns == (
        "age_approx",
        "female",
        "male",
        "anterior torso",
        "head/neck",
        "lateral torso",
        "lower extremity",
        "oral/genital",
        "palms/soles",
        "posterior torso",
        "upper extremity",
    )
    expected = {name(i): numbers for i, (_, numbers) in PATIENTS.items()}
    found = 0
    for part in ("train", "val", "test"):
        for batch in getattr(datamodule, f"{part}_dataloader")():
            assert batch["metadata"].dtype == torch.float32
            for key, numbers in zip(batch["id"], batch["metadata"].tolist(), strict=True):
                assert numbers == expected.get(key, [50, 0, 1, *[0] * 8]), key
                found += key in expected
    assert found >= len(expected)


def test_without_metadata_nothing_is_asked_of_it(root, load):
    write_metadata(root, list(range(COUNT)), {5: ("old", "knee", "x")})
    assert load(ISIC2019, root).metadata_columns == ()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda r: (r / "ISIC_2019_Training_Metadata.csv").unlink(),
            r"^datamodule.metadata=true needs .*Metadata.csv, which is missing; get it from chall",
        ),
        (
            lambda r: change(r / "ISIC_2019_Training_Metadata.csv", "sex", "gender"),
            r"Metadata.csv has no columns sex; get it from",
        ),
        (
            lambda r: write_metadata(r, list(range(COUNT)), {5: ("old", "", "male")}),
            r"has age_approx=old for ISIC_0000005; give a number of years, or leave it empty\.",
        ),
        (
            lambda r: write_metadata(r, list(range(COUNT)), {5: ("nan", "", "male")}),
            r"has age_approx=nan for ISIC_0000005",
        ),
        (
            lambda r: write_metadata(r, list(range(COUNT)), {5: ("50", "knee", "male")}),
            r"has anatom_site_general=knee for ISIC_0000005; give one of anterior torso, head/",
        ),
        (
            lambda r: write_metadata(r, list(range(COUNT)), {5: ("50", "", "Male")}),
            r"has sex=Male for ISIC_0000005; give one of female, male, or leave it empty\.",
        ),
    ],
)
def test_metadata_that_cannot_be_had_is_named(root, load, damage, message):
    damage(root)
    with pytest.raises(UserError, match=message):
        load(ISIC2019, root, metadata=True, split="random")


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda r: (r / "ISIC_2019_Training_GroundTruth.csv").unlink(),
            r"isic2019 has no ISIC_2019_Training_GroundTruth.csv; get it from challenge",
        ),
        (
            lambda r: (r / "ISIC_2019_Training_Input/ISIC_0000005.jpg").unlink(),
            r"has a row of ISIC_0000005, but .*ISIC_0000005.jpg is missing",
        ),
        (
            lambda r: change(r / "ISIC_2019_Training_GroundTruth.csv", "ISIC_0000005", "ISIC_5"),
            r"ISIC_0000005.jpg is without partner: its row in .*GroundTruth.csv is missing",
        ),
        (
            lambda r: change(
                r / "ISIC_2019_Training_GroundTruth.csv", "ISIC_0000005", "ISIC_0000006"
            ),
            r"GroundTruth.csv has two rows of ISIC_0000006; remove one",
        ),
        (
            lambda r: change(
                r / "ISIC_2019_Training_GroundTruth.csv",
                "ISIC_0000005,0.0,1.0",
                "ISIC_0000005,1.0,1.0",
            ),
            r"GroundTruth.csv has MEL and NV for ISIC_0000005; give it one of AK",
        ),
        (
            lambda r: change(
                r / "ISIC_2019_Training_GroundTruth.csv",
                "ISIC_0000005,0.0,1.0",
                "ISIC_0000005,0.0,zero",
            ),
            r"GroundTruth.csv has no class for ISIC_0000005",
        ),
        (
            lambda r: change(r / "ISIC_2019_Training_Metadata.csv", "ISIC_0000005", "ISIC_5"),
            r"Metadata.csv has no row of ISIC_0000005; get it anew",
        ),
        (
            lambda r: change(r / "ISIC_2019_Training_Metadata.csv", "lesion_id", "lesion"),
            r"Metadata.csv has no columns lesion_id; get it from",
        ),
        (
            lambda r: (r / "ISIC_2019_Training_Metadata.csv").unlink(),
            r"lesion_grouped needs the lesion of every image, .*60 of 60.*get ISIC_2019_Tr",
        ),
    ],
)
def test_what_is_wrong_with_the_tables_is_named(root, load, damage, message):
    damage(root)
    with pytest.raises(UserError, match=message):
        load(ISIC2019, root)


@pytest.mark.filterwarnings("ignore:.*least populated class")
def test_the_references_split_needs_no_metadata(root, load):
    (root / "ISIC_2019_Training_Metadata.csv").unlink()
    assert len(load(ISIC2019, root, split="reference").parts) == COUNT
