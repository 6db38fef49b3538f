"""Contours lie on the mask's border, tiles in their places."""

import numpy as np

from common.pictures import TRUTH_COLOUR, draw_contour, tile


def test_contour_is_the_border_of_the_mask():
    image = np.zeros((12, 12, 3), np.uint8)
    mask = np.zeros((12, 12), bool)
    mask[3:9, 4:10] = True
    drawn = (draw_contour(image, mask, TRUTH_COLOUR) == TRUTH_COLOUR).all(axis=-1)
    border = mask.copy()
    border[4:8, 5:9] = False
    assert np.array_equal(drawn, border)
    assert image.max() == 0, "the image itself is left alone"


def test_tiles_are_laid_out_by_row():
    sheet = tile(
        [[np.full((2, 3, 3), 10 * (3 * r + c), np.uint8) for c in range(3)] for r in range(2)]
    )
    assert sheet.shape == (2 * 2 + 2, 3 * 3 + 4, 3)
    assert sheet[0, 0, 0] == 0
    assert sheet[5, 12, 0] == 50
    assert sheet[2].min() == 255
