"""Collects the public names of a package's modules, so that a new file needs no second edit."""

import importlib
import pkgutil
from collections.abc import Iterable
from inspect import isabstract
from typing import Any

from common.errors import check_choice

__all__ = ["export_public_names", "look_up"]


def export_public_names(
    package: str, path: Iterable[str], namespace: dict[str, Any], base: type
) -> list[str]:
    """Import every module of a package and re-export the concrete classes it makes public.

    Args:
        package: dotted name of the package (its `__name__`).
        path: the package's `__path__`.
        namespace: the package's `globals()`, which receives the classes.
        base: only subclasses of this type are exported.

    Returns:
        The sorted exported names, for `__all__`.
    """
    names = []
    for module_info in pkgutil.iter_modules(path):
        if module_info.ispkg:
            continue
        module = importlib.import_module(f"{package}.{module_info.name}")
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, base) and not isabstract(value):
                namespace[name] = value
                names.append(name)
    return sorted(names)


def look_up(package: Any, name: str, key: str) -> Any:
    """Return the class called `name` among the public classes of a package.

    Args:
        package: the imported package, such as `networks`.
        name: the class name asked for.
        key: the config key that holds the name, for the message.

    Raises:
        UserError: the package exports no such class.
    """
    classes = [n for n in package.__all__ if isinstance(getattr(package, n), type)]
    check_choice(key, name, classes)
    return getattr(package, name)
