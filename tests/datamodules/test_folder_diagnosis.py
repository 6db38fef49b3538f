"""Any folder of photographs with a table of diagnoses, or with a folder for each class."""

import csv
import json
import os
import re
import shutil
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datamodules import FolderDiagnosis
from tasks import fit, predict
from tasks import test as test_task

COUNT = 20
NAMES = [f"a{index:02d}" for index in range(COUNT)]
CLASS_OF = {name: ("mel", "nv")[index % 2] for index, name in enumerate(NAMES)}
SEVEN_ONE_TWO = {"train": 14, "val": 2, "test": 4}


def draw(path, shade=0, size=(16, 16)):
    """Write a photograph of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade * 12 % 256, 90, 120)).save(path)
    return path


def draw_all(folder, names=NAMES, suffix=".png"):
    return [draw(folder / f"{name}{suffix}", index) for index, name in enumerate(names)]


def write_table(path, rows, header="image_id,label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]))
    return path


@pytest.fixture
def root(tmp_path):
    """Twenty photographs in a folder, every other a melanoma, and their table."""
    draw_all(tmp_path / "mine")
    write_table(tmp_path / "mine" / "labels.csv", CLASS_OF.items())
    return tmp_path / "mine"


@pytest.fixture
def by_class(tmp_path):
    """The same in a folder for each class."""
    draw_all(tmp_path / "folders", [f"{label}/{name}" for name, label in CLASS_OF.items()])
    return tmp_path / "folders"


@pytest.fixture
def make(tmp_path):
    """Makes a datamodule that has read nothing yet."""
    return lambda root, **settings: FolderDiagnosis(
        root=root, cache=tmp_path / "cache", image_size=16, batch_size=4, **settings
    )


def diagnoses(datamodule):
    """Return the class of each photograph by id."""
    return {s.id: datamodule.classes[s.label] for s in datamodule.find_samples()}


def refused(message):
    return pytest.raises(UserError, match=message)


# Names of photographs in tables.


@pytest.mark.parametrize(
    "written",
    [
        *("{}", "{}.jpg", "{}.JPG", "{}.png", " {} ", "photos/{}", "./photos/{}.jpg", "photos//{}"),
        *(
            "photos/./{}.jpg",
            "/data/photos/{}.jpeg",
            r"photos\{}.jpg",
            r"C:\data\mine\photos\{}.jpg",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".JPG"])
def test_ids_may_have_suffixes_and_paths(tmp_path, make, written, suffix):
    root = tmp_path / "mine"
    files = draw_all(root / "photos", suffix=suffix)
    rows = [(f'"{written.format(name)}"', label) for name, label in CLASS_OF.items()]
    write_table(root / "labels.csv", rows)
    datamodule = make(root)
    samples = datamodule.find_samples()
    assert [sample.image for sample in samples] == files
    assert [datamodule.classes[sample.label] for sample in samples] == list(CLASS_OF.values())
    folder = "photos/" if "photos" in written else ""
    assert [sample.id for sample in samples] == [f"{folder}{name}" for name in NAMES]


def test_ids_keep_upper_and_lower_case(tmp_path, make):
    names = [f"{letter}_{index}" for index in range(5) for letter in "Aa"]
    draw_all(tmp_path / "mine", names)
    classes = {name: "mel" if name < "Z" else "nv" for name in names}
    write_table(tmp_path / "mine" / "labels.csv", classes.items())
    assert diagnoses(make(tmp_path / "mine")) == classes


@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_match_however_composed(tmp_path, make, on_disk, written):
    names = [f"Läsion {index}" for index in range(4)]
    draw_all(tmp_path / "mine", [unicodedata.normalize(on_disk, name) for name in names])
    rows = [
        (unicodedata.normalize(written, name), f"c{index % 2}") for index, name in enumerate(names)
    ]
    write_table(tmp_path / "mine" / "labels.csv", rows)
    assert list(diagnoses(make(tmp_path / "mine"))) == names


def test_dots_in_ids_are_no_suffixes(tmp_path, make):
    names = ["a.1", "a.2", "b.1", "b.jpeg.2"]
    draw_all(tmp_path / "mine", names)
    rows = [(name, name[0]) for name in names]
    write_table(tmp_path / "mine" / "labels.csv", rows)
    assert diagnoses(make(tmp_path / "mine")) == dict(rows)


def test_equal_names_in_subfolders_need_paths(tmp_path, make):
    root = tmp_path / "mine"
    names = ["p1/IMG_1", "p1/IMG_2", "p2/IMG_1", "p2/IMG_3"]
    draw_all(root, names)
    rows = [(f"{name}.jpg", name[:2]) for name in names]
    write_table(root / "labels.csv", rows)
    assert list(diagnoses(make(root))) == names
    write_table(root / "labels.csv", [("IMG_1", "p1"), *rows[1:]])
    with refused(r"IMG_1, .*p1/IMG_1\.png or .*p2/IMG_1\.png"):
        make(root).find_samples()


def test_a_suffix_decides_between_two_files(root, make):
    other = draw(root / "a00.jpg")
    with refused(r"row of a00, .*a00\.jpg or .*a00\.png"):
        make(root).find_samples()
    assert len(make(root).list_files().problems) == 1
    rest = {name: label for name, label in CLASS_OF.items() if name != "a00"}
    write_table(root / "labels.csv", [("a00.JPG", "nv"), *rest.items()])
    samples = make(root, partial=True).find_samples()
    assert [sample.image for sample in samples if sample.id == "a00"] == [other]
    write_table(root / "labels.csv", [("a00.jpg", "nv"), ("a00.png", "mel"), *rest.items()])
    with refused(r"id a00: .*a00\.jpg and .*a00\.png"):
        make(root).find_samples()


def test_the_folder_of_images_comes_first(tmp_path, make):
    root = tmp_path / "mine"
    files = draw_all(root / "images" / "p1")
    draw_all(root / "thumbnails")
    write_table(root / "labels.csv", CLASS_OF.items())
    assert [sample.image for sample in make(root).find_samples()] == files


# Tables that others publish.


def write_client(root):
    """Write what the ISIC archive's client downloads; return the lesions and patients by id."""
    names = [f"ISIC_{index:07d}" for index in range(COUNT)]
    draw_all(root, names, ".jpg")
    header = (
        "isic_id,attribution,copyright_license,age_approx,diagnosis_1,diagnosis_2,diagnosis_3,"
        "diagnosis_4,diagnosis_5,image_type,lesion_id,patient_id,sex"
    )
    rows, groups = [], {}
    for index, name in enumerate(names):
        fine = ("Malignant,M (Melanoma),Melanoma", "Benign,B,Nevus")[index % 2]
        lesion = f"IL_{index % 14}" if index % 7 else ""
        patient = f"IP_{index // 2}" if index > 15 else ""
        groups[name] = {text for text in (lesion, patient) if text}
        rows.append((name, "Anonymous,CC-0,50", fine, ",,dermoscopic", lesion, patient, "male"))
    write_table(root / "metadata.csv", rows, header)
    (root / "attribution.txt").write_text("Anonymous")
    (root / "licenses").mkdir()
    (root / "licenses" / "CC-0.txt").write_text("id,label\n1,2\n")
    return groups


def test_the_isic_archives_download_is_read(tmp_path, make):
    groups = write_client(tmp_path / "isic")
    datamodule = make(tmp_path / "isic")
    found = diagnoses(datamodule)
    assert datamodule.classes == ("Benign", "Malignant")
    assert found == {
        name: ("Malignant", "Benign")[index % 2] for index, name in enumerate(sorted(groups))
    }
    parts = datamodule.find_parts()
    shared = [
        (one, other)
        for one in groups
        for other in groups
        if one < other and groups[one] & groups[other]
    ]
    assert len(shared) > 4
    assert all(parts[one] == parts[other] for one, other in shared)
    fine = make(tmp_path / "isic", label_column="diagnosis_3")
    assert set(diagnoses(fine).values()) == {"Nevus", "Melanoma"}


@pytest.mark.parametrize("folder", ["", "ISIC2018_Task3_Training_GroundTruth"])
def test_isic_2018_is_read_as_published(tmp_path, make, folder):
    root = tmp_path / "isic2018"
    columns = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    classes = {f"ISIC_{24306 + index:07d}": columns[index % 7] for index in range(21)}
    draw_all(root / "ISIC2018_Task3_Training_Input", classes, ".jpg")
    rows = [
        (name, *("1.0" if column == label else "0.0" for column in columns))
        for name, label in classes.items()
    ]
    table = f"{folder}/ISIC2018_Task3_Training_GroundTruth.csv".removeprefix("/")
    write_table(root / table, rows, ",".join(["image", *columns]))
    datamodule = make(root)
    assert diagnoses(datamodule) == classes
    assert datamodule.classes == tuple(sorted(columns))
    with refused(r"ISIC2018_Task3_Training_Input, .*datamodule\.table=<file>"):
        make(root, table=False).find_samples()


@pytest.mark.parametrize("lesions", ["", "lesion_id,"])
def test_isic_2020_is_read_as_published(tmp_path, make, lesions):
    root = tmp_path / "isic2020"
    names = [f"ISIC_{index:07d}" for index in range(40)]
    draw_all(root / "train", names, ".jpg")
    header = f"image_name,patient_id,{lesions}sex,age_approx,anatom_site_general_challenge,"
    rows = []
    for index, name in enumerate(names):
        lesion = ["IL_1" if index in (0, 9) else ""] if lesions else []
        truth = "unknown,benign,0" if index % 8 else "melanoma,malignant,1"
        rows.append((name, f"IP_{index // 2}", *lesion, "male,45.0,torso", truth))
    table = "ISIC_2020_Training_GroundTruth_v2.csv"
    write_table(root / table, rows, f"{header}diagnosis,benign_malignant,target")
    datamodule = make(root)
    parts = datamodule.find_parts()
    assert datamodule.classes == ("benign", "malignant")
    assert Counter(diagnoses(datamodule).values()) == {"benign": 35, "malignant": 5}
    patients = [{parts[name] for name in names[index : index + 2]} for index in range(0, 40, 2)]
    assert all(len(found) == 1 for found in patients)
    assert not lesions or parts[names[0]] == parts[names[9]] == parts[names[8]]


# Folders of classes.


def test_folders_are_classes(by_class, make):
    datamodule = make(by_class)
    expected = {f"{label}/{name}": label for name, label in CLASS_OF.items()}
    assert diagnoses(datamodule) == expected
    assert Counter(datamodule.find_parts().values()) == SEVEN_ONE_TWO


def test_folders_of_classes_may_have_subfolders(tmp_path, make):
    names = [f"{label}/p{index}/IMG" for index in range(10) for label in ("mel", "nv")]
    draw_all(tmp_path / "mine" / "images", names)
    found = diagnoses(make(tmp_path / "mine"))
    assert found == {name: name.partition("/")[0] for name in names}


def draw_parts(root, folders, each=4):
    """Write photographs of two classes into folders of parts."""
    names = [
        f"{folder}/{('mel', 'nv')[index % 2]}/{number}_{index}"
        for number, folder in enumerate(folders)
        for index in range(each)
    ]
    draw_all(root, names)
    return names


PART_NAMES = [
    ("train", "val", "test"),
    ("train", "valid", "test"),
    ("Training", "validation", "Testing"),
    ("TRAIN", "dev", "TEST"),
    ("training", "Val", "testing"),
]


@pytest.mark.parametrize("folders", PART_NAMES)
@pytest.mark.parametrize("inside", ["", "images"])
def test_folders_of_parts_divide(tmp_path, make, folders, inside):
    names = draw_parts(tmp_path / "mine" / inside, folders)
    datamodule = make(tmp_path / "mine")
    parts = datamodule.find_parts()
    known = dict(zip(folders, ("train", "val", "test"), strict=True))
    assert parts == {name: known[name.partition("/")[0]] for name in sorted(names)}
    assert datamodule.classes == ("mel", "nv")


@pytest.mark.parametrize("folders", PART_NAMES)
def test_folders_of_parts_divide_with_a_table(tmp_path, make, folders):
    root = tmp_path / "mine"
    names = [f"{folder}/{index}" for folder in folders for index in range(2)]
    draw_all(root, names)
    write_table(root / "labels.csv", [(name, f"c{name[-1]}") for name in names])
    known = dict(zip(folders, ("train", "val", "test"), strict=True))
    parts = make(root).find_parts()
    assert parts == {name: known[name.partition("/")[0]] for name in sorted(names)}


def test_without_validation_some_of_training_becomes_it(tmp_path, make):
    draw_parts(tmp_path / "mine", ["train", "test"], each=16)
    parts = make(tmp_path / "mine").find_parts()
    assert Counter(parts.values()) == {"train": 14, "val": 2, "test": 16}
    assert all(part == "test" for name, part in parts.items() if name.startswith("test/"))


def test_two_folders_of_one_part_are_refused(tmp_path, make):
    draw_parts(tmp_path / "mine", ["train", "val", "valid", "test"])
    with refused(r"val/ and valid/ .*mine"):
        make(tmp_path / "mine").find_samples()


@pytest.mark.parametrize("name", ["loose", "nv/loose", "holdout/nv/loose"])
def test_photographs_beside_folders_of_parts_are_refused(tmp_path, make, name):
    draw_parts(tmp_path / "mine", ["train", "val", "test"])
    draw(tmp_path / "mine" / f"{name}.png")
    with refused(rf"{name}\.png .*train, training, val, valid, validation, dev, test, testing"):
        make(tmp_path / "mine").find_samples()


@pytest.mark.parametrize("split", ["auto", "official"])
@pytest.mark.parametrize("loose", [["loose"], ["holdout/1", "holdout/2"]])
def test_photographs_of_a_table_beside_parts_are_refused(tmp_path, make, loose, split):
    root = tmp_path / "mine"
    names = [f"{part}/{index}" for part in ("train", "val", "test") for index in range(10)]
    draw_all(root, [*names, *loose])
    write_table(root / "labels.csv", [(name, f"c{ord(name[-1]) % 2}") for name in [*names, *loose]])
    with refused(rf"{loose[0]}\.png .* {len(loose) - 1} more; .*validation.*datamodule\.split="):
        make(root, split=split).find_parts()
    assert len(make(root, split="lesion_grouped").find_parts()) == 30 + len(loose)


def test_an_image_without_class_is_named(by_class, make):
    draw(by_class / "loose.png")
    with refused(r"loose\.png .*datamodule\.table"):
        make(by_class).find_samples()


def test_a_folder_without_classes_is_refused(tmp_path, make):
    draw_all(tmp_path / "mine")
    with refused(rf"mine has {COUNT} images.*datamodule\.table=<file>"):
        make(tmp_path / "mine").find_samples()


def test_images_of_one_id_are_refused(by_class, make):
    draw(by_class / "mel" / "a00.jpg")
    with refused(r"id mel/a00: .*mel/a00\.jpg and .*mel/a00\.png"):
        make(by_class).find_samples()


@pytest.mark.parametrize(
    ("classes", "order"),
    [
        (["nv", "bcc", "mel"], ("bcc", "mel", "nv")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["2.0", "1.0", "0"], ("0", "1", "2")),
        (["b", "B 2", "10"], ("10", "B 2", "b")),
        (["NA", "nv"], ("NA", "nv")),
        (["carcinome  basocellulaire", "nævus"], ("carcinome basocellulaire", "nævus")),
    ],
)
def test_labels_follow_the_alphabet_or_numbers(tmp_path, make, classes, order):
    draw_all(tmp_path / "mine", [f"{name}/{index}" for name in classes for index in range(2)])
    datamodule = make(tmp_path / "mine")
    counts = Counter(sample.label for sample in datamodule.find_samples())
    assert datamodule.classes == order
    assert counts == dict.fromkeys(range(len(order)), 2)


# Which table is read.


@pytest.mark.parametrize(
    "name", ["labels.csv", "Metadata.CSV", "metadata.csv", "anything.csv", "of mine.tsv"]
)
def test_the_only_table_is_read(root, make, name):
    (root / "labels.csv").rename(root / name)
    for other in (".hidden.csv", "README.txt", "licence.md"):
        (root / other).write_text("id,label\na00,x\n")
    assert diagnoses(make(root)) == CLASS_OF


def test_a_text_with_ids_may_be_the_table(root, make):
    (root / "labels.csv").rename(root / "list.txt")
    (root / "notes.txt").write_text("Image\nby all of you\n")
    assert diagnoses(make(root)) == CLASS_OF


@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv"])
def test_tables_of_usual_names_come_first(root, make, name):
    (root / "labels.csv").rename(root / name)
    write_table(root / "other.csv", [("a00", "x")])
    assert diagnoses(make(root)) == CLASS_OF


@pytest.mark.parametrize("names", [("labels.csv", "metadata.csv"), ("one.csv", "two.tsv")])
def test_two_tables_are_a_choice(root, make, names):
    (root / "labels.csv").rename(root / names[0])
    write_table(root / names[1], [(name, "x" if name < "a05" else "y") for name in NAMES])
    with refused(rf"{names[0]}, {names[1]}; .*datamodule\.table=<file>"):
        make(root).find_samples()
    assert set(diagnoses(make(root, table=names[1])).values()) == {"x", "y"}
    assert diagnoses(make(root, table=root / names[0])) == CLASS_OF


def test_a_missing_table_is_named(root, make):
    with refused(r"datamodule\.table=gone\.csv .*mine"):
        make(root, table="gone.csv").find_samples()


def test_folders_are_classes_beside_an_unused_table(by_class, make):
    write_table(by_class / "labels.csv", [(name, "x") for name in NAMES])
    with refused("only the class x"):
        make(by_class).find_samples()
    assert set(diagnoses(make(by_class, table=False)).values()) == {"mel", "nv"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_spreadsheets_are_read(root, make, encoding, separator):
    text = (root / "labels.csv").read_text().replace(",", separator).replace("nv", '"nævus; 1"')
    (root / "labels.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    found = diagnoses(make(root))
    assert found == {name: label.replace("nv", "nævus; 1") for name, label in CLASS_OF.items()}


def test_unknown_columns_show_those_found(root, make):
    rows = [(name, label, 7) for name, label in CLASS_OF.items()]
    write_table(root / "labels.csv", rows, "Foto,Befund,Fall")
    with refused(r"datamodule\.id_column=<column>.* Foto, Befund, Fall\."):
        make(root).find_samples()
    with refused(r"datamodule\.label_column=<column>.* Foto, Befund, Fall\."):
        make(root, id_column="Foto").find_samples()
    with refused(r"datamodule\.group_column=Läsion .* Foto, Befund, Fall\."):
        make(root, id_column="Foto", label_column="Befund", group_column="Läsion").find_samples()
    assert diagnoses(make(root, id_column="Foto", label_column="befund")) == CLASS_OF


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("table", value) for value in (True, "")),
        *(("skip_other_classes", value) for value in ("yes", 2)),
        *((key, value) for key in ("skip_unlabelled", "partial") for value in (None, "yes", 2)),
        *(("classes", value) for value in ("nv,mel", 3)),
        ("split", "reference"),
    ],
)
def test_settings_outside_their_range_are_refused(root, make, key, value):
    with refused(rf"datamodule\.{key}={value}"):
        make(root, **{key: value})


@pytest.mark.parametrize("folder", ["gone", "empty"])
def test_a_folder_without_photographs_is_refused(tmp_path, make, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none yet")
    with refused(rf"{folder} .*datamodule\.root .*datamodule\.table=<file>"):
        make(tmp_path / folder).find_samples()


# Rows and photographs that do not fit.


def test_rows_of_no_photograph_are_named(root, make):
    (root / "a03.png").unlink()
    with refused(r"labels\.csv .* a03, .*datamodule\.partial=true"):
        make(root).find_samples()
    found = diagnoses(make(root, partial=True))
    assert found == {name: label for name, label in CLASS_OF.items() if name != "a03"}


def test_photographs_of_no_row_are_named(root, make):
    draw(root / "b00.png")
    draw(root / "b01.png")
    with refused(r"2 times .*labels\.csv .*b00\.png; .*datamodule\.partial=true.* 2 problems"):
        make(root).find_samples()
    assert diagnoses(make(root, partial=True)) == CLASS_OF


@pytest.mark.parametrize("partial", [False, True])
def test_a_table_of_other_photographs_is_refused(root, make, partial):
    write_table(root / "labels.csv", [(f"x{index}", index % 2) for index in range(9)])
    with refused(r"x0 and 8 more, .* 20 images .*a00\.png; .*datamodule\.id_column"):
        make(root, partial=partial).find_samples()


@pytest.mark.parametrize("second", ["a00", "a00.png", "./a00.png", "data/a00"])
@pytest.mark.parametrize("label", ["mel", "nv"])
def test_two_rows_of_one_photograph_are_refused(root, make, second, label):
    write_table(root / "labels.csv", [*CLASS_OF.items(), (second, label)])
    with refused(rf"two rows of .*a00\.png, a00 and {second};"):
        make(root, partial=True).find_samples()


def test_rows_without_class_are_named(root, make):
    classes = {**CLASS_OF, "a04": "", "a05": "NaN"}
    write_table(root / "labels.csv", classes.items())
    with refused(r"2 times .*a04; .*datamodule\.skip_unlabelled=true.*datamodule\.rest_class"):
        make(root).find_samples()
    found = diagnoses(make(root, skip_unlabelled=True))
    assert found == {k: label for k, label in CLASS_OF.items() if k not in ("a04", "a05")}


def test_rows_of_zeros_may_be_a_class(root, make):
    bits = {"mel": "1,0", "nv": "0,1", "rest": "0,0"}
    classes = {name: ("mel", "nv", "rest")[index % 3] for index, name in enumerate(NAMES)}
    write_table(root / "labels.csv", [(n, bits[c]) for n, c in classes.items()], "image,mel,nv")
    with refused("6 times .*a02; .*rest_class"):
        make(root).find_samples()
    assert diagnoses(make(root, rest_class="rest")) == classes
    assert len(diagnoses(make(root, skip_unlabelled=True))) == 14


def test_a_row_of_two_classes_is_named(root, make):
    rows = [(name, int(name != "a02"), int(name < "a04")) for name in NAMES]
    write_table(root / "labels.csv", rows, "image,mel,nv")
    with refused(r"Row 2 .*labels\.csv has mel=1 and nv=1, .*datamodule\.label_column"):
        make(root).find_samples()


# Classes.


def test_given_classes_are_those_learnt(root, make):
    classes = {name: ("mel", "nv", "bcc", "df")[index % 4] for index, name in enumerate(NAMES)}
    write_table(root / "labels.csv", classes.items())
    datamodule = make(root, classes=["NV", "mel"])
    assert datamodule.classes == datamodule.find_classes() == ("NV", "mel")
    assert diagnoses(datamodule) == {
        name: label.replace("nv", "NV") for name, label in classes.items() if label in ("nv", "mel")
    }
    assert {sample.label for sample in datamodule.find_samples() if sample.id == "a01"} == {0}


def test_other_classes_are_refused_where_asked(root, make):
    write_table(root / "labels.csv", {**CLASS_OF, "a07": "bcc"}.items())
    with refused(r"bcc for a07, .* nv, mel; .*datamodule\.skip_other_classes=true"):
        make(root, classes=["nv", "mel"], skip_other_classes=False).find_samples()
    for skip in (None, True):
        found = diagnoses(make(root, classes=["nv", "mel"], skip_other_classes=skip))
        assert found.keys() == CLASS_OF.keys() - {"a07"}


def test_given_classes_that_nothing_has_are_refused(root, make):
    with refused(r"none of the classes x, y, but mel, nv; .*datamodule\.classes=\["):
        make(root, classes=["x", "y"]).find_classes()
    with refused(r"datamodule\.classes has x, .*mine; .* mel, nv\."):
        make(root, classes=["nv", "x"]).find_classes()


def test_a_class_without_training_images_is_refused(root, make):
    rows = [(name, label, "train" if name < "a10" else "test") for name, label in CLASS_OF.items()]
    rows += [(name, "bcc", "val") for name in ("b0", "b1", "b2")]
    draw_all(root, ["b0", "b1", "b2"])
    write_table(root / "labels.csv", rows, "id,label,split")
    with refused(r"bcc has 3 image.*mine, .*datamodule\.split.*datamodule\.classes=\["):
        make(root).find_classes()
    rows[-1] = ("b2", "bcc", "train")
    write_table(root / "labels.csv", rows, "id,label,split")
    assert make(root).find_classes() == ("bcc", "mel", "nv")


@pytest.mark.parametrize(
    "name",
    [
        *("label", "id", "confidence", "predicted", "error", "height"),
        *("=1+1", "@home", "+nv", "-nv", "${oc.env:HOME}", "a\x07b", "\x1b[31mred"),
    ],
)
def test_classes_that_cannot_be_columns_are_refused(root, make, name):
    write_table(root / "labels.csv", {**CLASS_OF, "a00": name}.items())
    with refused(re.escape(f"labels.csv has a class {name!a}")):
        make(root).find_samples()
    with refused(re.escape(f"datamodule.classes has a class {name!a}")):
        make(root, classes=["nv", name])


@pytest.mark.parametrize("name", ["-1", "+1", "c=d", "nv, mole", "a/b", "Label", "nævus (blå)"])
def test_classes_of_other_signs_are_learnt(root, make, name):
    rows = [(stem, f'"{name}"' if label == "nv" else "mel") for stem, label in CLASS_OF.items()]
    write_table(root / "labels.csv", rows)
    known = "1" if name == "+1" else name
    assert make(root).find_classes() == tuple(sorted(["mel", known]))


def test_classes_that_differ_in_case_alone_are_refused(root, make):
    write_table(root / "labels.csv", {**CLASS_OF, "a00": "NV"}.items())
    with refused(r"labels\.csv .*NV and nv"):
        make(root).find_samples()
    with refused(r"datamodule\.classes .*nv and NV"):
        make(root, classes=["nv", "NV", "mel"])


def test_one_class_is_too_few(root, make):
    write_table(root / "labels.csv", [(name, "nv") for name in NAMES])
    with refused(r"only the class nv, .*datamodule\.label_column"):
        make(root).find_samples()
    with refused(r"datamodule\.classes has only the class nv"):
        make(root, classes=["nv"])


def test_a_class_for_each_image_is_refused(root, make):
    write_table(root / "labels.csv", [(name, f"born {name}") for name in NAMES])
    with refused(r"20 classes, .* born a00; .*datamodule\.label_column"):
        make(root).find_samples()


# Splits.


def write_split(path, parts):
    write_table(path, parts.items(), "id,split")


def test_a_split_beside_the_photographs_comes_first(root, make):
    parts = {n: ("train", "train", "test", "val")[index % 4] for index, n in enumerate(NAMES)}
    write_split(root / "splits.csv", parts)
    # Numbers of folds are no parts, and nobody asks for them.
    rows = [(name, label, index % 5) for index, (name, label) in enumerate(CLASS_OF.items())]
    write_table(root / "labels.csv", rows, "id,label,split")
    datamodule = make(root)
    assert datamodule.find_parts() == datamodule.find_parts() == parts
    (root / "splits.csv").rename(root.parent / "of_mine.csv")
    assert make(root, split_file=root.parent / "of_mine.csv").find_parts() == parts
    with refused(r"20 times .*'0' for a00; .*datamodule\.split"):
        make(root).find_parts()


def test_a_split_beside_folders_of_classes_comes_first(by_class, make):
    keys = sorted(f"{label}/{name}" for name, label in CLASS_OF.items())
    parts = {key: ("train", "val", "test")[index % 3] for index, key in enumerate(keys)}
    write_split(by_class / "splits.csv", parts)
    assert make(by_class).find_parts() == parts
    assert make(by_class, split="random").find_parts() != parts


def test_one_table_may_hold_classes_and_parts(root, make):
    names = ("training", "validation", "testing")
    rows = [(name, label, names[index % 3]) for index, (name, label) in enumerate(CLASS_OF.items())]
    (root / "labels.csv").unlink()
    write_table(root / "splits.csv", rows, "id,label,split")
    parts = make(root, table="splits.csv").find_parts()
    assert parts == {name: ("train", "val", "test")[index % 3] for index, name in enumerate(NAMES)}


@pytest.mark.parametrize("names", PART_NAMES)
@pytest.mark.parametrize("split", ["auto", "official"])
def test_a_column_divides(root, make, names, split):
    rows = [(name, label, names[index % 3]) for index, (name, label) in enumerate(CLASS_OF.items())]
    write_table(root / "labels.csv", rows, "id,label,Partition")
    expected = {name: ("train", "val", "test")[index % 3] for index, name in enumerate(NAMES)}
    assert make(root, split=split).find_parts() == expected
    assert make(root, split="lesion_grouped").find_parts() != expected


@pytest.mark.parametrize("part", ["holdout", ""])
def test_an_unknown_part_is_named(root, make, part):
    rows = [(name, label, "train") for name, label in CLASS_OF.items()]
    write_table(root / "labels.csv", [*rows[:-1], (*rows[-1][:2], part)], "id,label,split")
    with refused(rf"'{part}' for a19; .*train, .*dev, test, .*datamodule\.split"):
        make(root).find_parts()
    assert Counter(make(root, split="random").find_parts().values()) == SEVEN_ONE_TWO


def test_parts_are_drawn_from_their_own_seed(root, make):
    parts = make(root).find_parts()
    assert Counter(parts.values()) == SEVEN_ONE_TWO
    assert make(root, seed=5).find_parts() == parts
    assert make(root, split="lesion_grouped").find_parts() == parts
    assert make(root, split_seed=5).find_parts() != parts
    write_table(root / "labels.csv", reversed(CLASS_OF.items()))
    assert make(root).find_parts() == parts


def test_classes_are_in_every_part_in_proportion(tmp_path, make):
    classes = {f"i{index:03d}": "mel" if index < 20 else "nv" for index in range(120)}
    draw_all(tmp_path / "mine", classes)
    write_table(tmp_path / "mine" / "labels.csv", classes.items())
    for seed in range(3):
        parts = make(tmp_path / "mine", split_seed=seed).find_parts()
        counts = Counter((classes[name], part) for name, part in parts.items())
        shares = {"train": 0.7, "val": 0.1, "test": 0.2}
        expected = {("mel", part): round(20 * share) for part, share in shares.items()}
        expected |= {("nv", part): round(100 * share) for part, share in shares.items()}
        assert counts == expected


def test_a_rare_class_is_trained_first(root, make):
    write_table(root / "labels.csv", {**CLASS_OF, "a00": "bcc", "a02": "df", "a04": "df"}.items())
    for seed in range(5):
        parts = make(root, split_seed=seed).find_parts()
        assert parts["a00"] == "train"
        assert {parts["a02"], parts["a04"]} == {"train", "val"}


@pytest.mark.parametrize("header", ["image,lesion_id,dx", "image,patient_id,dx", "image,group,dx"])
def test_groups_are_in_one_part(tmp_path, make, header):
    root = tmp_path / "mine"
    names = [f"i{index:02d}" for index in range(60)]
    group_of = {name: f"G{index * 7 % 20}" for index, name in enumerate(names)}
    draw_all(root, names)
    rows = [(name, group_of[name], ("mel", "nv")[int(group_of[name][1:]) % 2]) for name in names]
    write_table(root / "labels.csv", rows, header)
    for seed in range(3):
        parts = make(root, split_seed=seed).find_parts()
        found = {(group_of[name], part) for name, part in parts.items()}
        assert len(found) == 20
        assert Counter(part for _, part in found) == SEVEN_ONE_TWO


def test_lesions_of_one_patient_are_in_one_part(tmp_path, make):
    root = tmp_path / "mine"
    names = [f"i{index:02d}" for index in range(80)]
    draw_all(root, names)
    # Every patient has two lesions of two images each; the last column is not given a usual name.
    rows = [(n, i // 2, f"P{i // 4}", ("nv", "mel")[i // 4 % 2]) for i, n in enumerate(names)]
    write_table(root / "labels.csv", rows, "id,lesion_id,Fall,dx")
    by_lesion = make(root).find_parts()
    by_patient = make(root, patient_column="fall").find_parts()
    for parts, size, alike in ((by_lesion, 2, True), (by_patient, 4, True), (by_lesion, 4, False)):
        together = [len({parts[n] for n in names[i : i + size]}) == 1 for i in range(0, 80, size)]
        assert all(together) == alike


def test_a_patient_counts_for_the_rarest_class(tmp_path, make):
    root = tmp_path / "mine"
    names = [f"p{patient:02d}_{index}" for patient in range(20) for index in range(5)]
    draw_all(root, names)
    rare = [name for name in names if name < "p10" and name[-1] == "4"]
    rows = [(name, name[:3], "malignant" if name in rare else "benign") for name in names]
    write_table(root / "labels.csv", rows, "id,patient,label")
    for seed in range(3):
        parts = make(root, split_seed=seed).find_parts()
        assert Counter(parts[name] for name in rare) == {"train": 7, "val": 1, "test": 2}


@pytest.mark.parametrize("group", ["lesion_id", "patient_id"])
def test_parts_with_a_group_in_two_are_refused(root, make, group):
    rows = [
        (name, label, ("train", "val", "test")[index % 3], index // 2)
        for index, (name, label) in enumerate(CLASS_OF.items())
    ]
    write_table(root / "labels.csv", rows, f"id,label,split,{group}")
    with refused(r"10 lesion.* a00 in train and a01 in val, .*datamodule\.allow_leak=true"):
        make(root).find_parts()
    parts = make(root, allow_leak=True).find_parts()
    assert parts == {name: part for name, _, part, _ in rows}


def test_every_image_is_tested_in_one_fold(tmp_path, make):
    root = tmp_path / "mine"
    names = [f"i{index:02d}" for index in range(40)]
    draw_all(root, names)
    rows = [(n, ("mel", "nv")[i // 2 % 2], i // 2, "0") for i, n in enumerate(names)]
    write_table(root / "labels.csv", rows, "id,label,lesion_id,split")
    folds = [make(root, folds=4, fold=fold).find_parts() for fold in range(4)]
    tested = Counter(name for parts in folds for name, part in parts.items() if part == "test")
    assert tested == dict.fromkeys(names, 1)
    for parts in folds:
        assert all(parts[names[i]] == parts[names[i + 1]] for i in range(0, 40, 2))


def test_an_official_split_needs_parts(root, make):
    with refused(r"datamodule\.split=official .*train"):
        make(root, split="official").find_parts()


def test_all_images_are_tested_on_demand(root, make):
    assert set(make(root, split="all").find_parts().values()) == {"test"}


def test_too_few_images_are_refused(tmp_path, make):
    draw_all(tmp_path / "mine", ["mel/1", "nv/2", "nv/3"])
    with refused(r"3 images in 3 group.* 7/1/2: "):
        make(tmp_path / "mine").find_parts()


# Files that are no photographs.


@pytest.mark.parametrize(
    "mask",
    [
        *("a00_mask", "a00-mask", "a00_Segmentation", "a00_seg"),
        *("a00_seg0", "a00_lesion", "a00_gt"),
        *("masks/a00", "Masks/a00_mask", "mask/a00_SEG", "masks/p1/a00"),
        *("a00_superpixels", "deep/a05_superpixels"),
    ],
)
def test_masks_beside_photographs_are_passed_over(root, by_class, make, mask):
    draw(root / f"{mask}.png")
    assert diagnoses(make(root)) == CLASS_OF
    folder = by_class if "/" in mask else by_class / "mel"
    draw(folder / f"{mask}.png")
    expected = {f"{label}/{name}": label for name, label in CLASS_OF.items()}
    assert diagnoses(make(by_class)) == expected


def test_masks_of_a_folder_leave_ids_alone(tmp_path, make):
    root = tmp_path / "mine"
    files = draw_all(root / "photos", suffix=".jpg")
    draw_all(root / "masks")
    write_table(root / "labels.csv", CLASS_OF.items())
    assert [sample.image for sample in make(root).find_samples()] == files


@pytest.mark.parametrize("name", ["a00_lesion", "a00_mask.png", "b00_seg", "masks/a00.png"])
def test_a_row_makes_a_mask_a_photograph(root, make, name):
    file = draw(root / f"{name.removesuffix('.png')}.png")
    draw(root / "a01_mask.png")
    write_table(root / "labels.csv", [*CLASS_OF.items(), (name, "nv")])
    found = {sample.image: sample.id for sample in make(root).find_samples()}
    assert len(found) == COUNT + 1
    assert found[file] == name.removesuffix(".png")


def test_a_photograph_called_like_a_mask_stays(by_class, make):
    draw(by_class / "nv" / "b00_lesion.png")
    found = diagnoses(make(by_class))
    assert found["nv/b00_lesion"] == "nv"
    assert len(found) == COUNT + 1


@pytest.mark.parametrize(
    "hidden",
    [
        *(".cache/x", "@eaDir/a00.png/x", "$RECYCLE.BIN/x", "__MACOSX/mel/x", "._a00"),
        *("mel/.thumbs/x", "mel/@eaDir/x", "mel/._x", "test/@eaDir/x"),
    ],
)
def test_hidden_folders_are_passed_over(root, by_class, make, hidden):
    draw(root / f"{hidden}.png")
    draw(by_class / f"{hidden}.png")
    assert diagnoses(make(root)) == CLASS_OF
    expected = {f"{label}/{name}": label for name, label in CLASS_OF.items()}
    assert diagnoses(make(by_class)) == expected


def test_other_files_are_passed_over(by_class, make):
    for name in ("Thumbs.db", "notes.pdf", "a00.json", "mel/desktop.ini", "empty/nothing.txt"):
        (by_class / name).parent.mkdir(exist_ok=True)
        (by_class / name).write_text("")
    assert make(by_class).find_classes() == ("mel", "nv")


@pytest.mark.parametrize("kind", ["bytes", "bell", "pipe", "link", "folder"])
def test_unusable_files_are_named(by_class, make, kind):
    folder = by_class / "mel"
    names = {"bytes": os.fsdecode(b"x\xff.png"), "bell": "x\x07.png", "folder": "x\x1b"}
    path = folder / names.get(kind, "x.png")
    shown = ascii(path.name).strip("'")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(folder / "gone.png")
    elif kind == "folder":
        draw(path / "y.png")
    else:
        path.write_bytes((folder / "a00.png").read_bytes())
    with refused(re.escape(shown)):
        make(by_class).find_samples()


def test_a_folder_that_cannot_be_read_is_named(by_class, make, monkeypatch):
    scandir = os.scandir

    def locked(path):
        if os.fspath(path).endswith("/nv"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with refused(r"folders/nv cannot be read \(Permission denied\)"):
        make(by_class).find_samples()


def test_links_to_folders_are_followed_once(root, by_class, make):
    (root / "round").symlink_to(root, target_is_directory=True)
    (root / "more").symlink_to(by_class / "mel", target_is_directory=True)
    for path in (by_class / "mel").iterdir():
        path.rename(path.with_name(f"b{path.name}"))
    found = diagnoses(make(root, partial=True))
    assert found == CLASS_OF
    with refused("10 times .*more/ba00"):
        make(root).find_samples()


# From photographs to batches.


def test_batches_have_the_contract(root, load):
    draw(root / "a00.png", size=(24, 18))
    datamodule = load(FolderDiagnosis, root, normalization="imagenet")
    assert Counter(datamodule.parts.values()) == SEVEN_ONE_TWO
    seen = {}
    for loader in (
        datamodule.train_dataloader(),
        datamodule.val_dataloader(),
        datamodule.test_dataloader(),
    ):
        for batch in loader:
            count = len(batch["id"])
            assert batch.keys() == {"image", "label", "id", "size"}
            assert (batch["image"].dtype, batch["image"].shape) == (
                torch.float32,
                (count, 3, 16, 16),
            )
            assert (batch["label"].dtype, batch["label"].shape) == (torch.int64, (count,))
            assert (batch["size"].dtype, batch["size"].shape) == (torch.int64, (count, 2))
            for row, key in enumerate(batch["id"]):
                seen[key] = datamodule.classes[batch["label"][row]]
                assert batch["size"][row].tolist() == ([18, 24] if key == "a00" else [16, 16])
                mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
                shade = NAMES.index(key) * 12 if key != "a00" else 0
                colour = (np.array([shade, 90, 120]) / 255 - mean) / deviation
                middle = batch["image"][row, :, 8, 8].numpy()
                np.testing.assert_allclose(middle, colour, atol=0.02)
    assert seen == CLASS_OF


def test_views_are_four_turns(by_class, load):
    datamodule = load(FolderDiagnosis, by_class, views=True)
    batch = next(iter(datamodule.test_dataloader()))
    assert batch["views"].shape == (4, 4, 3, 16, 16)
    assert torch.equal(batch["views"][:, 0], batch["image"])
    assert torch.equal(batch["views"][:, 2], torch.rot90(batch["image"], 2, (2, 3)))


def test_classes_weigh_as_they_are_rare(tmp_path, load):
    names = [
        f"{part}/{label}/{index}"
        for part, counts in (("train", (2, 5, 1)), ("val", (1, 1, 1)), ("test", (3, 1, 1)))
        for label, count in zip(("10", "9", "nv"), counts, strict=True)
        for index in range(count)
    ]
    draw_all(tmp_path / "mine", names)
    datamodule = load(FolderDiagnosis, tmp_path / "mine")
    assert datamodule.classes == ("10", "9", "nv")
    assert datamodule.class_weights == [4.0, 1.6, 8.0]
    assert datamodule.datasets["test"].labels.tolist() == [0, 0, 0, 1, 2]
    only = load(FolderDiagnosis, tmp_path / "mine", classes=["nv", "9"])
    assert only.class_weights == [6.0, 1.2]


# From training to predictions.

QUICK = (
    *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "logger=csv"),
    *("datamodule.num_workers=0", "datamodule.image_size=32", "datamodule.batch_size=8"),
)


def read_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paint(path, index, malignant):
    """Write a noisy photograph whose colour tells its class."""
    rng = np.random.default_rng(index)
    colour = np.array([60, 90, 200] if malignant else [200, 120, 60])
    pixels = (colour + rng.normal(0, 12, (32, 32, 3))).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Forty photographs of twenty patients with a table of a clinic's own."""
    root = tmp_path_factory.mktemp("data") / "clinic"
    rows = ["Foto;Befund;Fall"]
    for index in range(40):
        malignant = index // 2 % 2
        paint(root / "images" / f"f{index:02d}.png", index, malignant)
        label = "malignant" if malignant else "nævus, benign"
        rows.append(f"f{index:02d}.PNG;{label};{index // 2}")
    (root / "Befunde.csv").write_bytes("\r\n".join(rows).encode("utf-16"))
    return root


@pytest.fixture
def one_thread():
    """One thread for PyTorch: several take longer for networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_folder(one_thread, clinic, make_config, tmp_path):
    """The folder of a classifier that was trained on the clinic's photographs for an epoch."""
    folder = tmp_path / "runs" / "clinic" / "now"
    columns = ("id_column=Foto", "label_column=Befund", "patient_column=Fall")
    config = make_config(
        *("experiment=classifier_raw_ham10000", "datamodule=folder_diagnosis", *QUICK),
        *(f"datamodule.root={clinic}", *(f"datamodule.{column}" for column in columns)),
        *("network.weights=null", "+network.kwargs.options.width_mult=0.25", "augmentation=none"),
        *("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"),
        f"hydra.runtime.output_dir={folder}",
    )
    fit.run(config)
    return folder


def test_a_run_trains_tests_and_predicts(run_folder, clinic, make_config, tmp_path):
    classes = ["malignant", "nævus, benign"]
    results = json.loads((run_folder / "results.json").read_text())
    counts = [results["data"][f"n_{part}"] for part in ("train", "val", "test")]
    assert (results["status"], counts) == ("finished", [28, 4, 8])
    assert "test/malignant_sensitivity" in results["test"]
    parts = {row["id"]: row["split"] for row in read_rows(run_folder / "splits.csv")}
    assert all(parts[f"f{i:02d}"] == parts[f"f{i + 1:02d}"] for i in range(0, 40, 2))
    table = read_rows(run_folder / "predictions.csv")
    assert {row["id"] for row in table} == {key for key, part in parts.items() if part == "test"}
    assert list(table[0])[-2:] == classes
    for row in table:
        malignant = int(row["id"][1:]) // 2 % 2
        assert row["label"] == classes[1 - malignant]
        assert sum(float(row[name]) for name in classes) == pytest.approx(1, abs=1e-5)
    checkpoint = run_folder / "checkpoints" / "best.ckpt"
    kept = torch.load(checkpoint, weights_only=True)["config"]
    assert kept["lightning_module"]["classes"] == kept["datamodule"]["classes"] == classes
    assert kept["network"]["kwargs"]["num_classes"] == 2

    # Another folder has a folder for each class, and only one that is known.
    other = tmp_path / "other"
    for index in range(6):
        paint(other / "images" / "nævus, benign" / f"n{index}.png", 100 + index, malignant=False)
    chosen = (f"checkpoint={checkpoint}", f"datamodule.root={other}", "datamodule.split=all")
    config = make_config("task=test", *chosen, "trainer.accelerator=cpu", "logger=csv")
    test_task.run(config)
    tested = read_rows(tmp_path / "run" / "predictions.csv")
    assert [row["label"] for row in tested] == ["nævus, benign"] * 6
    accuracy = json.loads((tmp_path / "run" / "results.json").read_text())["test"]["test/accuracy"]
    assert accuracy == np.mean([int(row["correct"]) for row in tested])

    draw(other / "images" / "naevus" / "n9.png")
    with refused(r"naevus for naevus/n9, .* malignant, nævus, benign; "):
        test_task.run(config)

    photos = shutil.copytree(clinic / "images", tmp_path / "photos")
    predict.run(
        make_config(
            *("task=predict", f"checkpoint={checkpoint}", f"input={photos}"),
            *(f"output={tmp_path}/out", "num_workers=0", *QUICK[:2]),
        )
    )
    rows = {row["name"]: row for row in read_rows(tmp_path / "out" / "predictions.csv")}
    assert len(rows) == 40
    for row in table:
        assert rows[row["id"]]["predicted"] == row["predicted"]
        for name in classes:
            assert float(rows[row["id"]][name]) == pytest.approx(float(row[name]), abs=1e-4)
