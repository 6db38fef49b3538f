"""Resizing and normalising against the references and by hand."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.geometry import fitted, restore
from datamodules.synthetic import Synthetic, synthesise_lesion
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

    mask = (values[f"i{index}_msk"][0] > 127).numpy().astype(np.uint8)
    mask = resize_mask(mask, 32, how="published")
    assert torch.equal(torch.from_numpy(mask)[None].float(), values[f"i{index}_Y"])
    assert torch.equal(torch.from_numpy(mask)[None] * 2.0 - 1, values[f"i{index}_mask"])


@pytest.mark.parametrize(("case", "differing"), [("case0", 136 / 768), ("case1", 314 / 1728)])
def test_preprocessing_is_that_of_the_deeplab_reference(case, differing):
    values = np.load(GOLDEN / "deeplab_kd" / "val_transform.npz")
    image, mask, size = (values[f"{case}/in/{name}"] for name in ("image", "mask", "size"))
    soft = resize_mask(mask // 255, int(size), how="pillow")
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


def disc(height, width, y=0.5, x=0.5, radius=0.2):
    """A mask of a disc and a photograph of it, dark on grey."""
    rows, columns = np.mgrid[:height, :width]
    middle = y * (height - 1), x * (width - 1)
    inside = np.hypot(rows - middle[0], columns - middle[1]) < radius * min(height, width)
    mask = inside.astype(np.uint8)
    return mask, np.repeat((200 - 150 * mask)[..., None], 3, axis=2).astype(np.uint8)


def centroid(values):
    """Centre of gravity of a map, y and x, in pixels from the centre of the first."""
    places = np.indices(values.shape).reshape(2, -1)
    return places @ values.ravel() / values.sum()


def place(point, shape, side, letterbox):
    """Where a point of an image lies in its square."""
    box = fitted(shape, side, letterbox)
    scale = np.array([box.height, box.width]) / shape
    return np.array([box.top, box.left]) + (point + 0.5) * scale - 0.5


def darkness(image, side, letterbox, antialias=True):
    """How much darker than the skin each pixel of a square is, in the part without margins."""
    square = resize_image(image, side, antialias, letterbox)[..., 0].astype(float)
    box = fitted(image.shape[:2], side, letterbox)
    inside = np.zeros(square.shape, bool)
    inside[box.rows, box.columns] = True
    for axis, extent in enumerate((box.height, box.width)):
        if extent < side:  # The pixels on the border of the image are partly margin.
            inside &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
    return np.where(inside, 200 - square, 0)


SHAPES = [(640, 640), (1129, 1504), (576, 767), (600, 450), (200, 400), (37, 37), (37, 111)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("letterbox", [False, True])
def test_a_centred_disc_stays_in_the_centre(shape, side, letterbox):
    mask, image = disc(*shape)
    for small in (
        resize_mask(mask, side, letterbox, "area"),
        resize_mask(mask, side, letterbox, "soft"),
        darkness(image, side, letterbox),
    ):
        assert centroid(small) == pytest.approx([(side - 1) / 2] * 2, abs=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("antialias", [True, "pillow"])
def test_a_disc_keeps_its_place_anywhere(shape, side, letterbox, antialias):
    for y, x in ((0.4, 0.6), (0.63, 0.35)):
        mask, image = disc(*shape, y, x)
        expected = place(centroid(mask), shape, side, letterbox)
        soft = resize_mask(mask, side, letterbox, "soft")
        assert centroid(soft) == pytest.approx(expected, abs=0.02)
        found = centroid(darkness(image, side, letterbox, antialias))
        assert found == pytest.approx(expected, abs=0.05)


def test_masks_of_whole_pixels_have_no_bias():
    rng = np.random.default_rng(0)
    moved = []
    for _ in range(200):
        shape = rng.integers(100, 500, 2)
        mask, _ = disc(*shape, *rng.uniform(0.3, 0.7, 2))
        small = resize_mask(mask, 64)
        moved.append(centroid(small) - place(centroid(mask), shape, 64, letterbox=False))
    assert np.abs(np.mean(moved, axis=0)).max() < 0.02
    assert np.abs(moved).max() < 0.3, "a mask of whole pixels is no more exact than that"


def test_the_published_masks_lie_half_a_pixel_to_the_lower_right():
    mask, _ = disc(640, 640)
    moved = centroid(resize_mask(mask, 64, how="published")) - 31.5
    assert moved == pytest.approx([0.45, 0.45], abs=0.06)


TURNS = {
    "up": lambda values: values[::-1],
    "left": lambda values: values[:, ::-1],
    "turn": np.rot90,
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("shape", [(75, 100), (37, 111), (501, 333), (64, 64)])
def test_turning_before_resizing_is_turning_after(turn, letterbox, shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    mask = (cv2.GaussianBlur(rng.random(shape), (0, 0), 4) > 0.5).astype(np.uint8)
    turned = [np.ascontiguousarray(TURNS[turn](values)) for values in (mask, image)]
    for how in ("area", "soft"):
        one, other = (resize_mask(values, 32, letterbox, how) for values in (turned[0], mask))
        assert np.array_equal(one, TURNS[turn](other))
    for antialias in (True, False, "pillow"):
        one, other = (
            resize_image(values, 32, antialias, letterbox).astype(int)
            for values in (turned[1], image)
        )
        assert np.abs(one - TURNS[turn](other)).max() <= 1, "the last rounding"


def test_half_a_pixel_of_lesion_makes_a_lesion():
    mask = np.array([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]], np.uint8)
    assert resize_mask(mask, 2).tolist() == [[1, 1], [0, 1]]
    assert resize_mask(mask, 2, how="soft").tolist() == [[128, 128], [64, 255]]
    thirds = resize_mask(np.array([[1, 0, 0]], np.uint8), 2, how="soft")
    assert thirds.tolist() == [[170, 0], [170, 0]], "two thirds of a pixel: 170 of 255"


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (50, 50), (3, 200)])
def test_a_letterbox_keeps_the_proportions(shape):
    image = np.full((*shape, 3), 40, np.uint8)
    image[:, shape[1] // 2 :] = 200
    square = resize_image(image, 32, True, letterbox=True)
    share = resize_mask(np.ones(shape, np.uint8), 32, letterbox=True, how="soft")
    assert square.shape == (32, 32, 3)
    assert share.sum() / 255 == pytest.approx(32 * 32 * min(shape) / max(shape), rel=0.01)
    assert (square[share == 0] == 120).all(), "the mean colour around it"
    assert set(np.unique(square[share == 255])) >= ({40, 200} if shape[0] > 3 else set())


@pytest.mark.parametrize("shape", [(60, 90), (90, 61), (50, 50), (37, 111), (576, 767)])
@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("how", ["area", "soft"])
def test_a_full_mask_is_restored_as_one(shape, letterbox, how):
    small = resize_mask(np.ones(shape, np.uint8), 32, letterbox, how)
    whole = restore(torch.from_numpy(small / small.max())[None], shape, letterbox)
    assert whole.shape == (1, *shape)
    assert (whole > 0.5).all()


@pytest.mark.parametrize(("side", "least"), [(64, 0.990), (128, 0.995)])
@pytest.mark.parametrize("letterbox", [False, True])
def test_a_mask_survives_being_shrunk_and_restored(side, least, letterbox):
    dice = []
    for index in range(6):
        mask = cv2.resize(synthesise_lesion(0, index)[1], (767, 576)) > 0
        small = resize_mask(mask.astype(np.uint8), side, letterbox, "soft")
        whole = restore(torch.from_numpy(small / 255)[None], mask.shape, letterbox)[0] > 0.5
        dice.append(2 * (whole.numpy() & mask).sum() / (whole.sum().item() + mask.sum()))
    assert np.mean(dice) >= least


def test_other_shrinking_is_refused_with_a_letterbox(tmp_path):
    for how in ("published", "pillow"):
        with pytest.raises(UserError, match=f"datamodule.mask_resize={how}.*letterbox"):
            Synthetic(cache=tmp_path, image_size=16, batch_size=1, mask_resize=how, letterbox=True)
    with pytest.raises(UserError, match=r"datamodule.mask_resize=nearest.*area, soft"):
        Synthetic(cache=tmp_path, image_size=16, batch_size=1, mask_resize="nearest")


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (20, 25)])
@pytest.mark.parametrize("letterbox", [False, True])
def test_soft_masks_are_above_one_half_where_the_hard_ones_are(shape, letterbox):
    mask, _ = disc(*shape, radius=0.33)
    hard, soft = (resize_mask(mask, 32, letterbox, how) for how in ("area", "soft"))
    assert soft.shape == hard.shape
    assert soft.dtype == hard.dtype == np.uint8
    assert (soft.min(), soft.max()) == (0, 255)
    assert 10 < ((soft > 0) & (soft < 255)).sum() < 200
    assert np.array_equal(soft > 127, hard == 1)


def test_a_squashed_map_is_restored_to_the_image():
    square = torch.linspace(0, 1, 16).expand(1, 16, 16)
    whole = restore(square, (40, 160))
    assert whole.shape == (1, 40, 160)
    assert whole[0, 20, 0] == pytest.approx(0, abs=1e-6)
    assert whole[0, 20, -1] == pytest.approx(1, abs=1e-6)
    assert (whole[0, 20].diff() >= -1e-6).all()
