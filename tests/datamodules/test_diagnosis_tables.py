"""Tables of diagnoses: forms, columns, classes and groups."""

import random

import pytest

from common.errors import UserError
from datamodules.diagnosis_tables import (
    IDS,
    Columns,
    Diagnosis,
    join_groups,
    normalise_label,
    plain_name,
    read_diagnoses,
)

CLIENT = (
    "isic_id,attribution,copyright_license,age_approx,anatom_site_general,concomitant_biopsy,"
    "diagnosis_1,diagnosis_2,diagnosis_3,diagnosis_4,diagnosis_5,image_type,lesion_id,patient_id,"
    "sex\n"
    "ISIC_0000000,Anonymous,CC-0,55,,False,Benign,Benign melanocytic proliferations,Nevus,,,"
    "dermoscopic,IL_1,IP_1,female\n"
    'ISIC_0000001,"Hospital, Town",CC-BY,,,True,Malignant,Malignant melanocytic proliferations '
    '(Melanoma),"Melanoma, NOS",,,dermoscopic,,IP_1,\n'
    "ISIC_0000002,Anonymous,CC-0,30,,False,,,,,,dermoscopic,IL_2,,male\n"
)
ISIC2020 = (
    "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,"
    "benign_malignant,target\n"
    "ISIC_2637011,IP_7279968,IL_7972535,male,45.0,head/neck,unknown,benign,0\n"
    "ISIC_0149568,IP_0962375,,female,55.0,upper extremity,melanoma,malignant,1\n"
)
ISIC2018 = (
    "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
    "ISIC_0024306,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n"
    "ISIC_0024310,1.0,0.0,0.0,0.0,0.0,0.0,0.0\n"
    "ISIC_0024431,0.0,0.0,0.0,0.0,0.0,0.0,1.0\n"
)


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a table whose photographs all exist."""

    def run(text, known=lambda _: True, rest_class=None, encoding="utf-8", **columns):
        path = tmp_path / "table.csv"
        path.write_bytes(text.encode(encoding))
        return read_diagnoses(path, Columns(**columns), known, rest_class)

    return run


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"]
)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_separator_and_encoding_is_read(read, separator, encoding, end):
    table = [
        ["image_id", "diagnosis", "lesion_id", "patient_id", "split"],
        ["a", '"nävus, junctional; flach"', "L1", "P1", "train"],
        ["b.jpg", '"nävus\tblau"', "", "Jürgen", "test"],
    ]
    text = end.join(separator.join(row) for row in table)
    assert read(text, encoding=encoding) == [
        Diagnosis("a", "nävus, junctional; flach", "L1", "P1", "train"),
        Diagnosis("b.jpg", "nävus blau", None, "Jürgen", "test"),
    ]


def test_quoted_cells_hold_quotes_and_line_breaks(read):
    text = '"id","label"\r\n"a ""1"", left.jpg","nevus\r\n  ""blue"""\r\nb,mel\r\n'
    assert read(text) == [Diagnosis('a "1", left.jpg', 'nevus "blue"'), Diagnosis("b", "mel")]


def test_excels_first_line_names_the_separator(read):
    rows = read("sep=;\r\nid;label, of two\r\na;nv\r\n", label="label, of two")
    assert rows == [Diagnosis("a", "nv")]


def test_given_columns_decide_the_separator(read):
    text = "id;label, of two\na;nv, mel\nb;bcc, mel\n"
    rows = read(text, id="id", label="label, of two")
    assert rows == [Diagnosis("a", "nv, mel"), Diagnosis("b", "bcc, mel")]


@pytest.mark.parametrize("name", [*IDS, "Image-ID", "IMAGE NAME", " Filename "])
def test_ids_are_found_by_usual_names(read, name):
    assert read(f"age,{name},dx\n50,a,nv\n") == [Diagnosis("a", "nv")]


@pytest.mark.parametrize(
    "name",
    [
        "label",
        "class",
        "dx",
        "diagnosis",
        "diagnostic",
        "target",
        "benign_malignant",
        "Diagnosis 1",
    ],
)
def test_labels_are_found_by_usual_names(read, name):
    assert read(f"id,age,{name}\na,50,nv\n") == [Diagnosis("a", "nv")]


@pytest.mark.parametrize(
    ("lesion", "patient", "split"),
    [
        ("lesion_id", "patient_id", "split"),
        ("Lesion", "Patient", "Partition"),
        ("group", "patient-id", "subset"),
        ("Group ID", "PATIENT ID", "SPLIT"),
    ],
)
def test_groups_and_parts_have_usual_names(read, lesion, patient, split):
    rows = read(f"{split},{patient},id,{lesion},label\nval,P,a,L,nv\n")
    assert rows == [Diagnosis("a", "nv", "L", "P", "val")]


def test_keys_name_columns_of_ones_own(read):
    text = "Foto;Befund;Läsion;Fall;Teil;label;id\nf1;nv;L;P;test;other;other\n"
    columns = {"id": "foto", "label": "Befund", "group": "läsion", "patient": "FALL"}
    assert read(text, **columns, split="Teil") == [Diagnosis("f1", "nv", "L", "P", "test")]


@pytest.mark.parametrize("key", ["id", "label", "group", "patient", "split"])
def test_unknown_columns_show_those_found(read, key):
    message = rf"datamodule\.{key}_column=nowhere .*table\.csv.* id, label, Befund, a b\."
    with pytest.raises(UserError, match=message):
        read("id,label,Befund,a b,\n1,2,3,4\n", **{key: "nowhere"})


@pytest.mark.parametrize("given", [["MEL", "nowhere"], ["nowhere", "MEL"]])
def test_unknown_columns_of_classes_are_named(read, given):
    with pytest.raises(UserError, match=r"datamodule\.label_column=nowhere .* image, MEL, NV,"):
        read(ISIC2018, label=given)


@pytest.mark.parametrize(
    ("header", "key"), [("Foto,Befund", "id_column"), ("image_id,Befund", "label_column")]
)
def test_without_usual_names_the_found_are_shown(read, header, key):
    with pytest.raises(UserError, match=rf"datamodule\.{key}=<column>.* are {header[:4]}.*Befund"):
        read(f"{header}\na,nv\n")


@pytest.mark.parametrize(
    ("header", "key", "both"),
    [
        ("id,dx,diagnosis", "label_column", "dx and diagnosis"),
        ("id,target,benign_malignant", "label_column", "target and benign_malignant"),
        ("id,label,lesion,lesion_id", "group_column", "lesion_id and lesion"),
        ("id,label,patient,patient_id", "patient_column", "patient_id and patient"),
        ("id,label,subset,split", "split_column", "split and subset"),
    ],
)
def test_two_usual_names_are_a_choice(read, header, key, both):
    names = header.split(",")
    cells = list("abcd")[: len(names)]
    text = f"{header}\n{','.join(cells)}\n"
    message = rf"{both}; .*datamodule\.{key}=<column>.* are {', '.join(names)}\."
    with pytest.raises(UserError, match=message):
        read(text)
    (row,) = read(text, **{key.removesuffix("_column"): names[-1]})
    found = {"label": row.label, "group": row.lesion, "patient": row.patient, "split": row.part}
    assert found[key.removesuffix("_column")] == cells[-1]


def test_two_columns_of_similar_names_are_a_choice(read):
    with pytest.raises(UserError, match=r"datamodule\.label_column=my label .*My-Label, my_label"):
        read("id,My-Label,my_label\na,b,c\n", label="my label")
    assert read("id,My-Label,my_label\na,b,c\n", label="my_label") == [Diagnosis("a", "c")]


@pytest.mark.parametrize("known", ["image", "path"])
def test_the_column_that_finds_photographs_wins(read, known):
    text = "id,path,image,label\n1,p/a.jpg,a,nv\n2,p/b.jpg,b,mel\n"
    found = {"image": {"a", "b"}, "path": {"p/a.jpg", "p/b.jpg"}}[known]
    assert {row.name for row in read(text, known=found.__contains__)} == found
    assert {row.name for row in read(text, known=found.__contains__, id="id")} == {"1", "2"}


def test_the_isic_archives_download_is_read(read):
    assert read(CLIENT) == [
        Diagnosis("ISIC_0000000", "Benign", "IL_1", "IP_1"),
        Diagnosis("ISIC_0000001", "Malignant", None, "IP_1"),
        Diagnosis("ISIC_0000002", None, "IL_2", None),
    ]
    fine = [row.label for row in read(CLIENT, label="diagnosis_3")]
    assert fine == ["Nevus", "Melanoma, NOS", None]


def test_isic_2018_has_a_column_for_each_class(read):
    assert read(ISIC2018) == [
        Diagnosis("ISIC_0024306", "NV"),
        Diagnosis("ISIC_0024310", "MEL"),
        Diagnosis("ISIC_0024431", "VASC"),
    ]


def test_isic_2020_is_benign_or_malignant(read):
    assert read(ISIC2020) == [
        Diagnosis("ISIC_2637011", "benign", "IL_7972535", "IP_7279968"),
        Diagnosis("ISIC_0149568", "malignant", None, "IP_0962375"),
    ]
    assert [row.label for row in read(ISIC2020, label="target")] == ["0", "1"]


@pytest.mark.parametrize("yes", ["1", "1.0", "1,0", "true", "TRUE", "1e0"])
@pytest.mark.parametrize("no", ["0", "0.0", "0,00", "False"])
def test_columns_of_classes_hold_any_bits(read, yes, no):
    text = f"id;mel;nv;lesion_id\na;{yes};{no};0\nb;{no};{yes};1\n"
    assert read(text) == [Diagnosis("a", "mel", "0"), Diagnosis("b", "nv", "1")]


@pytest.mark.parametrize("rest", [None, "other"])
def test_rows_of_zeros_are_the_rest(read, rest):
    text = "id,mel,nv\na,0,0\nb,0,1\nc,1,0\n"
    assert [row.label for row in read(text, rest_class=rest)] == [rest, "nv", "mel"]
    only_one = read("id,melanoma\na,1\nb,0\n", rest_class=rest)
    assert [row.label for row in only_one] == ["melanoma", rest]


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        ("b,1,0,1", "mel=1 and bcc=1"),
        ("b,1,,0", "nv="),
        ("b,0.5,0.5,0", "mel=0.5 and nv=0.5"),
        ("b,0,2,0", "nv=2"),
    ],
)
def test_wrong_rows_of_bits_are_named(read, row, cells):
    message = rf"Row 3 of .*table\.csv has {cells}, .*mel, nv, bcc .*label_column=\[.*id, mel"
    with pytest.raises(UserError, match=message):
        read(f"id,mel,nv,bcc\na,1,0,0\n{row}\n", label=["mel", "nv", "bcc"])


def test_columns_without_bits_are_no_classes(read):
    text = "id,,age,remark,mel,nv\na,,50,,1,0\nb,,60,,{bit},1\n"
    assert [row.label for row in read(text.format(bit=0))] == ["mel", "nv"]
    with pytest.raises(UserError, match="Row 3 .* mel=, .* mel, nv should"):
        read(text.format(bit=""))


def test_given_columns_of_classes_leave_others_out(read):
    text = "id,smoker,mel,nv,age\na,1,1,0,50\nb,1,0,1,60\nc,0,0,1,70\n"
    with pytest.raises(UserError, match=r"Row 2 .* smoker=1 and mel=1,.*label_column=\["):
        read(text)
    assert [row.label for row in read(text, label=["MEL", "nv"])] == ["mel", "nv", "nv"]


@pytest.mark.parametrize("text", ["id,label\n", "id,label\n,\n\n", ""])
def test_a_table_without_rows_is_refused(read, text):
    with pytest.raises(UserError, match=r"table\.csv has no rows; .*datamodule\.table"):
        read(text)


def test_rows_without_id_are_left_out(read):
    assert read("id,label\na,nv\n,mel\nb,nv\n") == [Diagnosis("a", "nv"), Diagnosis("b", "nv")]


def test_an_empty_column_of_ids_is_refused(read):
    with pytest.raises(UserError, match=r"id; .*datamodule\.id_column=<column>.* id, foto, label"):
        read("id,foto,label\n,a,nv\n,b,mel\n")


@pytest.mark.parametrize("text", ["", "nan", "NaN", "NA", "n/a", "null", "NULL", "<NA>", " "])
def test_missing_values_are_none(read, text):
    rows = read(f"id,label,lesion_id,patient_id\na,{text},{text},{text}\nb,nv,L,P\n")
    assert rows == [Diagnosis("a", None), Diagnosis("b", "nv", "L", "P")]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("nv", "nv"),
        ("  basal \t cell\u00a0carcinoma\n", "basal cell carcinoma"),
        ("na\u0308vus", "n\u00e4vus"),
        ("NV", "NV"),
        ("3", "3"),
        ("3.0", "3"),
        ("3,0", "3"),
        ("-1.0", "-1"),
        ("007", "7"),
        ("1.5", "1.5"),
        ("1_0", "1_0"),
        ("inf", "inf"),
        ("1e300", "1e300"),
        ("nan", None),
        ("", None),
    ],
)
def test_classes_are_compared_in_one_form(text, label):
    assert normalise_label(text) == label


@pytest.mark.parametrize(
    "name", ["image_id", "Image ID", "IMAGE-ID", " image  id ", "Image - Id", "image_ID"]
)
def test_names_of_columns_have_one_form(name):
    assert plain_name(name) == "image_id"


def groups_of(rows):
    """Return the names of the rows in each group."""
    members = {}
    for row, group in zip(rows, join_groups(rows), strict=True):
        members.setdefault(group, set()).add(row.name)
    return {frozenset(names) for names in members.values()}


def rows_of(*cells):
    return [
        Diagnosis(f"r{index}", "nv", lesion, patient)
        for index, (lesion, patient) in enumerate(cells)
    ]


@pytest.mark.parametrize(
    ("cells", "groups"),
    [
        ([(None, None), (None, None)], [{"r0"}, {"r1"}]),
        ([("L", None), ("L", None), ("M", None)], [{"r0", "r1"}, {"r2"}]),
        ([(None, "P"), (None, "P"), (None, "Q")], [{"r0", "r1"}, {"r2"}]),
        # A lesion joins two patients, and a patient two lesions.
        ([("L", "P"), ("L", "Q"), ("M", "Q"), ("N", "R")], [{"r0", "r1", "r2"}, {"r3"}]),
        ([("L", None), ("L", "P"), (None, "P"), ("M", None)], [{"r0", "r1", "r2"}, {"r3"}]),
        # Numbers of lesions are none of patients, nor names of images.
        ([("1", None), (None, "1"), ("r3", None), (None, None)], [{"r0"}, {"r1"}, {"r2"}, {"r3"}]),
    ],
)
def test_lesions_and_patients_join_groups(cells, groups):
    assert groups_of(rows_of(*cells)) == {frozenset(group) for group in groups}


def test_groups_do_not_depend_on_the_order():
    draw = random.Random(0)
    cells = [(f"L{draw.randrange(12)}", f"P{draw.randrange(12)}") for _ in range(12)]
    rows = rows_of(*cells)
    expected = dict(zip(rows, join_groups(rows), strict=True))
    assert 1 < len(set(expected.values())) < len(rows)
    for _ in range(5):
        draw.shuffle(rows)
        assert dict(zip(rows, join_groups(rows), strict=True)) == expected
