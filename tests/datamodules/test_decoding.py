"""Photographs and masks of any storage; damaged files."""

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules.decoding import is_transparent, read_header, read_image, read_mask
from datamodules.problems import BadFileError


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


@pytest.mark.parametrize("lesion", [1, 255, 65535])
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_sixteen_bits_are_masks(tmp_path, lesion, channels):
    mask = np.eye(5, dtype=np.uint16)
    colours = np.repeat((mask * np.uint16(lesion))[..., None], channels, 2)
    colours[..., 3:] = 65535
    cv2.imwrite(str(tmp_path / "mask.png"), colours)
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1), ("int32", 255), ("uint16", 255)])
def test_numbers_are_photographs_by_their_range(tmp_path, dtype, scale):
    values = (np.array([[0, 0.5, 1]]) * scale).astype(dtype)
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert abs(read_image(tmp_path / "deep.tif")[0, :, 0].astype(int) - [0, 127, 255]).max() <= 1
    if dtype == "float32":
        values[0, 0] = np.nan
        Image.fromarray(values).save(tmp_path / "deep.tif")
        with pytest.raises(BadFileError, match=r"deep.tif has values that are not finite"):
            read_image(tmp_path / "deep.tif")


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_applied_or_ignored(tmp_path, suffix, orientation):
    y, x = np.mgrid[:16, :24]
    stored = np.stack([10 * x, 10 * y, 5 * (x + y)], axis=-1).astype(np.uint8)
    picture = Image.fromarray(stored)
    exif = picture.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    exact = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    picture.save(path, exif=exif, **exact)
    # Rows and columns as the EXIF standard has them: 3 is half a turn, 6 a quarter clockwise.
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    near = 12 if suffix == "jpg" else 0
    for way, expected in (("apply", upright), ("ignore", stored)):
        image = read_image(path, way)
        assert image.shape == expected.shape
        assert np.abs(image.astype(int) - expected).max() <= near
    header = read_header(path)
    assert (header.stored, header.orientation) == ((16, 24), orientation)
    assert header.upright == upright.shape[:2]


def test_a_header_that_is_no_image_is_none(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    assert read_header(tmp_path / "text.jpg") is None
    assert read_header(tmp_path / "missing.jpg") is None


def cut_out(mode, level):
    """Return a red picture whose left half has an opacity of `level`."""
    rgba = np.zeros((6, 8, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[..., 3] = 255
    rgba[:, :4, 3] = level
    return Image.fromarray(rgba).convert(mode) if mode != "P" else Image.fromarray(rgba).quantize()


@pytest.mark.parametrize(
    "storage", ["RGBA.png", "RGBA.tif", "RGBA.webp", "LA.png", "LA.tif", "P.png"]
)
def test_transparent_pixels_are_composed_on_white(tmp_path, storage):
    mode, _, suffix = storage.partition(".")
    path = tmp_path / f"cut.{suffix}"
    cut_out(mode, 0).save(path, lossless=True)
    opaque = read_image(path)[0, -1]
    assert (opaque == 255).sum() == 0
    assert (read_image(path)[:, :4] == 255).all()
    assert is_transparent(path)
    cut_out(mode, 255).save(path, lossless=True)
    assert (read_image(path) == opaque).all()
    assert not is_transparent(path)


def test_half_transparent_pixels_are_half_white(tmp_path):
    cut_out("RGBA", 128).save(tmp_path / "half.png")
    pixels = read_image(tmp_path / "half.png")
    assert pixels[0, 0].tolist() == pytest.approx([227, 127, 127], abs=1)
    assert pixels[0, -1].tolist() == [200, 0, 0]


def test_a_wholly_transparent_photograph_is_refused(tmp_path):
    Image.new("RGBA", (8, 6), (200, 0, 0, 0)).save(tmp_path / "nothing.png")
    with pytest.raises(UserError, match=r"nothing.png is wholly transparent"):
        read_image(tmp_path / "nothing.png")


SHAPE = np.zeros((6, 8), np.uint8)
SHAPE[2:5, 3:7] = 1


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
@pytest.mark.parametrize("lesion", [1, 2, 128, 254, (255, 0, 0), (128, 0, 0), (0, 0, 1)])
def test_black_and_one_other_value_are_skin_and_lesion(tmp_path, lesion, suffix):
    values = SHAPE if isinstance(lesion, int) else SHAPE[..., None]
    Image.fromarray(values * np.array(lesion, np.uint8)).save(tmp_path / f"mask.{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"mask.{suffix}"), SHAPE)


@pytest.mark.parametrize("values", [np.uint16([0, 4096]), np.int32([0, 70000]), np.float32([0, 1])])
def test_deep_masks_may_have_any_lesion_value(tmp_path, values):
    Image.fromarray(values[SHAPE]).save(tmp_path / "mask.tiff")
    assert np.array_equal(read_mask(tmp_path / "mask.tiff"), SHAPE)


@pytest.mark.parametrize("colours", [(0, 0, 0, 128, 0, 0), (0, 0, 0, 0, 0, 0)])
def test_palette_masks_are_read(tmp_path, colours):
    picture = Image.fromarray(SHAPE, mode="L").convert("L")
    picture.putpalette([*colours])
    assert picture.mode == "P"
    picture.save(tmp_path / "voc.png")
    assert np.array_equal(read_mask(tmp_path / "voc.png"), SHAPE)


@pytest.mark.parametrize(("value", "lesion"), [(0, 0), (1, 1), (128, 1), (255, 1)])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_mask_of_one_value_is_empty_or_full(tmp_path, value, lesion, mode):
    Image.fromarray(np.full((6, 8), value, np.uint8)).convert(mode).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png") == lesion).all()


def soft(peak):
    """Return SHAPE four times as large, with grey edges and values up to `peak`."""
    picture = Image.fromarray(SHAPE * np.uint8(peak)).resize((32, 24), Image.Resampling.BILINEAR)
    return picture, np.asarray(picture)


def test_grey_edges_are_read_with_a_threshold(tmp_path):
    picture, values = soft(255)
    picture.save(tmp_path / "soft.png")
    with pytest.raises(UserError, match=r"soft.png has \d+ grey levels.*datamodule.mask_threshold"):
        read_mask(tmp_path / "soft.png")
    for threshold in (0.25, 0.5, 0.9):
        mask = read_mask(tmp_path / "soft.png", threshold=threshold)
        assert np.array_equal(mask, values >= threshold * 255)
    deep = Image.fromarray(values.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    assert np.array_equal(read_mask(tmp_path / "deep.png", threshold=0.5), values >= 127.5)
    colour = np.zeros((*values.shape, 3), np.uint8)
    colour[..., 0] = values
    Image.fromarray(colour).save(tmp_path / "red.png")
    with pytest.raises(UserError, match=r"red.png has \d+ colours"):
        read_mask(tmp_path / "red.png")
    assert np.array_equal(read_mask(tmp_path / "red.png", threshold=0.5), values >= 127.5)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_a_threshold_leaves_masks_of_two_values_alone(tmp_path, threshold):
    Image.fromarray(SHAPE).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", threshold=threshold), SHAPE)


def test_jpeg_masks_need_a_threshold(tmp_path):
    large = SHAPE.repeat(5, axis=0).repeat(5, axis=1)
    path = tmp_path / "mask.jpg"
    Image.fromarray(large * np.uint8(255)).save(path, quality=80)
    with pytest.raises(UserError, match=r"mask.jpg has .*datamodule.mask_threshold"):
        read_mask(path)
    assert np.array_equal(read_mask(path, threshold=0.5), large)
    # Compression alone may leave 0 and 1, which is no lesion.
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    assert read_mask(path).sum() == 0
    Image.fromarray(np.ones((8, 8), np.uint8)).save(path, quality=100)
    with pytest.raises(UserError, match=r"lossy.*datamodule.mask_threshold"):
        read_mask(path)
    assert read_mask(path, threshold=0.5).sum() == 0


@pytest.mark.parametrize("values", [(50, 200), (1, 255)])
def test_two_values_without_black_are_refused(tmp_path, values):
    Image.fromarray(np.uint8(values)[SHAPE]).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask.png has 2 grey levels.*datamodule.mask_threshold"):
        read_mask(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", threshold=0.5), SHAPE)


@pytest.mark.parametrize("values", [(0, -1), (0, np.nan), (-1, 1)])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_negative_and_nan_masks_are_refused(tmp_path, values, threshold):
    Image.fromarray(np.float32(values)[SHAPE]).save(tmp_path / "mask.tiff")
    with pytest.raises(UserError, match=r"mask.tiff .*negative or not finite"):
        read_mask(tmp_path / "mask.tiff", threshold=threshold)


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_lesion_in_the_alpha_channel_alone_is_refused(tmp_path, colour, mode):
    rgba = np.full((*SHAPE.shape, 4), colour, np.uint8)
    rgba[..., 3] = SHAPE * 255
    Image.fromarray(rgba).convert(mode).save(tmp_path / "mask.png")
    state = "full" if colour else "empty"
    with pytest.raises(UserError, match=rf"mask.png is {state} .*alpha channel"):
        read_mask(tmp_path / "mask.png")


def test_an_alpha_channel_that_agrees_is_ignored(tmp_path):
    rgba = np.zeros((*SHAPE.shape, 4), np.uint8)
    rgba[..., 0] = SHAPE * 255
    for alpha in (SHAPE * 255, np.full_like(SHAPE, 255), np.zeros_like(SHAPE)):
        rgba[..., 3] = alpha
        Image.fromarray(rgba).save(tmp_path / "mask.png")
        assert np.array_equal(read_mask(tmp_path / "mask.png"), SHAPE)
    rgba[..., 3] = 255 - SHAPE * 255
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask.png is transparent where its lesion is"):
        read_mask(tmp_path / "mask.png")


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert read_header(tmp_path / "pipe.jpg") is None
    with pytest.raises(UserError, match=r"pipe.jpg cannot be decoded \(it is no regular file"):
        read_image(tmp_path / "pipe.jpg")


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
