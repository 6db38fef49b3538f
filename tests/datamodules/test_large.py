"""Large photographs are decoded at a reduced size, and nothing in them moves."""

import numpy as np
import pytest
from PIL import Image

from common.geometry import fitted
from datamodules import large
from datamodules.decoding import read_image
from datamodules.large import read_photograph
from datamodules.problems import BadFileError

SIDE = 32


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setattr(large, "WHOLE_PIXELS", 10_000)
    monkeypatch.setattr(large, "STRIP_PIXELS", 5_000)


def disc(width, height):
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(x - 0.4 * width, y - 0.6 * height) < min(width, height) / 5
    return np.where(inside[..., None], [90, 60, 50], [210, 160, 140]).astype(np.uint8)


def centroid(image):
    """Return that of the dark disc, in shares of the height and the width."""
    grey = image.mean(-1)
    weight = (grey.max() - grey) * (grey.max() - grey > 20)
    places = np.stack(np.mgrid[: grey.shape[0], : grey.shape[1]]) + 0.5
    return (places * weight).sum((1, 2)) / weight.sum() / grey.shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_disc_keeps_its_place(tmp_path, suffix, orientation):
    path = tmp_path / f"disc.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(disc(403, 301)).save(
        path, exif=exif, **({"quality": 95} if suffix == "jpg" else {})
    )
    whole = read_image(path)
    photo = read_photograph(path, 16, 1)
    assert photo.reduced
    assert photo.size == whole.shape[:2]
    assert max(photo.image.shape[:2]) == 101
    for letterbox in (False, True):
        box = fitted(photo.size, SIDE, letterbox)
        square = photo.squared(SIDE, True, letterbox)[box.rows, box.columns]
        assert np.abs(centroid(square) - centroid(whole)).max() * SIDE < 0.05


def test_small_photographs_are_decoded_as_all_images(tmp_path):
    path = tmp_path / "disc.png"
    Image.fromarray(disc(100, 90)).save(path)
    photo = read_photograph(path, 16, 1)
    assert not photo.reduced
    assert np.array_equal(photo.image, read_image(path))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_is_reduced_to_the_mean_of_its_cells(tmp_path, mode):
    picture = Image.fromarray(disc(400, 300))
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 256
    picture = Image.fromarray(deep) if mode == "I;16" else picture.convert(mode)
    path = tmp_path / "disc.tif"
    picture.save(path)
    photo = read_photograph(path, 16, 1)
    whole = read_image(path).astype(float)
    cells = whole.reshape(75, 4, 100, 4, 3).mean((1, 3))
    assert np.abs(photo.image - cells).max() <= 1
    assert not photo.transparent


def test_a_transparent_photograph_is_as_on_white(tmp_path):
    colours = np.dstack([disc(400, 300), np.full((300, 400), 255, np.uint8)])
    colours[:, 200:, 3] = 0
    Image.fromarray(colours).save(tmp_path / "cut.png")
    photo = read_photograph(tmp_path / "cut.png", 16, 1)
    assert photo.transparent
    assert (photo.image[:, 51:] == 255).all()
    assert (photo.image[:, :49] < 255).all()
    colours[..., 3] = 0
    Image.fromarray(colours).save(tmp_path / "cut.png")
    with pytest.raises(BadFileError, match=r"cut.png .*wholly transparent"):
        read_photograph(tmp_path / "cut.png", 16, 1)


def test_the_shortest_side_stays_above_what_the_network_sees(tmp_path):
    Image.fromarray(disc(1200, 60)).save(tmp_path / "strip.jpg")
    assert read_photograph(tmp_path / "strip.jpg", 32, 1).image.shape[:2] == (60, 1200)
    assert read_photograph(tmp_path / "strip.jpg", 16, 1).image.shape[:2] == (30, 600)


def test_a_limit_is_named_and_that_of_pillow_is_not_met(tmp_path, monkeypatch):
    Image.fromarray(disc(400, 300)).save(tmp_path / "disc.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert read_photograph(tmp_path / "disc.jpg", 16, 0.13).size == (300, 400)
    assert Image.MAX_IMAGE_PIXELS == 20_000
    with pytest.raises(BadFileError, match=r"max_megapixels, which is 0.11"):
        read_photograph(tmp_path / "disc.jpg", 16, 0.11)
