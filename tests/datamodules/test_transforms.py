"""Resizing and normalising against the references and by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.geometry import fitted, restore
from datamodules.transforms import (
    normalise,
    resize_image,
    resize_mask,
    stretch_to_uint8,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
IMAGENET_STD = np.array([0.229, 0.224, 0.225])[:, None, None]


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("antialias", [False, True])
def test_preprocessing_matches_the_reference(golden, index, antialias):
    values = golden("preprocess")
    image = values[f"i{index}_img"].permute(1, 2, 0).numpy()
    small = resize_image(image, 32, antialias)
    ours = normalise(small, "minmax", train=False)
    key = f"i{index}_%s_aa{int(antialias)}"
    torch.testing.assert_close(ours, values[key % "X"], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, values[key % "image"], rtol=0, atol=1e-6)

    mask = resize_mask((values[f"i{index}_msk"][0] > 127).numpy().astype(np.uint8), 32)
    assert torch.equal(torch.from_numpy(mask)[None].float(), values[f"i{index}_Y"])
    assert torch.equal(torch.from_numpy(mask)[None] * 2.0 - 1, values[f"i{index}_mask"])


@pytest.mark.parametrize(("case", "differing"), [("case0", 136 / 768), ("case1", 314 / 1728)])
def test_preprocessing_is_that_of_the_deeplab_reference(case, differing):
    values = np.load(GOLDEN / "deeplab_kd" / "val_transform.npz")
    image, mask, size = (values[f"{case}/in/{name}"] for name in ("image", "mask", "size"))
    soft = resize_mask(mask // 255, int(size), soft=True)
    assert np.array_equal(np.float32(soft)[None] / 255, values[f"{case}/out/mask"])
    exact, ours = (
        normalise(resize_image(image, int(size), antialias), "imagenet", train=False).numpy()
        for antialias in ("pillow", True)
    )
    np.testing.assert_allclose(exact, values[f"{case}/out/image"], rtol=1e-5, atol=1e-6)
    # Pillow rounds after each of the two directions, which is a grey level here and there.
    levels = np.abs(ours - exact) * IMAGENET_STD * 255
    assert levels.max() < 1.001
    assert (levels > 1e-3).mean() == pytest.approx(differing, abs=0.02)


def colours():
    image = np.zeros((2, 2, 3), np.uint8)
    image[..., 0] = [[100, 150], [200, 120]]
    image[..., 1] = [[40, 50], [60, 50]]
    image[..., 2] = [[20, 30], [20, 30]]
    return image


def test_minmax_is_joint_over_channels():
    for train in (False, True):
        values = normalise(colours(), "minmax", train)
        assert values.dtype == torch.float32
        assert values.shape == (3, 2, 2)
        assert values.min() == 0
        assert values.max() == 1
        assert values[1, 1, 0].item() == pytest.approx(40 / 180)


def test_reference_stretches_training_images_channel_by_channel():
    trained = normalise(colours(), "reference", train=True)
    assert trained.amin(dim=(1, 2)).tolist() == [0, 0, 0]
    assert trained.amax(dim=(1, 2)).tolist() == [1, 1, 1]
    joint = normalise(colours(), "minmax", train=False)
    assert torch.equal(normalise(colours(), "reference", train=False), joint)


def test_imagenet_statistics():
    values = normalise(np.full((1, 1, 3), 255, np.uint8), "imagenet", train=False)
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert values.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalization", ["minmax", "reference"])
def test_a_constant_image_becomes_one_half(normalization):
    values = normalise(np.full((4, 4, 3), 77, np.uint8), normalization, train=True)
    assert torch.equal(values, torch.full((3, 4, 4), 0.5))


def test_stretching_truncates():
    image = np.array([[[10, 20, 30], [110, 60, 30]]], np.uint8)
    assert stretch_to_uint8(image)[0, 0].tolist() == [0, 25, 51]
    assert stretch_to_uint8(image).max() == 255


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (50, 50), (3, 200)])
def test_a_letterbox_keeps_the_proportions(shape):
    image = np.full((*shape, 3), 40, np.uint8)
    image[:, shape[1] // 2 :] = 200
    mask = np.ones(shape, np.uint8)
    square = resize_image(image, 32, True, letterbox=True)
    inside = resize_mask(mask, 32, letterbox=True)
    assert square.shape == (32, 32, 3)
    assert inside.shape == (32, 32)
    box = fitted(shape, 32, letterbox=True)
    assert max(box.height, box.width) == 32
    assert box.height == max(1, round(32 * shape[0] / max(shape)))
    assert inside.sum() == box.height * box.width
    assert (square[inside == 0] == 120).all(), "the mean colour around it"
    whole = restore(torch.from_numpy(inside)[None].float(), shape, letterbox=True)
    assert whole.shape == (1, *shape)
    assert whole.min() == 1


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (20, 25)])
@pytest.mark.parametrize("letterbox", [False, True])
def test_soft_masks_have_grey_edges_and_lie_where_the_hard_ones_do(shape, letterbox):
    y, x = np.mgrid[: shape[0], : shape[1]]
    middle = [length / 2 for length in shape]
    mask = (np.hypot(y - middle[0], x - middle[1]) < min(shape) / 3).astype(np.uint8)
    hard = resize_mask(mask, 32, letterbox)
    soft = resize_mask(mask, 32, letterbox, soft=True)
    assert soft.shape == hard.shape
    assert soft.dtype == hard.dtype == np.uint8
    assert (soft.min(), soft.max()) == (0, 255)
    assert 10 < ((soft > 0) & (soft < 255)).sum() < 200
    assert ((soft > 127) != hard).mean() < 0.05
    full = resize_mask(np.ones(shape, np.uint8), 32, letterbox, soft=True)
    assert np.array_equal(full, resize_mask(np.ones(shape, np.uint8), 32, letterbox) * 255)


def test_a_squashed_map_is_restored_to_the_image():
    square = torch.linspace(0, 1, 16).expand(1, 16, 16)
    whole = restore(square, (40, 160))
    assert whole.shape == (1, 40, 160)
    assert whole[0, 20, 0] == 0
    assert whole[0, 20, -1] == 1
    assert (whole[0, 20].diff() >= 0).all()
