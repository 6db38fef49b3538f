"""Augmentation policies: deterministic, joint on image and mask, strict about arguments."""

import warnings
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from common.errors import UserError
from datamodules.augmentations import Augmentation, mirror_padded
from datamodules.synthetic import synthesise_lesion

CONF = Path(__file__).resolve().parents[2] / "conf" / "augmentation"
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
POLICIES = {
    name: yaml.safe_load((CONF / f"reference_{name}.yaml").read_text())
    for name in ("teacher", "student")
}


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    mask = (rng.random((16, 16)) > 0.5).astype(np.uint8)
    return np.repeat(mask[..., None] * 200, 3, axis=2), mask


def test_the_light_policy_moves_image_and_mask_together(make_config):
    augmentation = Augmentation(**make_config("augmentation=light")["augmentation"])
    mask = np.zeros((96, 96), np.uint8)
    mask[36:60, 40:56] = 1
    # Where the image is the mask itself, it must stay so but for a blurred border.
    image = np.repeat(mask[..., None] * 255, 3, axis=2)
    agreement, zoom = [], []
    for seed in range(60):
        moved, moved_mask = augmentation(image, mask, seed)
        assert set(np.unique(moved_mask)) <= {0, 1}
        assert moved.shape == image.shape
        agreement.append(((moved.mean(axis=2) > 127) == moved_mask).mean())
        zoom.append(moved_mask.sum() / mask.sum())
    assert min(agreement) > 0.98
    assert min(zoom) < 0.8
    assert max(zoom) > 3


def test_transforms_of_equal_probability_fire_independently(picture, make_config):
    augmentation = Augmentation(**make_config("augmentation=flips")["augmentation"])
    image, mask = picture
    results = [augmentation(image, mask, seed) for seed in range(60)]
    assert all(np.array_equal(i[..., 0], m * 200) for i, m in results)
    assert len({m.tobytes() for _, m in results}) == 8, "the eight symmetries of a square"


def test_the_result_depends_on_the_seed_only(picture):
    spec = yaml.safe_load("[{name: HorizontalFlip, p: 0.5}, {name: GaussNoise, p: 1.0}]")
    one, two = Augmentation(spec), Augmentation(spec)
    first = [one(*picture, seed)[0] for seed in (1, 2, 3)]
    again = [two(*picture, seed)[0] for seed in (3, 2, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert not np.array_equal(first[0], first[1])


def test_the_policy_has_a_probability_of_its_own(picture):
    never = Augmentation([{"name": "HorizontalFlip", "p": 1.0}], p=0.0)
    assert np.array_equal(never(*picture, 0)[1], picture[1])


ELASTIC = {"name": "AffineElastic", "alpha": 1, "sigma": 2, "alpha_affine": 20}
SPATTER = {
    "name": "RainSpatter",
    "mean": 0,
    "std": 60,
    "gauss_sigma": 2,
    "cutout_threshold": 5,
    "intensity": -3,
}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "Flipp"}, "'Flipp'"),
        ({"name": "Compose"}, "'Compose'"),
        ({"p": 0.5}, "''"),
        ({"name": "GaussNoise", "var_limit": [10, 50]}, "GaussNoise.*var_limit"),
        ({"name": "Sharpen", "alpha": 0.5}, "Sharpen refuses its arguments: alpha: Input should"),
        ({"name": "Flip", "axis": 0}, "Flip.*axis"),
        ({"name": "Flip", "p": 1.5}, "Flip.*p: Input should be less than"),
        ({"name": "FastPiecewiseAffine", "scale": [-0.1, 0.1]}, "FastPiecewiseAffine.*scale"),
        ({"name": "FastPiecewiseAffine", "nb_rows": 1}, "FastPiecewiseAffine.*nb_rows"),
        ({"name": "FastPiecewiseAffine", "grid": 4}, "FastPiecewiseAffine.*grid"),
        ({**ELASTIC, "alpha_affine": -1}, "AffineElastic.*alpha_affine: -1 is less than 0"),
        (
            {**ELASTIC, "alpha_affine": "wide"},
            "AffineElastic.*alpha_affine: 'wide' is not a number",
        ),
        ({**ELASTIC, "sigma": 0}, "AffineElastic.*sigma"),
        ({**ELASTIC, "border_mode": 17}, "AffineElastic.*border_mode"),
        ({**ELASTIC, "approximate": True}, "AffineElastic.*approximate"),
        ({"name": "AffineElastic", "alpha": 1, "sigma": 2}, "AffineElastic.*alpha_affine"),
        ({**SPATTER, "std": -1}, "RainSpatter.*std: -1 is less than 0"),
        ({**SPATTER, "gauss_sigma": 0}, "RainSpatter.*gauss_sigma"),
        ({**SPATTER, "intensity": [-3, 3]}, "RainSpatter.*intensity"),
        ({**SPATTER, "mode": "mud"}, "RainSpatter.*mode"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        Augmentation([spec])


PIXEL_LEVEL = [
    *("CLAHE", "Emboss", "GaussNoise", "HueSaturationValue", "MultiplicativeNoise", "RGBShift"),
    *("RandomBrightnessContrast", "RandomGamma", "RandomToneCurve", "Sharpen", "RainSpatter"),
    "UnsharpMask",
]
SPATIAL = [
    *("Affine", "CoarseDropout", "AffineElastic", "HorizontalFlip", "VerticalFlip", "Flip"),
    *("GridDistortion", "FastPiecewiseAffine", "PixelDropout", "RandomRotate90", "Rotate"),
]
MIRRORED = ["AffineElastic", "GridDistortion", "Rotate"]
LEAVE_THE_MASK = {*PIXEL_LEVEL, "CoarseDropout", "PixelDropout"}
EACH = [
    pytest.param(spec, id=f"{name}-{spec['name']}")
    for name, policy in POLICIES.items()
    for spec in policy["transforms"]
]


def alone(spec, **changes):
    """One transform that always fires, with other arguments where `changes` has any."""
    return Augmentation([{**spec, **changes, "p": 1.0}])


def spec_of(policy, name):
    return next(spec for spec in POLICIES[policy]["transforms"] if spec["name"] == name)


def lesion(size):
    image, mask = synthesise_lesion(0, 1)
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return image, cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST)


@pytest.mark.parametrize(
    ("policy", "p", "each", "vertical"), [("teacher", 0.5, 0.05, 0.05), ("student", 0.7, 0.2, 0.1)]
)
def test_the_reference_policies_keep_order_and_probabilities(policy, p, each, vertical):
    assert POLICIES[policy]["p"] == p
    probabilities = {spec["name"]: spec["p"] for spec in POLICIES[policy]["transforms"]}
    assert list(probabilities) == PIXEL_LEVEL + SPATIAL
    assert probabilities == dict.fromkeys(probabilities, each) | {"VerticalFlip": vertical}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_reference_policies_run_without_warnings(policy, make_config):
    config = make_config(f"augmentation=reference_{policy}")["augmentation"]
    image, mask = lesion(32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = Augmentation(**config), Augmentation(**config)
        results = [one(image, mask, seed) for seed in range(40)]
        again = [two(image, mask, seed) for seed in reversed(range(40))]
    for (x, m), (y, n) in zip(results, reversed(again), strict=True):
        assert np.array_equal(x, y)
        assert np.array_equal(m, n)
    changed = len({x.tobytes() for x, _ in results}) / 40
    # The list applies with probability p, and then 23 transforms fire independently.
    assert changed == pytest.approx({"teacher": 0.5 * 0.69, "student": 0.7}[policy], abs=0.15)


@pytest.mark.parametrize("spec", EACH)
def test_each_transform_acts_and_keeps_the_form(spec):
    augmentation = alone(spec)
    for size in (32, 64, 128):
        image, mask = lesion(size)
        before = image.copy(), mask.copy()
        results = [augmentation(image, mask, seed) for seed in range(8)]
        assert np.array_equal(image, before[0])
        assert np.array_equal(mask, before[1])
        for x, m in results:
            assert (x.dtype, x.shape) == (np.uint8, (size, size, 3))
            assert (m.dtype, m.shape) == (np.uint8, (size, size))
            assert set(np.unique(m)) <= {0, 1}
        assert any(not np.array_equal(x, image) for x, _ in results)
        moved = any(not np.array_equal(m, mask) for _, m in results)
        assert moved == (spec["name"] not in LEAVE_THE_MASK)
    always_the_same = spec["name"] in ("HorizontalFlip", "VerticalFlip")
    assert (len({x.tobytes() for x, _ in results}) == 1) == always_the_same


@pytest.mark.parametrize("spec", [p for p in EACH if p.values[0]["name"] not in LEAVE_THE_MASK])
def test_spatial_transforms_move_image_and_mask_together(spec):
    augmentation = alone(spec)
    mask = np.zeros((128, 128), np.uint8)
    mask[30:90, 20:70] = 1
    image = np.repeat(mask[..., None] * 255, 3, axis=2)
    for seed in range(20):
        x, m = augmentation(image, mask, seed)
        assert ((x[..., 0] > 127) == m).mean() > 0.98


@pytest.mark.parametrize("name", ["Flip", "HorizontalFlip", "VerticalFlip", "RandomRotate90"])
def test_flips_and_turns_have_equal_chances(name, picture):
    image, mask = picture
    augmentation = alone(spec_of("teacher", name))
    counts = Counter(augmentation(image, mask, seed)[1].tobytes() for seed in range(300))
    across, down = mask[:, ::-1], mask[::-1]
    expected = {
        "Flip": [across, down, down[:, ::-1]],
        "HorizontalFlip": [across],
        "VerticalFlip": [down],
        "RandomRotate90": [np.rot90(mask, turns) for turns in range(4)],
    }[name]
    assert set(counts) == {m.tobytes() for m in expected}
    assert min(counts.values()) > 0.7 * 300 / len(expected)


# What an argument does is measured on made-up pictures. A measure takes an augmentation and a seed.


def flat(level, size=64):
    return np.full((size, size, 3), level, np.uint8)


def shown(augmentation, seed, image):
    return augmentation(image, np.zeros(image.shape[:2], np.uint8), seed)[0].astype(float)


def noise(augmentation, seed):
    return shown(augmentation, seed, flat(128)).std()


def pixels(augmentation, seed):
    return shown(augmentation, seed, flat(100))[..., 0]


def shift(augmentation, seed):
    return shown(augmentation, seed, flat(128))[0, 0] - 128


def contrast(augmentation, seed):
    image = flat(50)
    image[:32] = 150
    return np.ptp(shown(augmentation, seed, image)[..., 0]) / 100


def gamma(augmentation, seed):
    return np.log(shown(augmentation, seed, flat(100))[0, 0, 0] / 255) / np.log(100 / 255)


def factor(augmentation, seed):
    return shown(augmentation, seed, flat(200)).mean() / 200


def hsv_shift(channel):
    colour = cv2.cvtColor(np.uint8([[[90, 128, 150]]]), cv2.COLOR_HSV2RGB)

    def measure(augmentation, seed):
        image = shown(augmentation, seed, np.tile(colour, (8, 8, 1))).astype(np.uint8)
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        return float(hsv[0, 0, channel]) - [90, 128, 150][channel]

    return measure


def holes(augmentation, seed):
    return (shown(augmentation, seed, flat(255, 128)) < 255).any(axis=2)


def hole_side(axis):
    return lambda augmentation, seed: holes(augmentation, seed).any(axis=1 - axis).sum()


def hole_count(augmentation, seed):
    return holes(augmentation, seed).sum()


def hole_share(augmentation, seed):
    return holes(augmentation, seed).mean()


def hole_colour(channel):
    def measure(augmentation, seed):
        image = shown(augmentation, seed, flat(255, 128))
        return image[holes(augmentation, seed)][:, channel]

    return measure


def reading_places(augmentation, seed, size=120):
    """Where each pixel is read from, `(H, W, 2)` as (x, y), and whether that is in the image."""
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    image = np.dstack([x, y, np.ones_like(x)]).astype(np.float32)
    read = shown(augmentation, seed, image)
    return read[..., :2], read[..., 2] > 0.999


def affine(augmentation, seed):
    """The affine `(3, 2)` from input to output (x, y), relative to the image centre."""
    places, inside = reading_places(augmentation, seed)
    y, x = np.nonzero(inside)
    inputs = np.column_stack([places[inside] - 59.5, np.ones(len(x))])
    return np.linalg.lstsq(inputs, np.column_stack([x, y]) - 59.5)[0]


def zoom(augmentation, seed):
    return np.diag(affine(augmentation, seed))


def angle(augmentation, seed):
    matrix = affine(augmentation, seed)
    return np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0]))


def shear(augmentation, seed):
    matrix = affine(augmentation, seed)
    return np.degrees(np.arctan([matrix[0, 1] / matrix[0, 0], matrix[1, 0] / matrix[1, 1]]))


def translation(augmentation, seed):
    return affine(augmentation, seed)[2] / 120


def corner_move(augmentation, seed):
    corners = np.array([[40.5, 40.5], [40.5, -39.5], [-39.5, -39.5]])
    return np.column_stack([corners, np.ones(3)]) @ affine(augmentation, seed) - corners


def stretch(augmentation, seed):
    places, _ = reading_places(augmentation, seed)
    # Two cells are surely inside the image; a cell of 24 px is spanned in 23 steps.
    return np.diff(places[60, :, 0])[[12, 36]] * 23 / 24


STILL = {"scale": [1, 1], "rotate": [0, 0], "shear": [0, 0], "translate_percent": [0, 0]}
ONE_HOLE = {"num_holes_range": [1, 1]}
DOTS = {"hole_height_range": [1, 1], "hole_width_range": [1, 1]}
LIGHT = "RandomBrightnessContrast"


def only(argument):
    return {key: value for key, value in STILL.items() if key != argument}


# Name, argument, measure, the range that its values fill with the teacher's and the student's
# policy, and what is changed about the other arguments to measure this one alone.
RANGES = [
    ("GaussNoise", "std_range", noise, (3.16, 14.15), (7.06, 20.0), {}),
    ("HueSaturationValue", "hue_shift_limit", hsv_shift(0), (-7, 7), (-15, 15), {}),
    ("HueSaturationValue", "sat_shift_limit", hsv_shift(1), (-30, 30), (-50, 50), {}),
    ("HueSaturationValue", "val_shift_limit", hsv_shift(2), (-20, 20), (-30, 30), {}),
    ("MultiplicativeNoise", "multiplier", pixels, (80, 125), (60, 150), {}),
    ("RGBShift", "r_shift_limit", shift, (-20, 20), (-20, 20), {}),
    (LIGHT, "brightness_limit", shift, (-51, 51), (-76.5, 76.5), {"contrast_limit": 0}),
    (LIGHT, "contrast_limit", contrast, (0.8, 1.2), (0.7, 1.3), {"brightness_limit": 0}),
    ("RandomGamma", "gamma_limit", gamma, (0.7, 1.3), (0.5, 1.5), {}),
    ("Sharpen", "alpha", factor, (0.5, 0.8), (0.5, 1.0), {"lightness": [0, 0]}),
    ("Sharpen", "lightness", factor, (0.75, 1.0), (0.5, 1.0), {"alpha": [0.5, 0.5]}),
    ("Affine", "scale", zoom, (0.9, 1.1), (0.8, 1.2), only("scale")),
    ("Affine", "rotate", angle, (-15, 15), (-25, 25), only("rotate")),
    ("Affine", "shear", shear, (-10, 10), (-10, 10), only("shear")),
    ("Affine", "translate_percent", translation, (-0.1, 0.1), (0, 0), only("translate_percent")),
    ("CoarseDropout", "num_holes_range", hole_count, (1, 5), (2, 10), DOTS),
    ("CoarseDropout", "hole_height_range", hole_side(0), (4, 16), (6, 24), ONE_HOLE),
    ("CoarseDropout", "hole_width_range", hole_side(1), (4, 16), (6, 24), ONE_HOLE),
    ("CoarseDropout", "fill", hole_colour(0), (10, 10), (0, 0), {}),
    ("CoarseDropout", "fill", hole_colour(1), (20, 20), (50, 50), {}),
    ("CoarseDropout", "fill", hole_colour(2), (60, 60), (100, 100), {}),
    ("AffineElastic", "alpha_affine", corner_move, (-20, 20), (-30, 30), {"border_mode": 0}),
    ("GridDistortion", "distort_limit", stretch, (0.7, 1.3), (0.6, 1.4), {}),
    ("PixelDropout", "dropout_prob", hole_share, (0.01, 0.01), (0.1, 0.1), {}),
    ("Rotate", "limit", angle, (-90, 90), (-30, 30), {"border_mode": 0}),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("name", "argument", "measure", "teacher", "student", "others"),
    RANGES,
    ids=[f"{name}-{argument}" for name, argument, *_ in RANGES],
)
def test_arguments_bound_what_they_name(policy, name, argument, measure, teacher, student, others):
    augmentation = alone(spec_of(policy, name), **others)
    values = np.concatenate([np.ravel(measure(augmentation, seed)) for seed in range(80)])
    low, high = teacher if policy == "teacher" else student
    # Grey levels are whole numbers, and places are read to 1 / 32 px.
    rounding = 0.02 * max(abs(low), abs(high)) + 0.005
    slack = 0.1 * (high - low) + rounding
    assert low - rounding <= values.min() <= low + slack
    assert high - slack <= values.max() <= high + rounding


def change(augmentation, seed):
    image = lesion(64)[0]
    return np.abs(shown(augmentation, seed, image) - image).mean()


def darkening(augmentation, seed):
    return 200 - shown(augmentation, seed, flat(200)).mean()


def coverage(augmentation, seed):
    return (shown(augmentation, seed, flat(200)) != 200).any(axis=2).mean()


def drop_size(augmentation, seed):
    drops = (shown(augmentation, seed, flat(200)) != 200).any(axis=2)
    count = cv2.connectedComponents(drops.astype(np.uint8))[0] - 1
    return drops.sum() / count


def local_contrast(augmentation, seed):
    faint = flat(128)
    faint[::2] += np.uint8(4)
    return shown(augmentation, seed, faint).std()


def halves_apart(augmentation, seed):
    halves = np.random.default_rng(0).integers(40, 80, (64, 64, 3), np.uint8)
    halves[:, 32:] += np.uint8(120)
    image = shown(augmentation, seed, halves)
    return abs(image[:, 40:].mean() - image[:, :24].mean())


def level_shift(augmentation, seed):
    return abs(shift(augmentation, seed)[0])


def displacement(augmentation, seed):
    places, _ = reading_places(augmentation, seed)
    x, y = np.meshgrid(np.arange(120), np.arange(120))
    moved = places - np.dstack([x, y])
    return moved[20:-20, 20:-20].std()


def roughness(augmentation, seed):
    places, _ = reading_places(augmentation, seed)
    return np.diff(places[20:-20, 20:-20, 0], n=2, axis=1).std() / displacement(augmentation, seed)


def unevenness(augmentation, seed):
    return shown(augmentation, seed, flat(128)).std(axis=(0, 1)).mean()


def right_edge_move(augmentation, seed):
    return abs(reading_places(augmentation, seed)[0][60, -1, 0] - 119)


# Name, argument, another value, measure, by what factor this value changes the measure's mean (at
# least if above 1, else at most), and what is changed about the other arguments for both values.
EFFECTS = [
    ("CLAHE", "clip_limit", [20, 20], local_contrast, 2, {"tile_grid_size": [1, 1]}),
    ("CLAHE", "tile_grid_size", [1, 1], halves_apart, 1.5, {"clip_limit": [40, 40]}),
    ("MultiplicativeNoise", "elementwise", False, unevenness, 0.01, {}),
    ("RandomToneCurve", "scale", 0.05, level_shift, 0.5, {}),
    ("RainSpatter", "mean", 10, coverage, 1.5, {}),
    ("RainSpatter", "std", 300, coverage, 1.5, {}),
    ("RainSpatter", "gauss_sigma", 5, drop_size, 1.5, {"cutout_threshold": 0}),
    ("RainSpatter", "cutout_threshold", 15, coverage, 0.5, {}),
    ("RainSpatter", "intensity", -1, darkening, 0.7, {}),
    ("RainSpatter", "intensity", 1, darkening, -0.1, {}),
    ("UnsharpMask", "blur_limit", [31, 31], change, 1.5, {"threshold": 0}),
    ("AffineElastic", "alpha", 20, displacement, 5, {"alpha_affine": 0}),
    ("AffineElastic", "sigma", 6, roughness, 0.5, {"alpha_affine": 0, "alpha": 100}),
    ("GridDistortion", "normalized", True, right_edge_move, 0.2, {}),
    ("FastPiecewiseAffine", "scale", [0.04, 0.04], displacement, 0.4, {}),
    ("FastPiecewiseAffine", "pull", True, displacement, 1.5, {}),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("name", "argument", "value", "measure", "ratio", "others"),
    EFFECTS,
    ids=[f"{name}-{argument}={value}" for name, argument, value, *_ in EFFECTS],
)
def test_arguments_act(policy, name, argument, value, measure, ratio, others):
    spec = {**spec_of(policy, name), **others}
    given, changed = (
        np.mean([measure(augmentation, seed) for seed in range(30)])
        for augmentation in (alone(spec), alone(spec, **{argument: value}))
    )
    assert given > 0
    assert changed / given >= ratio if ratio > 1 else changed / given <= ratio


def test_the_fast_piecewise_affine_is_the_slow_one():
    image, mask = lesion(32)
    fast, slow = (alone({"name": f"{speed}PiecewiseAffine"}) for speed in ("Fast", ""))
    for seed in range(3):
        for one, other in zip(fast(image, mask, seed), slow(image, mask, seed), strict=True):
            np.testing.assert_allclose(one.astype(int), other, atol=2)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_piecewise_affine_jitters_as_far_as_when_published(policy):
    augmentation = alone(spec_of(policy, "FastPiecewiseAffine"))
    places = np.array([reading_places(augmentation, seed, 128)[0] for seed in range(60)])
    # Measured with albumentations 1.3.1 and the published arguments, at 128 px.
    assert places.std(axis=0).mean() == pytest.approx(3.06, rel=0.1)
    assert places.mean(axis=0)[64, 40:90, 0] == pytest.approx(np.arange(40, 90), abs=2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MIRRORED)
def test_mirrored_borders_keep_a_white_image_white(policy, name):
    spec = spec_of(policy, name)
    mirrored, black = alone(spec), alone(spec, border_mode=0)
    assert all((shown(mirrored, seed, flat(255)) == 255).all() for seed in range(20))
    assert any((shown(black, seed, flat(255)) == 0).any() for seed in range(20))


def test_every_argument_of_the_reference_policies_is_measured():
    measured = {(name, argument) for name, argument, *_ in [*RANGES, *EFFECTS]}
    measured |= {(name, "border_mode") for name in MIRRORED}
    configured = {
        (spec["name"], argument)
        for policy in POLICIES.values()
        for spec in policy["transforms"]
        for argument in spec
    }
    assert {(n, a) for n, a in configured if a not in ("name", "p")} <= measured


OTHERS = ("deeplab_kd", "ssd_kd")


@pytest.mark.parametrize("policy", OTHERS)
@pytest.mark.parametrize("size", [64, 224])
def test_the_other_references_policies_run_without_warnings(policy, size, make_config):
    config = make_config(f"augmentation={policy}")["augmentation"]
    image, mask = lesion(size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augmentation = Augmentation(**config)
        results = [augmentation(image, mask, seed) for seed in range(30)]
    for x, m in results:
        assert (x.dtype, x.shape) == (np.uint8, (size, size, 3))
        assert (m.dtype, m.shape) == (np.uint8, (size, size))
        assert set(np.unique(m)) <= {0, 1}
    assert len({x.tobytes() for x, _ in results}) > 20


@pytest.mark.parametrize("policy", OTHERS)
def test_the_other_references_policies_move_image_and_mask_together(policy, make_config):
    config = make_config(f"augmentation={policy}")["augmentation"]
    colours = ("ColorJitter", "GaussianBlur", "OneOf")
    spatial = [spec for spec in config["transforms"] if spec["name"] not in colours]
    assert len(spatial) == {"deeplab_kd": 2, "ssd_kd": 4}[policy]
    augmentation = Augmentation(spatial)
    mask = np.zeros((112, 112), np.uint8)
    mask[30:90, 20:70] = 1
    image = np.repeat(mask[..., None] * 255, 3, axis=2)
    for seed in range(40):
        x, m = augmentation(image, mask, seed)
        assert ((x.mean(axis=2) > 127) == m).mean() > 0.97


def padded_affine(**arguments):
    return Augmentation([{"name": "MirrorPaddedAffine", "padding": 0.25, "p": 1.0, **arguments}])


def test_a_padded_affine_that_does_nothing_gives_the_image():
    image, mask = lesion(64)
    x, m = padded_affine()(image, mask, 0)
    assert np.array_equal(x, image)
    assert np.array_equal(m, mask)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_padding_is_the_references(case):
    golden = np.load(GOLDEN / "deeplab_kd" / "mirror_padding.npz")
    image, padding = golden[f"{case}/in/image"], int(golden[f"{case}/in/padding"])
    assert np.array_equal(mirror_padded(image, padding), golden[f"{case}/out/padded"])


def test_a_padded_affine_shows_the_mirror_image_and_then_black():
    image, mask = lesion(64)
    image = np.maximum(image, 1)
    # 96 px with padding: a quarter of that is 24 px, of which 16 are mirrored.
    x, m = padded_affine(translate_percent=[0.25, 0.25])(image, mask, 0)
    assert np.array_equal(x[24:, 24:], image[:40, :40])
    assert np.array_equal(x[8:24, 24:], image[:16, :40][::-1])
    assert (x[:8] == 0).all()
    assert np.array_equal(m[24:, 24:], mask[:40, :40])
    assert np.array_equal(m[8:24, 24:], mask[:16, :40][::-1])


def test_a_padded_affine_turns_and_scales_in_its_ranges():
    mask = np.zeros((128, 128), np.uint8)
    mask[54:74, 44:84] = 1
    image = np.repeat(mask[..., None] * 255, 3, axis=2)
    for name, values, low, high in (
        ("rotate", [-20, 20], -20, 20),
        ("scale", [0.8, 1.2], 0.8**2, 1.2**2),
    ):
        augmentation = padded_affine(**{name: values})
        measured = []
        for seed in range(60):
            _, m = augmentation(image, mask, seed)
            y, x = np.nonzero(m)
            tilt = np.degrees(np.arctan2(*np.linalg.eigh(np.cov(x, y))[1][::-1, 1]))
            measured.append(m.sum() / mask.sum() if name == "scale" else (tilt + 90) % 180 - 90)
        assert low - 0.6 <= min(measured) < low + 0.2 * (high - low)
        assert high - 0.2 * (high - low) < max(measured) <= high + 0.6


@pytest.mark.parametrize("cell", [1, 4])
def test_cells_are_blackened_in_all_channels(cell):
    spec = {"name": "CellDropout", "dropout_prob": [0.01, 0.05], "cell": cell, "p": 1.0}
    augmentation = Augmentation([spec])
    white, mask = np.full((128, 128, 3), 255, np.uint8), np.ones((128, 128), np.uint8)
    shares = []
    for seed in range(40):
        x, m = augmentation(white, mask, seed)
        assert m.all()
        assert (x.min(axis=2) == x.max(axis=2)).all()
        shares.append((x == 0).mean())
        cells = x[..., 0].reshape(128 // cell, cell, 128 // cell, cell)
        assert (cells.min(axis=(1, 3)) == cells.max(axis=(1, 3))).all()
    assert np.mean(shares) == pytest.approx(0.03, abs=0.008)


def test_one_of_several_is_chosen():
    choices = [{"name": "HorizontalFlip", "p": 1.0}, {"name": "VerticalFlip", "p": 1.0}]
    augmentation = Augmentation([{"name": "OneOf", "p": 1.0, "transforms": choices}])
    image, mask = lesion(32)
    flips = {"h": image[:, ::-1].tobytes(), "v": image[::-1].tobytes()}
    seen = Counter(augmentation(image, mask, seed)[0].tobytes() for seed in range(40))
    assert set(seen) == set(flips.values())
    assert min(seen.values()) > 8


def test_an_image_without_a_mask_is_augmented():
    image, mask = lesion(32)
    augmentation = Augmentation(POLICIES["student"]["transforms"])
    for seed in range(10):
        alone_image, none = augmentation(image, None, seed)
        assert none is None
        assert np.array_equal(alone_image, augmentation(image, mask, seed)[0])


SHIPPED = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
EVERY = {name: policy for name, policy in SHIPPED.items() if policy["transforms"]} | {
    f"{name}-{number}-{spec['name']}": {"transforms": [{**spec, "p": 1.0}]}
    for name, policy in SHIPPED.items()
    for number, spec in enumerate(policy["transforms"])
}


@pytest.mark.parametrize("policy", EVERY)
def test_a_second_map_moves_as_the_mask_does_and_changes_nothing_of_it(policy):
    augmentation = Augmentation(**EVERY[policy])
    for size in (32, 112):
        image, mask = lesion(size)
        chance = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
        # A map that is the mask itself says whether it is moved alike.
        maps = np.stack((mask, chance, mask), axis=-1)
        before = maps.copy()
        for seed in range(12):
            x, m = augmentation(image, mask, seed)
            _, c = augmentation(image, chance, seed)
            together, moved = augmentation(image, maps, seed)
            assert (moved.dtype, moved.shape) == (np.uint8, (size, size, 3))
            assert np.array_equal(together, x)
            for channel, expected in enumerate((m, c, m)):
                assert np.array_equal(moved[..., channel], expected)
        assert np.array_equal(maps, before)


def test_transforms_that_look_at_the_mask_look_at_the_first_map_only():
    crop = {"name": "CropNonEmptyMaskIfExists", "height": 16, "width": 16, "p": 1.0}
    augmentation = Augmentation([crop])
    image, mask = lesion(64)
    maps = np.stack((mask, np.full_like(mask, 255)), axis=-1)
    for seed in range(20):
        x, m = augmentation(image, mask, seed)
        together, moved = augmentation(image, maps, seed)
        assert np.array_equal(together, x)
        assert np.array_equal(moved[..., 0], m)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ("[{name: RandomCrop, height: 8, width: 8, p: 0.01}]", r"uint8 of \(8, 8, 3\).*Resize"),
        ("[{name: HorizontalFlip}, {name: ToFloat, p: 0.01}]", "into float32"),
        ("[{name: RandomCrop, height: 99, width: 99, p: 0.01}]", "cannot be applied.*16 px.*99"),
        ("[{name: OneOf, p: 0.01, transforms: [{name: ToFloat}]}]", "into float32"),
    ],
)
def test_what_images_would_not_survive_is_known_before_training(transforms, message):
    with pytest.raises(UserError, match=message):
        Augmentation(yaml.safe_load(transforms)).check(16)


def test_a_crop_that_is_resized_back_is_fine():
    spec = "[{name: RandomCrop, height: 8, width: 8}, {name: Resize, height: 16, width: 16}]"
    Augmentation(yaml.safe_load(spec)).check(16)
