"""Every kind of damage is found and named; whole data passes."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from disc_set import write_discs
from tasks import check_data

IMAGES = "ISIC2018_Task1-2_Training_Input"
MASKS = "ISIC2018_Task1_Training_GroundTruth"


@pytest.fixture
def check(make_config, tmp_path):
    """Checks a dataset; returns the report and the error, if any."""

    def run(*overrides):
        config = make_config("task=check_data", *overrides)
        error = None
        try:
            check_data.run(config)
        except UserError as raised:
            error = str(raised)
        return json.loads((tmp_path / "run" / "report.json").read_text()), error

    return run


def isic(data):
    return ("datamodule=isic2018", f"paths.data={data}")


def kinds(entries):
    return sorted(entry["kind"] for entry in entries)


def test_whole_data_passes(isic_data, check, tmp_path):
    report, error = check(*isic(isic_data))
    assert error is None
    assert report["samples"] == 20
    assert report["parts"] == {"train": 14, "val": 2, "test": 4}
    assert report["smallest"] == report["largest"] == [144, 192]
    assert 0.05 < report["mean_covered"] < 0.6
    assert report["problems"] == report["remarks"] == []
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("src='data:image/jpeg;base64,") == 20
    assert "ISIC_0000019" in page
    assert not (tmp_path / "cache").exists(), "nothing is cached"


def test_the_split_it_writes_is_one_that_a_run_takes(isic_data, check, load, tmp_path):
    from datamodules import ISIC2018

    check(*isic(isic_data), "datamodule.split=random", "datamodule.split_seed=4")
    root, path = isic_data / "isic2018", tmp_path / "run" / "splits.csv"
    drawn = load(ISIC2018, root, split="random", split_seed=4)
    assert load(ISIC2018, root, split_file=path).parts == drawn.parts


def image(root, index):
    return root / IMAGES / f"ISIC_{index:07d}.jpg"


def mask(root, index):
    return root / MASKS / f"ISIC_{index:07d}_segmentation.png"


def cut(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def save(path, values):
    Image.fromarray(values).save(path)


def copy_smaller(source, target):
    with Image.open(source) as picture:
        picture.resize((96, 72)).save(target, quality=70)


DAMAGES = {
    "image without partner": lambda r: mask(r, 3).unlink(),
    "mask without partner": lambda r: image(r, 3).unlink(),
    "images of one id": lambda r: shutil.copy(image(r, 3), image(r, 3).with_suffix(".png")),
    "undecodable file": lambda r: cut(image(r, 3)),
    "mask of another size": lambda r: save(mask(r, 3), np.zeros((50, 60), np.uint8)),
    "mask with grey levels": lambda r: save(
        mask(r, 3), np.arange(144 * 192, dtype=np.uint32).reshape(144, 192).astype(np.uint8)
    ),
    # The first image is in the training part, the last one in the test part.
    "image in two parts": lambda r: shutil.copy(image(r, 0), image(r, 9)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_stops_a_training_is_an_error(isic_copy, check, kind, tmp_path):
    DAMAGES[kind](isic_copy / "isic2018")
    report, error = check(*isic(isic_copy))
    assert kinds(report["problems"]) == [kind]
    assert "has 1 problem(s), first: " in error
    message = report["problems"][0]["message"]
    assert message in error
    assert "ISIC_" in message
    assert (tmp_path / "run" / "report.html").is_file()


REMARKS = {
    "empty mask": lambda r: save(mask(r, 3), np.zeros((144, 192), np.uint8)),
    "full mask": lambda r: save(mask(r, 3), np.full((144, 192), 255, np.uint8)),
    "image twice": lambda r: shutil.copy(image(r, 0), image(r, 1)),
    "alike": lambda r: copy_smaller_pair(r, 0, 1),
    "alike in two parts": lambda r: copy_smaller_pair(r, 0, 9),
    "split not possible": lambda r: [
        path.unlink() for i in range(3, 10) for path in (image(r, i), mask(r, i))
    ],
}


def copy_smaller_pair(root, source, target):
    copy_smaller(image(root, source), image(root, target))
    save(mask(root, target), np.eye(72, 96, dtype=np.uint8) * 255)


@pytest.mark.parametrize("kind", REMARKS)
def test_what_may_be_right_is_remarked(isic_copy, check, kind):
    REMARKS[kind](isic_copy / "isic2018")
    report, error = check(*isic(isic_copy))
    assert error is None
    assert kinds(report["remarks"]) == [kind]


def test_a_split_file_that_does_not_fit_is_an_error(isic_copy, check, tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("id,split\nISIC_0000000,train\n")
    report, error = check(*isic(isic_copy), f"datamodule.split_file={table}")
    assert kinds(report["problems"]) == ["split not possible"]
    assert "mine.csv has no row for" in error


def test_every_damage_at_once_is_listed(isic_copy, check):
    root = isic_copy / "isic2018"
    cut(image(root, 1))
    save(mask(root, 2), np.zeros((50, 60), np.uint8))
    mask(root, 3).unlink()
    save(mask(root, 4), np.zeros((144, 192), np.uint8))
    report, error = check(*isic(isic_copy))
    assert kinds(report["problems"]) == [
        "image without partner",
        "mask of another size",
        "undecodable file",
    ]
    assert kinds(report["remarks"]) == ["empty mask"]
    assert "has 3 problem(s)" in error


def test_a_lesion_in_two_parts_is_an_error_unless_allowed(ham_data, check):
    ham = ("datamodule=ham10000", f"paths.data={ham_data}", "datamodule.split=reference")
    report, error = check(*ham)
    assert set(kinds(report["problems"])) == {"lesion in two parts"}
    assert "(train)" in report["problems"][0]["message"]
    assert "allow_leak=true" in error
    report, error = check(*ham, "datamodule.allow_leak=true")
    assert error is None
    assert report["problems"] == []


def test_diagnoses_are_checked_too(ham_data, check):
    report, error = check("datamodule=ham10000_diagnosis", f"paths.data={ham_data}")
    assert report["samples"] == 24
    assert report["mean_covered"] is None
    assert error is None or "split" in error


def test_a_missing_folder_is_named(check, make_config, tmp_path):
    with pytest.raises(UserError, match="does not exist; get it from challenge.isic-archive.com"):
        check_data.run(make_config("task=check_data", *isic(tmp_path)))


def test_the_sheet_shows_what_is_remarkable_first(isic_copy, check, tmp_path):
    save(mask(isic_copy / "isic2018", 7), np.zeros((144, 192), np.uint8))
    check(*isic(isic_copy), "num_images=3")
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<figure>") == 3
    figures = page[page.index("<figure>") :]
    assert figures.index("ISIC_0000007") < figures.index("ISIC_0000000")


def test_the_defaults_are_made_up_data_that_pass(check):
    report, error = check("datamodule.num_samples=20")
    assert error is None
    assert (report["dataset"], report["samples"]) == ("synthetic", 20)
    assert report["parts"] == {"train": 14, "val": 2, "test": 4}
    assert report["problems"] == []


def folder(root, *overrides):
    return ("datamodule=folder", f"datamodule.root={root}", *overrides)


@pytest.mark.parametrize("orientation", [3, 6])
def test_photographs_that_masks_do_not_follow_are_named(check, tmp_path, orientation):
    root = tmp_path / "mine"
    names = write_discs(root, 20, orientation=orientation)
    report, error = check(*folder(root))
    assert kinds(report["problems"]) == ["EXIF orientation"] * 20
    assert [
        name for name in names if any(name in e["message"] for e in report["problems"])
    ] == names
    assert "datamodule.exif=" in error
    assert check(*folder(root, "datamodule.exif=ignore"))[1] is None


def test_masks_that_are_all_empty_are_a_problem(check, tmp_path):
    root = tmp_path / "mine"
    for name in write_discs(root, 10):
        save(root / "masks" / f"{name}.png", np.zeros((48, 64), np.uint8))
    report, error = check(*folder(root))
    assert kinds(report["problems"]) == ["all masks empty"]
    assert "are empty" in error


def test_masks_in_the_alpha_channel_are_problems(check, tmp_path):
    root = tmp_path / "mine"
    for name in write_discs(root, 10):
        path = root / "masks" / f"{name}.png"
        rgba = np.zeros((48, 64, 4), np.uint8)
        rgba[..., 3] = np.asarray(Image.open(path))
        save(path, rgba)
    report, error = check(*folder(root))
    assert kinds(report["problems"]) == ["mask in its alpha channel"] * 10
    assert "is empty" in error


def test_grey_masks_are_problems_without_the_threshold(check, tmp_path):
    root = tmp_path / "mine"
    for name in write_discs(root, 10):
        path = root / "masks" / f"{name}.png"
        with Image.open(path) as mask:
            mask.save(path.with_suffix(".jpg"))
        path.unlink()
    report, error = check(*folder(root))
    assert kinds(report["problems"]) == ["mask with grey levels"] * 10
    assert "datamodule.mask_threshold" in error
    assert check(*folder(root, "datamodule.mask_threshold=0.5"))[1] is None


def test_transparent_photographs_are_remarked(check, tmp_path):
    root = tmp_path / "mine"
    names = write_discs(root, 10)
    for name in names[:2]:
        path = root / "images" / f"{name}.jpg"
        with Image.open(path) as photograph:
            rgba = photograph.convert("RGBA")
        rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
        rgba.save(path.with_suffix(".png"))
        path.unlink()
    report, error = check(*folder(root))
    assert error is None
    assert kinds(report["remarks"]) == ["transparent image"] * 2


def test_files_that_are_no_files_are_named(check, tmp_path):
    root = tmp_path / "mine[/b]"
    write_discs(root, 10)
    (root / "images" / "a_link.jpg").symlink_to(root / "nowhere.jpg")
    os.mkfifo(root / "masks" / "b_pipe.png")
    with open(os.path.join(os.fsencode(root), b"images/c_\xff.jpg"), "wb") as file:
        file.write(b"")
    report, error = check("datamodule=folder", f"datamodule.root='{root}'")
    assert kinds(report["problems"]) == [
        "broken link",
        "file name that is not UTF-8",
        "no regular file",
    ]
    assert report["samples"] == 10
    error.encode()
