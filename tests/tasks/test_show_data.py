"""Pictures of what the network will see."""

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.pictures import TRUTH_COLOUR
from tasks import show_data


@pytest.fixture
def show(make_config, isic_data, ham_data, tmp_path):
    def run(dataset, *overrides):
        data = ham_data if "ham" in dataset else isic_data
        sizes = ("datamodule.image_size=32", "datamodule.num_workers=0", "num_images=3")
        overrides = (f"datamodule={dataset}", f"paths.data={data}", *sizes, *overrides)
        show_data.run(make_config("task=show_data", *overrides))
        return np.asarray(Image.open(tmp_path / "run" / "data.png")).astype(int)

    return run


def cells(picture, rows, columns):
    side = 128 + 2
    assert picture.shape == (rows * side - 2, columns * side - 2, 3)
    return [
        [picture[r * side :, c * side :][:128, :128] for c in range(columns)] for r in range(rows)
    ]


def green(cell):
    return (cell == TRUTH_COLOUR).all(axis=2).sum()


def test_a_row_is_the_image_its_augmentations_and_the_edge_distance(show):
    grid = cells(show("isic2018", "augmentation=flips", "num_epochs=4"), 3, 6)
    for row in grid:
        assert all(green(cell) > 20 for cell in row[:5])
        assert green(row[5]) == 0
        assert np.ptp(row[5], axis=2).max() == 0, "grey"
        assert row[5].max() == 255
    assert any(not np.array_equal(row[0], cell) for row in grid for cell in row[1:5])


def test_without_augmentation_all_epochs_are_the_image(show):
    grid = cells(show("isic2018", "augmentation=none", "num_epochs=2"), 3, 4)
    for row in grid:
        assert np.array_equal(row[0], row[1])
        assert np.array_equal(row[0], row[2])


@pytest.mark.parametrize("override", ["num_images=0", "num_images=2.5", "num_epochs=x"])
def test_numbers_of_pictures_are_checked(make_config, override):
    with pytest.raises(UserError, match=f"{override} must be a whole number, at least 1"):
        show_data.run(make_config("task=show_data", override))


def test_views_are_shown(show):
    views = ("datamodule.views=true", "datamodule.split=random", "datamodule.allow_leak=true")
    grid = cells(show("ham10000_diagnosis", "augmentation=none", *views), 3, 5)
    for row in grid:
        assert np.array_equal(row[0], row[1])
        assert np.array_equal(np.rot90(row[0], 1), row[2])
        assert green(row[0]) == 0


def test_soft_masks_are_outlined_where_they_are_above_one_half(show):
    settings = ("isic2018", "augmentation=none", "num_epochs=1")
    hard, soft = (
        cells(show(*settings, f"datamodule.mask_resize={how}"), 3, 3) for how in ("area", "soft")
    )
    for one, other in zip(hard, soft, strict=True):
        assert 0.9 < green(other[0]) / green(one[0]) < 1.1
