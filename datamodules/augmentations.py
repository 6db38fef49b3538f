"""Augmentation policies from config, on top of albumentations (imported nowhere else)."""

import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from common.errors import UserError
from datamodules.augmentation_transforms import (
    add_drops,
    piecewise_affine_map,
    rain_drops,
    then_affine,
    triangle_affine,
)

# The library looks up newer versions online when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

__all__ = [
    "AffineElastic",
    "Augmentation",
    "CellDropout",
    "FastPiecewiseAffine",
    "Flip",
    "MirrorPaddedAffine",
    "RainSpatter",
]


class Augmentation:
    """A list of transforms, applied in order with one seed a sample.

    Args:
        transforms: each a mapping with the transform's class under `name` (of this module or of
            albumentations) and its arguments, such as `{name: HorizontalFlip, p: 0.5}`; or
            `{name: OneOf, p: ..., transforms: [...]}`, of which one is chosen.
        p: probability that the list is applied at all.

    Raises:
        UserError: an unknown transform or argument, or a value that the transform refuses.
    """

    def __init__(self, transforms: Sequence[Mapping[str, Any]], p: float = 1.0) -> None:
        self._compose = A.Compose([_build(spec) for spec in transforms], p=p)
        self._always = A.Compose([_build(_made_certain(spec)) for spec in transforms])

    def check(self, image_size: int) -> None:
        """Apply all transforms to squared images of this size in pixels.

        Raises:
            UserError: a transform cannot be applied, or the result has another size or type.
        """
        image = np.tile(np.arange(image_size, dtype=np.uint8)[:, None, None], (1, image_size, 3))
        mask = (image[..., 0] > image_size // 2).astype(np.uint8)
        for seed in range(4):
            try:
                result = _apply(self._always, image, mask, seed)
            except Exception as error:
                raise UserError(
                    f"The transforms of augmentation.transforms cannot be applied to images of "
                    f"{image_size} px: {error}"
                ) from error
            for changed, given in zip(result, (image, mask), strict=True):
                if changed.shape != given.shape or changed.dtype != np.uint8:
                    raise UserError(
                        f"The transforms of augmentation.transforms turn uint8 images of "
                        f"{given.shape} into {changed.dtype} of {changed.shape}; leave out what "
                        "changes the type, and end with a Resize where the size changes."
                    )

    def __call__(
        self, image: np.ndarray, mask: np.ndarray | None, seed: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Transform an RGB uint8 image `(H, W, 3)` and its uint8 mask, if any, together.

        The result depends on nothing but the inputs and `seed`.

        Args:
            image: before the transforms.
            mask: `(H, W)`, or `(H, W, C)` with further maps of the same image, which move as the
                first does. The first comes out as it would alone.
            seed: of all that is random.
        """
        return _apply(self._compose, image, mask, seed)


class Flip(A.DualTransform):
    """Mirror left-right, up-down or both, with equal chances (gone from albumentations 2)."""

    def get_params(self) -> dict[str, Any]:
        """Draw the axes to mirror."""
        return {"axes": self.py_random.choice([(0,), (1,), (0, 1)])}

    def apply(self, img: np.ndarray, axes: tuple[int, ...], **params: Any) -> np.ndarray:
        """Mirror an image or a mask."""
        return np.flip(img, axes)


class RainSpatter(A.ImageOnlyTransform):
    """Drops on the lens; the mask stays as it is.

    albumentations 2 has no dark drops. The arguments are those of 1.3.1, see `rain_drops`.

    Args:
        mean: mean of the liquid layer.
        std: its standard deviation before the blur, at least 0.
        gauss_sigma: its blur in px, at least 0.1; drops are about as wide.
        cutout_threshold: depth below which the lens is dry; higher for fewer drops.
        intensity: 1 adds the full colour of rain to the strongest pixel; below 0 drops are dark.
    """

    def __init__(
        self,
        mean: float,
        std: float,
        gauss_sigma: float,
        cutout_threshold: float,
        intensity: float,
        p: float = 0.5,
    ) -> None:
        super().__init__(p=p)
        self.mean = _number("mean", mean)
        self.std = _number("std", std, minimum=0)
        self.gauss_sigma = _number("gauss_sigma", gauss_sigma, minimum=0.1)
        self.cutout_threshold = _number("cutout_threshold", cutout_threshold)
        self.intensity = _number("intensity", intensity)

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the drops."""
        layer = (self.mean, self.std, self.gauss_sigma, self.cutout_threshold)
        return {"drops": rain_drops(params["shape"][:2], *layer, self.random_generator)}

    def apply(self, img: np.ndarray, drops: np.ndarray, **params: Any) -> np.ndarray:
        """Add the drops to an image."""
        return add_drops(img, drops, self.intensity)


class AffineElastic(A.ElasticTransform):
    """A random affine and then a small elastic warp, in one resampling (Simard et al., 2003).

    This is `ElasticTransform` of albumentations 1.3.1; version 2 has lost the affine.

    Args:
        alpha: height of the elastic displacement in px before its blur, at least 0.
        sigma: that blur in px, at least 1.
        alpha_affine: how far the corners of the affine move, at least 0 px; see `triangle_affine`.
        border_mode: what lies outside the image, as a number of OpenCV (2 and 4: mirrored).
    """

    def __init__(
        self,
        alpha: float,
        sigma: float,
        alpha_affine: float,
        border_mode: int = cv2.BORDER_REFLECT_101,
        p: float = 0.5,
    ) -> None:
        super().__init__(
            alpha=alpha, sigma=sigma, noise_distribution="uniform", border_mode=border_mode, p=p
        )
        self.alpha_affine = _number("alpha_affine", alpha_affine, minimum=0)

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the map."""
        elastic = super().get_params_dependent_on_data(params, data)
        affine = triangle_affine(params["shape"][:2], self.alpha_affine, self.random_generator)
        map_x, map_y = then_affine(elastic["map_x"], elastic["map_y"], affine)
        return {"map_x": map_x, "map_y": map_y}


class FastPiecewiseAffine(A.PiecewiseAffine):
    """`PiecewiseAffine` with the same maps, some hundred times as fast.

    Args:
        scale: range of three standard deviations of the jitter, as a share of the shorter side;
            one number is the upper end of a range from 0.
        nb_rows: rows of control points, at least 2.
        nb_cols: columns of control points, at least 2.
        pull: keep the library's pull to the centre, which enlarges the middle even without any
            jitter; see `piecewise_affine_map`.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.03, 0.05),
        nb_rows: int = 4,
        nb_cols: int = 4,
        pull: bool = True,
        p: float = 0.5,
    ) -> None:
        super().__init__(scale=scale, nb_rows=nb_rows, nb_cols=nb_cols, p=p)
        self.pull = pull

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the map, in the library's order of draws."""
        shape = params["shape"][:2]
        grid = (self.py_random.randint(*self.nb_rows), self.py_random.randint(*self.nb_cols))
        jitter_std = self.py_random.uniform(*self.scale) * min(shape) / 3
        generator = self.random_generator
        map_x, map_y = piecewise_affine_map(shape, grid, jitter_std, generator, self.pull)
        return {"map_x": map_x, "map_y": map_y}


class MirrorPaddedAffine(A.Affine):
    """A random affine of an image that goes on mirrored for a while outside its border.

    The image is padded by its mirror image, turned, moved and scaled about its centre by nearest
    neighbours, and cut back to its size; what lies beyond the padding is black. Movements are
    shares of the padded size.

    Args:
        padding: of each side, as a share of the image's shorter side, at least 0.
        scale: range of magnification.
        rotate: range in degrees.
        translate_percent: range of the movement along x and y.
    """

    def __init__(
        self,
        padding: float,
        scale: tuple[float, float] = (1.0, 1.0),
        rotate: tuple[float, float] = (0.0, 0.0),
        translate_percent: tuple[float, float] = (0.0, 0.0),
        p: float = 0.5,
    ) -> None:
        super().__init__(
            scale=scale,
            rotate=rotate,
            translate_percent=translate_percent,
            interpolation=cv2.INTER_NEAREST,
            keep_ratio=True,
            p=p,
        )
        self.padding = _number("padding", padding, minimum=0)

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the affine of the padded image."""
        height, width = params["shape"][:2]
        padding = round(self.padding * min(height, width))
        padded = (height + 2 * padding, width + 2 * padding, *params["shape"][2:])
        drawn = super().get_params_dependent_on_data({**params, "shape": padded}, data)
        return {**drawn, "padding": padding}

    def apply(self, img: np.ndarray, padding: int, **params: Any) -> np.ndarray:
        """Transform an image."""
        return _cut(super().apply(mirror_padded(img, padding), **params), padding)

    def apply_to_mask(self, mask: np.ndarray, padding: int, **params: Any) -> np.ndarray:
        """Transform a mask."""
        return _cut(super().apply_to_mask(mirror_padded(mask, padding), **params), padding)


def mirror_padded(img: np.ndarray, padding: int) -> np.ndarray:
    """Return an image with its mirror image around it, the border's pixels repeated."""
    return cv2.copyMakeBorder(img, *[padding] * 4, cv2.BORDER_REFLECT)


def _cut(img: np.ndarray, padding: int) -> np.ndarray:
    height, width = img.shape[:2]
    return img[padding : height - padding, padding : width - padding]


class CellDropout(A.ImageOnlyTransform):
    """Blacken cells of a coarse grid; the mask stays as it is.

    This is `Dropout` and `CoarseDropout` of imgaug.

    Args:
        dropout_prob: range of the share of cells that go black, in [0, 1].
        cell: side of a cell in px, at least 1.
    """

    def __init__(self, dropout_prob: tuple[float, float], cell: float = 1, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.dropout_prob = tuple(_number("dropout_prob", v, minimum=0) for v in dropout_prob)
        self.cell = _number("cell", cell, minimum=1)

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the cells."""
        height, width = params["shape"][:2]
        grid = (max(1, round(height / self.cell)), max(1, round(width / self.cell)))
        share = self.py_random.uniform(*self.dropout_prob)
        cells = (self.random_generator.random(grid) < share).astype(np.uint8)
        return {"dropped": cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)}

    def apply(self, img: np.ndarray, dropped: np.ndarray, **params: Any) -> np.ndarray:
        """Blacken cells of an image."""
        return img * (1 - dropped)[..., None]


_OURS = {
    transform.__name__: transform
    for transform in (
        AffineElastic,
        CellDropout,
        FastPiecewiseAffine,
        Flip,
        MirrorPaddedAffine,
        RainSpatter,
    )
}


def _build(spec: Mapping[str, Any]) -> A.BasicTransform | A.OneOf:
    arguments = dict(spec)
    name = str(arguments.pop("name", ""))
    if name == "OneOf":
        choices = [_build(choice) for choice in arguments.pop("transforms", ())]
        return _construct(A.OneOf, {"transforms": choices, **arguments})
    transform = _OURS.get(name) or getattr(A, name, None)
    if not (isinstance(transform, type) and issubclass(transform, A.BasicTransform)):
        raise UserError(
            f"augmentation.transforms names {name!r}, which albumentations {A.__version__} does "
            f"not have; use the name of one of its transforms, or one of {', '.join(_OURS)}."
        )
    return _construct(transform, arguments)


def _made_certain(spec: Mapping[str, Any]) -> dict[str, Any]:
    certain = {**spec, "p": 1.0}
    if "transforms" in spec:
        certain["transforms"] = [_made_certain(choice) for choice in spec["transforms"]]
    return certain


def _apply(
    compose: A.Compose, image: np.ndarray, mask: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    # One pair of generators for all transforms: `set_random_seed` would give each transform its
    # own of the same seed, and two transforms of equal `p` would always fire together.
    compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
    if mask is None:
        return compose(image=image)["image"], None
    if mask.ndim == 2:
        result = compose(image=image, mask=mask)
        return result["image"], result["mask"]
    # Each by itself: OpenCV rounds the places of nearest neighbours otherwise for two channels.
    first, *others = np.ascontiguousarray(np.moveaxis(mask, -1, 0))
    result = compose(image=image, mask=first, masks=others)
    return result["image"], np.stack([result["mask"], *result["masks"]], axis=-1)


def _construct(transform: type, arguments: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        # The library only warns of arguments that it ignores.
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*very slow")
        try:
            return transform(**arguments)
        except (TypeError, ValueError, UserWarning) as error:
            raise UserError(
                f"augmentation.transforms.{transform.__name__} refuses its arguments: "
                f"{_reason(error)}"
            ) from error


def _reason(error: Exception) -> str:
    # The library's validation errors are chained to pydantic's, whose text is a page long.
    details = getattr(error.__cause__, "errors", None)
    if details is None:
        return f"{error}."
    reasons = (f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in details())
    return "; ".join(reasons).rstrip(".") + "."


def _number(name: str, value: Any, minimum: float = -np.inf) -> float:
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"{name}: {value!r} is not a number")
    if value < minimum:
        raise ValueError(f"{name}: {value} is less than {minimum}")
    return value
