"""Edge distance against the reference."""

import cv2
import numpy as np
import pytest
import torch

from common.errors import UserError
from datamodules import border_distance, edge_distance


def test_distances_match_the_reference(golden):
    values = golden("edge_distance")
    names = [key.removesuffix("_mask") for key in values if key.endswith("_mask")]
    assert len(names) == 20
    for name in names:
        distance = edge_distance(values[f"{name}_mask"])
        if name.endswith("_empty"):
            assert torch.equal(distance, torch.zeros_like(distance)), "no edge: zeros, not infinity"
        else:
            torch.testing.assert_close(distance, values[f"{name}_dist"], rtol=0, atol=1e-5)
            assert torch.equal(distance == 0, values[f"{name}_edge"] > 0)


@pytest.mark.parametrize("shape", [(24, 16), (1, 24, 16)])
@pytest.mark.parametrize("kind", ["uint8", "bool", "float32", "float64", "int64"])
@pytest.mark.parametrize("measure", [border_distance, edge_distance])
def test_kind_and_shape_are_kept(shape, kind, measure):
    mask = np.zeros(shape)
    mask[..., 5:12, 4:9] = 1
    array = measure(mask.astype(kind))
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert array.shape == shape
    tensor = measure(torch.from_numpy(mask.astype(kind)))
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert array.max() > 0


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("measure", [border_distance, edge_distance])
def test_masks_without_edge_give_zeros(value, measure):
    assert measure(np.full((8, 8), value, np.uint8)).max() == 0


def test_distances_are_exact_to_the_last_bit():
    mask = np.random.default_rng(0).random((61, 47)) > 0.97
    distance = edge_distance(mask)
    squares = np.rint(distance.astype(np.float64) ** 2)
    assert np.array_equal(distance, np.sqrt(squares).astype(np.float32))


def test_a_lesion_cut_by_the_border_has_no_edge_there():
    mask = np.zeros((20, 20), np.uint8)
    mask[:, :10] = 1
    distance = edge_distance(mask)
    assert distance[10, 0] > 7
    assert (distance[:, 0] == distance[10, 0]).all()


@pytest.mark.parametrize("measure", [border_distance, edge_distance])
def test_other_shapes_are_refused(measure):
    with pytest.raises(UserError, match=r"\(2, 8, 8\)"):
        measure(np.zeros((2, 8, 8)))


def test_border_distances_by_hand():
    mask = np.zeros((5, 6))
    mask[:, 3:] = 1
    assert (border_distance(mask) == [2.5, 1.5, 0.5, 0.5, 1.5, 2.5]).all()
    mask = np.zeros((3, 3))
    mask[1, 1] = 1
    corner = np.sqrt(2) - 0.5
    expected = [[corner, 0.5, corner], [0.5, 0.5, 0.5], [corner, 0.5, corner]]
    np.testing.assert_allclose(border_distance(mask), expected, rtol=1e-6)


def lesions():
    rng = np.random.default_rng(0)
    return [cv2.GaussianBlur(rng.random((40, 40)), (0, 0), 4) > 0.5 for _ in range(5)]


def test_border_distances_do_not_depend_on_the_orientation():
    for mask in lesions():
        distance = border_distance(mask)
        for turn in (np.flipud, np.fliplr, np.rot90, np.transpose):
            assert np.array_equal(border_distance(turn(mask)), turn(distance))
        assert np.array_equal(border_distance(~mask), distance), "nor on which side is lesion"


def test_both_distances_differ_by_half_a_pixel_at_most():
    for mask in lesions():
        assert np.abs(border_distance(mask) - edge_distance(mask)).max() <= 1
    mask = np.zeros((20, 20))
    mask[:, 8:14] = 1
    published = np.flatnonzero(edge_distance(mask)[10] == 0)
    assert published.tolist() == [7, 13], "the left one of each two pixels"
