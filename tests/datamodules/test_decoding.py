"""Photographs and masks of any storage; damaged files."""

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules.decoding import read_image, read_mask


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.fromarray(np.zeros((10, 30, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (30, 10, 3)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("L", "png", 0),
        ("1", "bmp", 0),
        ("P", "png", 0),
        ("LA", "png", 0),
        ("RGBA", "tif", 0),
        ("CMYK", "tif", 0),
        ("CMYK", "jpg", 3),
        ("I;16", "png", 0),
        ("I;16", "tiff", 0),
        ("I", "tiff", 0),
    ],
)
def test_photographs_of_any_storage_become_rgb(tmp_path, mode, suffix, tolerance):
    grey = np.zeros((16, 24), np.uint8)
    grey[4:8] = 255
    if mode.startswith("I"):
        deep = grey.astype(np.uint16) * 257
        picture = Image.fromarray(deep.astype(np.int32) if mode == "I" else deep)
    else:
        picture = Image.fromarray(grey).convert("RGB").convert(mode)
    assert picture.mode == mode
    picture.save(tmp_path / f"image.{suffix}")
    image = read_image(tmp_path / f"image.{suffix}")
    assert (image.shape, image.dtype) == ((16, 24, 3), np.uint8)
    assert np.abs(image.astype(int) - grey[..., None]).max() <= tolerance


def test_the_upper_half_of_sixteen_bits_stays(tmp_path):
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("lesion", [1, 255, 65535])
def test_masks_of_sixteen_bits_are_read(tmp_path, lesion):
    mask = np.eye(5, dtype=np.uint16)
    Image.fromarray(mask * np.uint16(lesion)).save(tmp_path / "mask.tiff")
    assert np.array_equal(read_mask(tmp_path / "mask.tiff"), mask)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_masks_of_any_storage_become_zero_and_one(tmp_path, mode, suffix):
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4] = 255
    Image.fromarray(mask).convert(mode).save(tmp_path / f"mask.{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"mask.{suffix}"), mask // 255)


def test_masks_stored_as_zero_and_one_are_read(tmp_path):
    mask = np.eye(5, dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)


def test_grey_masks_are_refused(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    with pytest.raises(UserError, match=r"grey.png has 64 grey levels"):
        read_mask(tmp_path / "grey.png")


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_undecodable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:700]
    path.write_bytes(content)
    with pytest.raises(UserError, match="broken.jpg cannot be decoded"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    for length in rng.integers(1, len(whole) // 2, 60):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"cut.{suffix} cannot be decoded"):
            read_image(path)
