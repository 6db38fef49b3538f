"""Outputs from the inside of a network, by module path and without a change to its code."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError

__all__ = ["check_paths", "feature_shapes", "last_map", "watch", "watched"]

# A multiple of what any network here wants of an image's side.
SIZE = 64


def check_paths(network: nn.Module, paths: Mapping[str, str], key: str) -> None:
    """Refuse paths at which a network has no module.

    Args:
        network: whose modules are looked up.
        paths: name to path, such as `{aspp: head.aspp}`.
        key: the config key that holds them, for the message.

    Raises:
        UserError: there is no such module; the message has the paths most like it.
    """
    known = [path for path, _ in network.named_modules() if path]
    for name, path in paths.items():
        if path not in known:
            # A path that is too deep or misspelt at its end is still known up to there.
            like = get_close_matches(path, known, n=4, cutoff=0.3) or known[:4]
            raise UserError(
                f"{key}.{name}={path} is no module of {type(network).__name__}; "
                f"choose the path of one, such as {', '.join(like)}."
            )


@contextmanager
def watch(network: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Collect what some modules of a network return while the context is open.

    The hooks are gone when it is left, and what was collected goes with the last reference to it.

    Args:
        network: called within the context, once.
        paths: name to the module's path.

    Returns:
        The outputs by name in the order in which the modules were done, empty until the network
        was called.
    """
    outputs: dict[str, Any] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.pop(name, None)
        outputs[name] = output

    with ExitStack() as stack:
        for name, path in paths.items():
            handle = network.get_submodule(path).register_forward_hook(partial(note, name))
            stack.callback(handle.remove)
        yield outputs


def watched(
    network: nn.Module, paths: Mapping[str, str], *inputs: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Call a network; return its output, and those of some of its modules by name."""
    with watch(network, paths) as outputs:
        return network(*inputs), outputs


def feature_shapes(
    network: nn.Module, paths: Mapping[str, str], key: str, size: int = SIZE, ndim: int = 3
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what some modules of a network give for one image, by name.

    Args:
        network: `network(image)`.
        paths, key: as in `check_paths`.
        size: side of the images in px.
        ndim: 3 for feature maps `(C, h, w)`, 1 for vectors.

    Raises:
        UserError: a module gives something else.
    """
    outputs = _dry_run(network, paths, size)
    for name, path in paths.items():
        output = outputs.get(name)
        if not isinstance(output, Tensor) or output.ndim != 1 + ndim:
            what = {1: "vector", 3: "feature map"}[ndim]
            raise UserError(
                f"{key}.{name}={path} gives no {what}; choose a module that returns one."
            )
    return {name: tuple(outputs[name].shape[1:]) for name in paths}


def last_map(network: nn.Module, key: str) -> str:
    """Return the path of the module that gives a network's last feature map of several pixels.

    Told at 224 px, for which torchvision's classifiers are made: in smaller images the map may have
    a single pixel, as what is pooled has.

    Args:
        network: `network(image)`.
        key: the config key that names the path otherwise, for the message.

    Raises:
        UserError: the network has none.
    """
    paths = {path: path for path, _ in network.named_modules() if path}
    maps = [
        path
        for path, output in _dry_run(network, paths, 224).items()
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1
    ]
    if not maps:
        raise UserError(
            f"{type(network).__name__} gives no feature map; set {key} to the path of a module "
            "that returns one, or the weights of the terms that need it to 0."
        )
    return maps[-1]


def _dry_run(network: nn.Module, paths: Mapping[str, str], size: int) -> dict[str, Any]:
    """Call a network without its weights, which costs next to nothing; see `watch`."""
    image = torch.empty(2, 3, size, size, device="meta")
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    weightless = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    with torch.no_grad(), watch(network, paths) as outputs:
        torch.func.functional_call(network, weightless, (image,))
    return outputs
