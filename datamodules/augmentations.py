"""Augmentation policies from config, on top of albumentations (imported nowhere else)."""

import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.errors import UserError

# The library looks up newer versions online when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

__all__ = ["Augmentation"]


class Augmentation:
    """A list of transforms, applied in order with one seed a sample.

    Args:
        transforms: each a mapping with the albumentations class under `name` and its arguments,
            such as `{name: HorizontalFlip, p: 0.5}`.
        p: probability that the list is applied at all.

    Raises:
        UserError: an unknown transform or argument, or a value that the transform refuses.
    """

    def __init__(self, transforms: Sequence[Mapping[str, Any]], p: float = 1.0) -> None:
        self._compose = A.Compose([_build(spec) for spec in transforms], p=p)

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Transform an RGB uint8 image `(H, W, 3)` and its uint8 mask `(H, W)` together.

        The result depends on nothing but the inputs and `seed`.
        """
        # One pair of generators for all transforms: `set_random_seed` would give each transform
        # its own of the same seed, and two transforms of equal `p` would always fire together.
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = self._compose(image=image, mask=mask)
        return result["image"], result["mask"]


def _build(spec: Mapping[str, Any]) -> A.BasicTransform:
    arguments = dict(spec)
    name = str(arguments.pop("name", ""))
    transform = getattr(A, name, None)
    if not (isinstance(transform, type) and issubclass(transform, A.BasicTransform)):
        raise UserError(
            f"augmentation.transforms names {name!r}, which albumentations {A.__version__} does "
            "not have; use the name of one of its transforms."
        )
    # The library only warns of arguments that it ignores.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            built = transform(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"augmentation.transforms.{name} refuses its arguments: {error}"
            ) from error
    ignored = [str(w.message) for w in caught if "not valid" in str(w.message)]
    if ignored:
        raise UserError(f"augmentation.transforms.{name}: {ignored[0]}; remove or rename them.")
    return built
