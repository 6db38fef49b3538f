"""Files that are no files, and photographs that their masks do not lie on."""

import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules.files import FileSample, Listing, image_files, images_by_id
from disc_set import write_discs


def samples(root, **settings):
    names = write_discs(root, **settings)
    return [
        FileSample(name, root / "images" / f"{name}.jpg", (root / "masks" / f"{name}.png",))
        for name in names
    ]


def problems(found, exif=None):
    listing = Listing(list(found))
    listing.configure_decoding(exif, None)
    return listing.problems


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_orientations_that_keep_the_size_are_problems(tmp_path, orientation):
    found = samples(tmp_path, count=3, orientation=orientation)
    listed = problems(found)
    assert [problem.kind for problem in listed] == ["EXIF orientation"] * 3
    for problem, sample in zip(listed, found, strict=True):
        assert str(sample.image) in problem.message
        assert f"orientation {orientation}" in problem.message
        assert "datamodule.exif=apply" in problem.message
        assert "datamodule.exif=ignore" in problem.message
    assert problems(found, "apply") == problems(found, "ignore") == []


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_orientations_that_swap_the_sides_are_decided_by_size(tmp_path, orientation):
    stored = samples(tmp_path / "stored", count=2, orientation=orientation)
    for exif in (None, "apply"):
        listed = problems(stored, exif)
        assert [problem.kind for problem in listed] == ["EXIF orientation"] * 2
        assert "datamodule.exif=ignore" in listed[0].message
    assert problems(stored, "ignore") == []
    with pytest.raises(UserError, match=r"EXIF orientation.*datamodule.exif=ignore"):
        stored[0].load()
    image, mask = replace(stored[0], exif="ignore").load()
    assert image.shape[:2] == mask.shape == (48, 64)

    for sample in stored:
        with Image.open(sample.masks[0]) as mask:
            mask.transpose(Image.Transpose.ROTATE_90).save(sample.masks[0])
    assert problems(stored) == []
    assert stored[0].load()[0].shape == (64, 48, 3)
    assert "datamodule.exif=apply" in problems(stored, "ignore")[0].message


def test_a_square_is_not_decided_by_its_size(tmp_path):
    found = samples(tmp_path, count=1, size=(48, 48), orientation=6)
    assert [problem.kind for problem in problems(found)] == ["EXIF orientation"]
    assert problems(found, "apply") == []


def test_a_mask_with_the_same_orientation_is_turned_too(tmp_path):
    (found,) = samples(tmp_path, count=1, orientation=3)
    before = replace(found, exif="ignore").load()
    with Image.open(found.masks[0]) as mask:
        exif = mask.getexif()
        exif[0x0112] = 3
        mask.save(found.masks[0], exif=exif)
    assert problems([found]) == []
    for now, then in zip(found.load(), before, strict=True):
        assert np.array_equal(now, then[::-1, ::-1])


def test_the_disc_lies_under_its_mask_with_the_right_choice(tmp_path):
    (found,) = samples(tmp_path, count=1, orientation=3)
    inside = {}
    for exif in ("apply", "ignore"):
        image, mask = replace(found, exif=exif).load()
        inside[exif] = image[mask == 1].mean()
    assert inside["ignore"] < 80 < inside["apply"]


def test_sizes_that_no_orientation_explains_are_another_problem(tmp_path):
    (found,) = samples(tmp_path, count=1)
    Image.new("L", (30, 20)).save(found.masks[0])
    assert [problem.kind for problem in problems([found])] == ["mask of another size"]
    with pytest.raises(UserError, match="64x48 .* 30x20"):
        found.load()


def test_settings_of_decoding_change_the_fingerprint(tmp_path):
    (found,) = samples(tmp_path, count=1)
    without = replace(found, masks=())
    prints = [
        replace(found, exif=exif, mask_threshold=threshold).fingerprint()
        for exif in (None, "apply", "ignore")
        for threshold in (None, 0.5, 0.25)
    ]
    assert len({tuple(values) for values in prints}) == 9
    assert prints[0] == found.fingerprint()
    assert replace(without, mask_threshold=0.5).fingerprint() == without.fingerprint()


def damage(folder):
    """Put what is no image file among images, and return the kinds of problem in order."""
    (folder / "a_link.jpg").symlink_to(folder / "nowhere.jpg")
    os.mkfifo(folder / "b_pipe.png")
    name = os.path.join(os.fsencode(folder), b"c_\xff\xfe.jpg")
    with open(name, "wb") as file:
        file.write(b"")
    return ["broken link", "no regular file", "file name that is not UTF-8"]


def test_links_pipes_and_bad_names_are_problems(tmp_path):
    write_discs(tmp_path, 2)
    kinds = damage(tmp_path / "images")
    found = []
    assert list(images_by_id([tmp_path / "images"], found)) == ["disc_00", "disc_01"]
    assert [problem.kind for problem in found] == kinds
    assert "c_\\xff\\xfe.jpg" in found[2].message
    "".join(problem.message for problem in found).encode()


def test_a_folder_with_an_images_name_is_a_problem(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    found = []
    assert image_files(tmp_path, found) == []
    assert [problem.kind for problem in found] == ["no regular file"]


def test_subfolders_behind_links_are_read_once(tmp_path):
    write_discs(tmp_path / "far", names=["p2/x"])
    write_discs(tmp_path, names=["p1/x"])
    images = tmp_path / "images"
    (images / "p2").symlink_to(tmp_path / "far" / "images" / "p2")
    (images / "p1" / "loop").symlink_to(images)
    (images / "p3").symlink_to(tmp_path / "gone")
    found = []
    assert list(images_by_id([images], found, recursive=True)) == ["p1/x", "p2/x"]
    assert [problem.kind for problem in found] == ["broken link"]
    assert "p3" in found[0].message
    assert images_by_id([images], [], recursive=False) == {}
