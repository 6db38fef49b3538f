"""Edge distance against the reference."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from datamodules import edge_distance


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
def test_kind_and_shape_are_kept(shape, kind):
    mask = np.zeros(shape)
    mask[..., 5:12, 4:9] = 1
    array = edge_distance(mask.astype(kind))
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert array.shape == shape
    tensor = edge_distance(torch.from_numpy(mask.astype(kind)))
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert array.max() > 0


@pytest.mark.parametrize("value", [0, 1])
def test_masks_without_edge_give_zeros(value):
    assert edge_distance(np.full((8, 8), value, np.uint8)).max() == 0


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


def test_other_shapes_are_refused():
    with pytest.raises(UserError, match=r"\(2, 8, 8\)"):
        edge_distance(np.zeros((2, 8, 8)))
