"""What is found for a path, and how its predictions are called."""

import os

import pytest

from common.errors import UserError
from datamodules.photographs import TABLE_START, find_photographs


@pytest.fixture
def photos(tmp_path):
    """A folder of photographs of patients; returns it."""
    for name in (
        *("top.jpg", "notes.txt", ".hidden.jpg", ".cache/a.jpg", "top_superpixels.png"),
        *("p1/@eaDir/IMG_0001.jpg/thumb.jpg", "$RECYCLE.BIN/a.jpg", "__MACOSX/p1/IMG_0001.jpg"),
        *("p1/IMG_0001.jpg", "p2/IMG_0001.jpg", "p2/late/IMG_0001.png", "p[3]/a=b, c.jpg"),
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


ALL = ["p1/IMG_0001", "p2/IMG_0001", "p2/late/IMG_0001", "p[3]/a=b, c", "top"]


def names(source, output):
    return find_photographs(source, output)[1]


def test_names_mirror_the_folders(photos, tmp_path):
    assert names(photos, tmp_path / "out") == ALL
    assert names(photos / "p1", tmp_path / "out") == ["IMG_0001"]
    assert names(photos / "p2" / "IMG_0001.jpg", tmp_path / "out") == ["IMG_0001"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**/*.jpg", ["p1/IMG_0001", "p2/IMG_0001", "p[3]/a=b, c", "top"]),
        ("*/IMG_*", ["p1/IMG_0001", "p2/IMG_0001"]),
        ("p2/**/*.png", ["late/IMG_0001"]),
        ("p[3]/*.jpg", ["a=b, c"]),
        ("p[12]/*.jpg", ["p1/IMG_0001", "p2/IMG_0001"]),
    ],
)
def test_patterns_are_mirrored_from_their_fixed_part(photos, tmp_path, pattern, found):
    assert names(photos / pattern, tmp_path / "out") == found


def test_predictions_are_no_photographs(photos, tmp_path):
    for output in ("masks", "p1/earlier"):
        (photos / output / "p1").mkdir(parents=True)
        (photos / output / "p1" / "IMG_0001_mask.png").touch()
        (photos / output / "predictions.csv").write_bytes(TABLE_START + b"seconds\n")
    assert names(photos, photos / "masks") == ALL
    assert names(photos / "**" / "[aItc]*[!s].*g", photos / "masks") == ALL


@pytest.mark.parametrize("output", [".", "p1", "p2/late"])
def test_predictions_never_lie_among_photographs(photos, output):
    with pytest.raises(UserError, match="holds photographs of the input"):
        find_photographs(photos, photos / output)


def test_a_link_to_a_folder_above_ends(photos, tmp_path):
    (photos / "p1" / "up").symlink_to(photos)
    (photos / "p4").symlink_to(photos / "p2")
    expected = sorted([*ALL, "p4/IMG_0001", "p4/late/IMG_0001"])
    assert sorted(names(photos, tmp_path / "out")) == expected
    found = names(photos / "**" / "*.jpg", tmp_path / "out")
    assert sorted(found) == [name for name in expected if "late" not in name]


def test_what_is_no_file_is_found_to_be_named(photos, tmp_path):
    (photos / "p1" / "gone.jpg").symlink_to("/nowhere/x.jpg")
    os.mkfifo(photos / "pipe.png")
    found = names(photos, tmp_path / "out")
    assert {"p1/gone", "pipe"} <= set(found)


def test_suffixes_divide_what_has_one_stem(photos, tmp_path):
    (photos / "p1" / "img_0001.PNG").touch()
    found = names(photos, tmp_path / "out")
    assert {"p1/IMG_0001_jpg", "p1/img_0001_PNG", "p2/IMG_0001"} <= set(found)
    (photos / "p1" / "img_0001.JPG").touch()
    message = r"p1/IMG_0001.jpg and .*p1/img_0001.JPG would both be written"
    with pytest.raises(UserError, match=message):
        names(photos, tmp_path / "out")
