"""A weighted sum of named loss terms, as the config lists them."""

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from common.errors import UserError

__all__ = ["WeightedSum"]


class WeightedSum:
    """Evaluates the terms of nonzero weight and adds them up.

    A term's parameters that the caller computes are taken by name from what it passes; the others
    are options and come from the config, such as `losses.boundary: {weight: 0.25, gamma: 0.2}`.

    Args:
        config: term name to `{weight: w, **options}`; `w = 0` switches the term and its
            computation off.
        functions: every term that the caller offers, by name.
        inputs: names of what the caller will pass.

    Raises:
        UserError: an unknown term or option, an option of the wrong kind, a missing or negative
            weight, or no term at all.
    """

    def __init__(
        self,
        config: Mapping[str, Mapping[str, Any]],
        functions: Mapping[str, Callable[..., Tensor]],
        inputs: Collection[str],
    ) -> None:
        self.weights: dict[str, float] = {}
        self._terms: dict[str, tuple[Callable[..., Tensor], list[str], dict[str, Any]]] = {}
        for name, settings in config.items():
            key = f"lightning_module.losses.{name}"
            if name not in functions:
                raise UserError(
                    f"{key} is not a loss term here; choose from {', '.join(functions)}."
                )
            options = dict(settings or {})
            weight = options.pop("weight", None)
            if not isinstance(weight, int | float) or weight < 0:
                raise UserError(f"{key}.weight={weight} must be a number of at least 0; 0 is off.")
            parameters = inspect.signature(functions[name]).parameters
            required = [parameter for parameter in parameters if parameter in inputs]
            legal = [parameter for parameter in parameters if parameter not in inputs]
            for option in options:
                if option not in legal:
                    raise UserError(
                        f"{key}.{option} is not an option of this term; "
                        f"it has {', '.join(['weight', *legal])}."
                    )
                _check_kind(f"{key}.{option}", options[option], parameters[option].default)
            if weight > 0:
                self.weights[name] = float(weight)
                self._terms[name] = (functions[name], required, options)
        if not self._terms:
            raise UserError(
                "Every weight under lightning_module.losses is 0; give at least one a weight above "
                f"0, from {', '.join(functions)}."
            )

    def needs(self, name: str) -> bool:
        """Tell whether a term of nonzero weight takes this input."""
        return any(name in required for _, required, _ in self._terms.values())

    def without(self, *inputs: str) -> "WeightedSum | None":
        """Return the sum of the terms that use none of these inputs, `None` where all do."""
        terms = {k: v for k, v in self._terms.items() if not set(inputs) & set(v[1])}
        if not terms:
            return None
        rest = copy.copy(self)
        rest._terms, rest.weights = terms, {name: self.weights[name] for name in terms}
        return rest

    def faded(self, factor: float, *inputs: str) -> "WeightedSum | None":
        """Return the sum in which the terms that use any of these inputs weigh `factor` as much.

        At 0 that is `without(*inputs)`: they are not computed either.
        """
        rest = self.without(*inputs)
        if not factor:
            return rest
        faded = copy.copy(self)
        kept = rest.weights if rest else {}
        faded.weights = {
            name: weight if name in kept else factor * weight
            for name, weight in self.weights.items()
        }
        return faded

    def __call__(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum and each term's unweighted value, without graph, by name."""
        values = {
            name: function(**{k: inputs[k] for k in required}, **options)
            for name, (function, required, options) in self._terms.items()
        }
        total = sum(self.weights[name] * value for name, value in values.items())
        return total, {name: value.detach() for name, value in values.items()}


def _check_kind(key: str, value: Any, default: Any) -> None:
    """Refuse text for a number and the like, which would fail within the first step."""
    kinds = ((bool, "true or false"), (int | float, "a number"), (str, "a word"))
    for kind, wanted in kinds:
        if isinstance(default, kind):
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"{key}={value} must be {wanted}, such as {default}.")
            return
